"""Shows chosen source files a Mac: questions about the platform are answered as on Apple silicon.

Only code whose file `belongs` says yes to sees it; every other module of the process keeps the truth
(Torch, for example, picks file names by platform). Covered are `sys.platform`, the functions of `platform`,
`os.uname`, and whether ANEForge's macOS library and Apple's private frameworks exist. Nothing here changes
what a program computes.

Child processes are told by programs found before the machine's own, `sysctl` and `sw_vers`: they answer as the
simulated chip's Mac and hand every other question on. `xcrun` stays missing: what it would build cannot run here.
"""

from __future__ import annotations

import builtins
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ane_trainer.interop.aneforge.host import LIBRARY_NAME, Installation

MACOS = "26.5"
"""The macOS that is shown (the one ANEForge 0.4.0 was verified on)."""

_FRAMEWORKS = "/System/Library/PrivateFrameworks/"

#: What `belongs` is asked about a main module that has no file (`python -c`).
NO_FILE = "<string>"

_PLATFORM = {
    "system": "Darwin",
    "machine": "arm64",
    "processor": "arm",
    "release": "25.5.0",
    "platform": f"macOS-{MACOS}-arm64-arm-64bit",
    "mac_ver": (MACOS, ("", "", ""), "arm64"),
}


class MacSys(ModuleType):
    """`sys`, except that `platform` is darwin."""

    def __init__(self) -> None:
        super().__init__("sys", sys.__doc__)

    def __getattribute__(self, name: str) -> Any:
        return "darwin" if name == "platform" else getattr(sys, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(sys, name, value)


def disguise(belongs: Callable[[str], bool]) -> Installation:
    """Put the disguise on for the files that belong; `undo` of the result takes it off."""
    done = Installation(None)
    shown = MacSys()

    def asks() -> bool:
        return _asking(sys._getframe(2).f_globals, belongs)

    real_import = builtins.__import__

    def import_(name: str, globals: Any = None, *rest: Any, **options: Any) -> Any:
        module = real_import(name, globals, *rest, **options)
        return shown if name == "sys" and globals is not None and _asking(globals, belongs) else module

    done.replace(builtins, "__import__", import_)
    for name, answer in _PLATFORM.items():
        done.replace(platform, name, _answer(getattr(platform, name), _always(answer), asks))
    done.replace(platform, "uname", _answer(platform.uname, _mac_uname, asks))
    if hasattr(os, "uname"):
        done.replace(os, "uname", _answer(os.uname, _mac_os_uname, asks))
    for owner, name in ((os.path, "exists"), (os.path, "isfile"), (Path, "exists"), (Path, "is_file")):
        done.replace(owner, name, _with_library(getattr(owner, name)))
    return done


def _asking(module: dict[str, object], belongs: Callable[[str], bool]) -> bool:
    """Whether a module, given by its globals, is one that is shown a Mac."""
    file = module.get("__file__", NO_FILE if module.get("__name__") == "__main__" else None)
    return isinstance(file, str) and belongs(file)


def _answer(
    real: Callable[..., object], answer: Callable[[Any], object], asks: Callable[[], bool]
) -> Callable[..., object]:
    def ask(*arguments: object, **options: object) -> Any:
        given = asks()
        return answer(real) if given else real(*arguments, **options)

    return ask


def _always(answer: object) -> Callable[[object], object]:
    return lambda real: answer


def _mac_uname(real: Callable[..., Any]) -> Any:
    return real()._replace(system="Darwin", release=_PLATFORM["release"], machine="arm64")


def _mac_os_uname(real: Callable[..., Any]) -> Any:
    now = real()
    return type(now)(("Darwin", now.nodename, str(_PLATFORM["release"]), now.version, "arm64"))


def _with_library(real: Callable[..., bool]) -> Callable[..., bool]:
    """`exists` that finds ANEForge's library wherever it is looked for, and every private framework."""

    def exists(path: object, *arguments: object, **options: object) -> bool:
        shown = str(path)
        return (
            shown.endswith(LIBRARY_NAME) or shown.startswith(_FRAMEWORKS) or real(path, *arguments, **options)
        )

    return exists


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
