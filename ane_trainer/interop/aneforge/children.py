"""Hands the simulator on to Python processes that a script or a test starts.

A child imports `startup/sitecustomize.py` (its folder leads the child's module path), which waits for
`import aneforge` and then installs the same chip and fidelity. Code of the folders that are shown a Mac is shown
one there too, and so is a script given by `-c`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ane_trainer.interop.aneforge import install
from ane_trainer.interop.aneforge.fake_platform import NO_FILE, disguise
from ane_trainer.interop.aneforge.host import Installation

#: Carries chip, fidelity and folders, each in a line, from the process that was told to its children; not
#: meant to be set by hand.
_HANDED_ON = "ANE_TRAINER_ANEFORGE_CHILD"


def hand_on(chip: str, fidelity: str, folders_shown: Sequence[str] = ()) -> Installation:
    """From here on child processes run ANEForge on the simulator; `undo` of the result ends that.

    Code below `folders_shown` is shown a Mac there, as in this process. A child whose environment is put
    together by hand (`env=`) gets what it needs as well.
    """
    here = Path(__file__).resolve()
    folders = [str(here.with_name("startup")), str(here.parents[3])]
    told = "\n".join([chip, fidelity, *folders_shown])
    done = Installation(None)
    for name, value in _needed(os.environ, told, folders).items():
        done.replace(os.environ, name, value)
    start: Any = subprocess.Popen.__init__

    def init(
        self: object, *arguments: object, env: Mapping[str, str] | None = None, **options: object
    ) -> None:
        start(self, *arguments, env=env and {**env, **_needed(env, told, folders)}, **options)

    done.replace(subprocess.Popen, "__init__", init)
    return done


def _needed(environment: Mapping[str, str], told: str, folders: list[str]) -> dict[str, str]:
    """The variables of an environment that make a child take over."""
    path = environment.get("PYTHONPATH", "")
    present = path.split(os.pathsep)[: len(folders)] == folders
    return {
        _HANDED_ON: told,
        "PYTHONPATH": path if present else os.pathsep.join([*folders, *filter(None, [path])]),
    }


def take_over() -> None:
    """In a child process: install when ANEForge is imported."""
    if handed := os.environ.get(_HANDED_ON):
        chip, fidelity, *shown = handed.split("\n")
        sys.meta_path.insert(0, _Waiting(chip, fidelity))
        if shown:
            inside = tuple(shown)
            disguise(lambda file: file == NO_FILE or os.path.realpath(file).startswith(inside))


class _Waiting:
    """A finder that lets `import aneforge` happen and then installs the simulator."""

    def __init__(self, chip: str, fidelity: str) -> None:
        self._chip, self._fidelity = chip, fidelity

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "aneforge":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            real = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                real(module)
                install(self._chip, self._fidelity)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
