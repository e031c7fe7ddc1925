"""What the installed ANEForge asks its host: put the simulator's answers in, and take them out again."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ane_trainer.ane.chips.lookup import Chip
from ane_trainer.ane.errors import MissingDependency
from ane_trainer.ane.simulator import EngineContext
from ane_trainer.interop.aneforge.bridges import WORKER, Processes, write_invokers
from ane_trainer.interop.aneforge.library import SimulatedLibrary

LIBRARY_NAME = "libane_e5rt_dispatch.dylib"
"""File name of the library that ANEForge builds on a Mac."""

_MISSING = object()


@dataclass(eq=False)
class Installation:
    """Attributes that were replaced, and what was there before; `library` is what ANEForge now uses."""

    library: SimulatedLibrary | None
    _before: list[tuple[object, object, Any]] = field(default_factory=list)
    _at_end: list[Callable[[], None]] = field(default_factory=list)

    def replace(self, owner: object, name: Any, value: object) -> None:
        """Set an attribute (or a dictionary's entry) and remember what it was."""
        if isinstance(owner, MutableMapping):
            self._before.append((owner, name, owner.get(name, _MISSING)))
            owner[name] = value
        else:
            self._before.append((owner, name, owner.__dict__.get(name, _MISSING)))
            setattr(owner, name, value)

    def call(self, action: Callable[[], None]) -> None:
        """Have something done after everything is put back."""
        self._at_end.append(action)

    def undo(self) -> None:
        """Put everything back, last change first."""
        for owner, name, value in reversed(self._before):
            if isinstance(owner, MutableMapping):
                owner.pop(name) if value is _MISSING else owner.__setitem__(name, value)
            elif value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._before.clear()
        while self._at_end:
            self._at_end.pop()()


def put_in(library: SimulatedLibrary) -> Installation:
    """Make the installed ANEForge compile and dispatch to `library`.

    Raises: MissingDependency (ANE201) when ANEForge is not installed, or not 0.4.x.
    """
    runtime, targets, circuit, build, bridges, worker = _modules()
    chip = library.context.chip
    done = Installation(library)
    done.replace(runtime._Dylib, "_ensure", lambda self: library)
    done.replace(build, "build_dylib", _building(Path(str(build.__file__)).parent / "_lib" / LIBRARY_NAME))
    done.replace(ctypes.CDLL, "__init__", _opening(ctypes.CDLL.__init__, library))
    done.replace(targets, "_cpu_brand", lru_cache(maxsize=1)(lambda: brand(chip)))
    families = targets._BRAND_FAMILY
    if chip.generation_number - 12 not in families:
        done.replace(families, chip.generation_number - 12, max(families.values()))
    # The pause after a failed compile protects Apple's compiler service; there is none here.
    # Nor may a program that the simulator refused make the real service wait after it.
    done.replace(circuit, "_sleep", lambda seconds: None)
    done.replace(circuit, "_last_failure_ts", None)
    _put_in_bridges(done, library.context, bridges, worker)
    return done


def _put_in_bridges(done: Installation, context: EngineContext, bridges: object, worker: object) -> None:
    """Netplists are run by `bridges.py`, which both modules take for processes."""
    folder = Path(tempfile.mkdtemp(prefix="ane_trainer_invokers_"))
    invokers = write_invokers(folder, context)
    done.call(lambda: shutil.rmtree(folder, ignore_errors=True))
    processes = Processes(context, invokers)
    for module in (bridges, worker):
        done.replace(module, "subprocess", processes)
    done.replace(worker, "_ensure_worker_built", lambda: invokers[WORKER])
    done.replace(bridges, "ensure_invoker", invokers.__getitem__)
    _replace_imported(done, "ensure_invoker", invokers.__getitem__)


def _building(packaged: Path) -> Callable[..., Path]:
    """`build_dylib`: where a path is given, a file stands there that opens as the simulated library."""

    def build_dylib(out_path: Path | None = None, *, quiet: bool = False) -> Path:
        path = Path(out_path or packaged)
        if out_path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("Opened by ctypes, this is the simulated library.\n")
            if not quiet:
                print(f"aneforge: built {path}", file=sys.stderr)
        return path

    return build_dylib


def _opening(real: Callable[..., None], library: SimulatedLibrary) -> Callable[..., None]:
    """`ctypes.CDLL(path)`, which opens ANEForge's library by its name as the simulated one."""

    def init(self: Any, name: Any, *arguments: object, **options: object) -> None:
        if name is None or Path(os.fsdecode(name)).name != LIBRARY_NAME:
            real(self, name, *arguments, **options)
            return
        self._name, self._handle, self._FuncPtr = os.fsdecode(name), 0, _no_symbol
        vars(self).update(library.functions())

    return init


def _no_symbol(which: tuple[str, object]) -> NoReturn:
    raise AttributeError(f"{LIBRARY_NAME}: symbol not found: {which[0]}")


def brand(chip: Chip) -> str:
    """What `sysctl machdep.cpu.brand_string` says on this chip."""
    return f"Apple {chip.title}"


def _replace_imported(done: Installation, name: str, value: object) -> None:
    """Bridges import the function by name: load them all and replace it in each."""
    package = importlib.import_module("aneforge._bridges")
    for path in sorted(Path(str(package.__file__)).parent.glob("*_fused.py")):
        module = importlib.import_module(f"aneforge._bridges.{path.stem}")
        if name in vars(module):
            done.replace(module, name, value)


def _modules() -> tuple[Any, ...]:
    try:
        package = importlib.import_module("aneforge")
    except ImportError as fault:
        raise MissingDependency(
            "aneforge: needs ANEForge 0.4.x; it is not installed. Type: pip install 'ane_trainer[e5rt]'."
        ) from fault
    version = str(getattr(package, "__version__", ""))
    if not version.startswith(("0.4.", "0+unknown")):  # the latter: a checkout that was never built
        raise MissingDependency(
            f"aneforge: needs version 0.4.x; got {version or 'unknown'}. "
            "Type: pip install 'aneforge>=0.4,<0.5'."
        )
    names = ("_runtime", "_targets", "_circuit", "build", "_bridges._netplist", "_netplist_worker")
    return tuple(importlib.import_module(f"aneforge.{name}") for name in names)
