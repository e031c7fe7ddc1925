"""`python -m ane_trainer.interop.aneforge [--chip m5] SCRIPT.py [args]`: run a script that uses ANEForge."""

from __future__ import annotations

import argparse
import atexit
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.errors import AneTrainerError
from ane_trainer.interop.aneforge import install
from ane_trainer.interop.aneforge.children import hand_on
from ane_trainer.interop.aneforge.fake_platform import disguise, provide
from ane_trainer.interop.aneforge.host import brand


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the simulator, then run the script as `python SCRIPT.py args` would; the script's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ane_trainer.interop.aneforge",
        description="Run a script that uses ANEForge on the simulated engine.",
    )
    parser.add_argument("--chip", default="m5", help="chip to simulate (default: m5)")
    parser.add_argument("--fidelity", default="exact", choices=("exact", "fast"))
    parser.add_argument("--threads", type=int, default=None, help="worker threads (default: all cores)")
    parser.add_argument(
        "--mac",
        action="store_true",
        help="show the files of the script's folder a Mac (see fake_platform.py)",
    )
    parser.add_argument("script", help="the script")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")
    given = parser.parse_args(arguments)
    script = Path(given.script)
    if not script.is_file():
        print(f"script: needs a file; got {given.script}.", file=sys.stderr)
        return 1
    try:
        install(given.chip, given.fidelity, threads=given.threads)
    except AneTrainerError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    folder = f"{script.resolve().parent}{os.sep}"
    hand_on(given.chip, given.fidelity, [folder] if given.mac else [])
    if given.mac:
        disguise(lambda file: os.path.realpath(file).startswith(folder))
        atexit.register(provide(brand(get_chip(given.chip))).undo)
    sys.argv = [given.script, *given.args]
    sys.path.insert(0, folder.rstrip(os.sep))
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
