"""Programs that a test may ask which Mac this is: `sysctl` and `sw_vers`, found before the machine's own.

They answer as the simulated chip's Mac; every other question goes on to the machine's own program. Child
processes find them too. `xcrun` stays missing: what it would build cannot run here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path

from ane_trainer.interop.aneforge.fake_platform import MACOS
from ane_trainer.interop.aneforge.host import Installation

_BUILD = "25F71"

_SCRIPT = """#!/bin/sh
case "$*" in
{cases}
esac
{otherwise}
"""


def provide(brand: str) -> Installation:
    """Put the programs before all others on `PATH`, for the Mac whose chip is `brand` ("Apple M5").

    `undo` of the result takes them away.
    """
    folder = Path(tempfile.mkdtemp(prefix="ane_trainer_mac_"))
    _write(folder / "sysctl", {
        "*machdep.cpu.brand_string*": brand,
        "*hw.optional.arm64*": "1",
        "*kern.osproductversion*": MACOS,
    })  # fmt: skip
    _write(folder / "sw_vers", {
        "*roductVersion*": MACOS,
        "*uildVersion*": _BUILD,
        "*roductName*": "macOS",
        "": f"ProductName:\\t\\tmacOS\\nProductVersion:\\t\\t{MACOS}\\nBuildVersion:\\t\\t{_BUILD}",
    })  # fmt: skip
    done = Installation(None)
    done.replace(os.environ, "PATH", os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)]))
    done.call(lambda: shutil.rmtree(folder, ignore_errors=True))
    return done


def _write(path: Path, answers: dict[str, str]) -> None:
    """A shell script that prints the answer whose pattern its arguments match."""
    lines = [
        f"""  {pattern or "''"}) printf '%b\\n' {shlex.quote(answer)}; exit 0;;"""
        for pattern, answer in answers.items()
    ]
    own = shutil.which(path.name)
    otherwise = f'exec {shlex.quote(own)} "$@"' if own else "exit 1"
    path.write_text(_SCRIPT.format(cases="\n".join(lines), otherwise=otherwise))
    path.chmod(0o755)
