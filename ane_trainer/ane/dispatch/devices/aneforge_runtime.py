"""The border to ANEForge's runtime layer: whether it can run here, and loading programs into this process.

What a process may do is from ANEForge 0.4.0 (e5rt reference 2.5 and 5, `_circuit.py`): at most 128 loaded
programs, compiling and running in one process, no use after a fork, a pause after a failed compile.
Unverified on hardware: this project has run it only on a stand-in of the dispatch library.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from ane_trainer.ane.chips.lookup import limit
from ane_trainer.ane.compiler.build import TEXT_FILE, WEIGHTS_FILE
from ane_trainer.ane.errors import EnvironmentFault, MissingDependency, ProgramError, SimulationError
from ane_trainer.ane.stages import Compiled

EXTRA = 'pip install "ane_trainer[e5rt]"'

#: ANEForge's own way to name a dispatch library that is there already; off a Mac nothing else can be one.
LIBRARY_VARIABLE = "ANEFORGE_DYLIB"

_loaded: weakref.WeakSet[LoadedProgram] = weakref.WeakSet()
_refused: dict[str, str] = {}  # fingerprint -> why its compile failed in this process
_process = {"watched": False, "forked": False}


def on_apple_silicon() -> bool:
    """Whether this is macOS on Apple silicon."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def given_library() -> str | None:
    """The dispatch library that the environment names, if the file exists."""
    path = os.environ.get(LIBRARY_VARIABLE)
    return path if path and Path(path).expanduser().exists() else None


def missing() -> str | None:
    """None if programs can be loaded here, else the reason and what to type."""
    if given_library() is None:
        if not on_apple_silicon():
            here = f"{platform.system()} {platform.machine()}"
            return (
                f"direct dispatch needs an Apple silicon Mac with macOS 14 or later, this is {here}. "
                'Use device="sim", or --device sim.'
            )
        release = platform.mac_ver()[0]
        if int(release.split(".")[0] or 0) < 14:
            return f'direct dispatch needs macOS 14 or later, this is {release}. Use device="sim".'
    version = _version()
    if version is None or importlib.util.find_spec("aneforge") is None:
        return f'the package aneforge is not installed. Install it: {EXTRA}. Or use device="sim".'
    if not version.startswith("0.4."):
        return f"aneforge 0.4.x is needed, {version} is installed. Install it: {EXTRA}"
    return None


def load_program(compiled: Compiled) -> LoadedProgram:
    """Compile the MIL text for the engine and load it.

    Raises: EnvironmentFault when nothing can be loaded (ANE202), the compile fails (ANE206), too many
    programs are loaded (ANE207) or the process is a fork of one that used the engine (ANE208); ProgramError
    for ports that e5rt has not.
    """
    _check_ports(compiled)
    runtime = _runtime()
    _check_process(compiled)
    if compiled.fingerprint in _refused:
        raise _compile_failed(f"{_refused[compiled.fingerprint]} (not tried again in this process)")
    with contextlib.ExitStack() as temporary:
        stored = compiled.folder is not None and compiled.folder.exists()  # the cache is bounded
        folder = compiled.folder if stored and compiled.folder is not None else _write(compiled, temporary)
        cache = Path(platformdirs.user_cache_dir("ane_trainer")) / "e5rt" / compiled.fingerprint
        with _stderr() as said:
            try:
                program = runtime.E5RT.compile(
                    folder / TEXT_FILE,
                    cache_dir=cache,
                    inputs={port.name: port.shape for port in compiled.inputs},
                    outputs={port.name: port.shape for port in compiled.outputs},
                )
            except (RuntimeError, OSError) as fault:
                program, failure = None, fault
    if program is None:
        _refused[compiled.fingerprint] = " ".join(said) or str(failure)
        raise _compile_failed(_refused[compiled.fingerprint])
    return LoadedProgram(program)


class LoadedProgram:
    """A program of this process with its ANEForge handle; release it, there is room for 128."""

    def __init__(self, program: Any) -> None:
        self._program = program
        _loaded.add(self)
        if not _process["watched"]:
            _process["watched"] = True
            os.register_at_fork(after_in_child=_forget_in_child)

    @property
    def program(self) -> Any:
        """ANEForge's `Program`. EnvironmentFault after a fork (ANE208), SimulationError once closed."""
        if _process["forked"]:
            raise _after_fork()
        if self._program is None:
            raise SimulationError(
                "session: needs to be open; it was closed, its program is released. Compile the step again."
            )
        return self._program

    def execute(self) -> None:
        """One dispatch. Raises: EnvironmentFault (ANE209) with what the library said."""
        program = self.program
        try:
            program.execute()
        except RuntimeError as fault:
            raise EnvironmentFault(
                f"dispatch: needs the engine to run the program; got {fault}. Its reason is on standard "
                'error. Try again, or use device="sim".',
                code="ANE209",
            ) from None

    def release(self) -> None:
        """Give the program's place back; twice is fine."""
        program, self._program = self._program, None
        _loaded.discard(self)
        if program is not None:
            program.release()

    def abandon(self) -> None:
        """Forget the handle without touching the library: it belongs to the parent process."""
        if self._program is not None:
            self._program._handle = 0
            self._program = None


def loaded_programs() -> int:
    """How many programs this process holds through this module."""
    return len(_loaded)


def _forget_in_child() -> None:
    _process["forked"] = True
    for program in list(_loaded):
        program.abandon()
    _loaded.clear()


def _check_process(compiled: Compiled) -> None:
    if _process["forked"]:
        raise _after_fork()
    room = limit(compiled.chip, "loaded_programs", "e5rt")
    if room is not None and len(_loaded) >= room.value:
        raise EnvironmentFault(
            f"program: needs at most {room.value:g} loaded in a process ({room.evidence.source}); "
            f"{len(_loaded)} are. Close steps or inference programs that are done.",
            code="ANE207",
        )


def _check_ports(compiled: Compiled) -> None:
    """e5rt binds ports by name and takes fp16; a program without work on the way to an output crashes it."""
    function = compiled.program.main
    ports = {"inputs": (compiled.inputs, function.inputs), "outputs": (compiled.outputs, function.outputs)}
    for kind, (declared, values) in ports.items():
        known = {value.name: value.type for value in values}
        wrong = [p.name for p in declared if p.name not in known or known[p.name].shape != p.shape]
        wrong += sorted(known.keys() - {p.name for p in declared})
        wrong += [name for name, type_ in known.items() if type_.dtype != "fp16"]
        if wrong:
            listed = ", ".join(dict.fromkeys(wrong))
            raise ProgramError(
                f"{kind}: needs fp16 ports that are the program's own; {listed} differ. "
                "Convert inside the program, or rename them.",
                code="MIL101",
            )
    through = {v.name for v in function.outputs} & {v.name for v in function.inputs}
    if through or not function.ops:
        raise ProgramError(
            f"outputs: needs an operation before each; {', '.join(sorted(through)) or 'none'} has none, and "
            "e5rt crashes on it (ANEForge). Multiply it by 1 in the program.",
            code="MIL101",
        )


def _runtime() -> Any:
    reason = missing()
    if reason is not None:
        kind = MissingDependency if "aneforge" in reason else EnvironmentFault
        raise kind(
            f"e5rt: needs to be available; {reason}", code=None if kind is MissingDependency else "ANE202"
        )
    runtime: Any = importlib.import_module("aneforge._runtime")
    try:
        runtime._lib._ensure()
    except (RuntimeError, OSError) as fault:
        raise EnvironmentFault(
            f"e5rt: needs ANEForge's dispatch library; got {fault}. "
            "Type: xcode-select --install, then: python -m aneforge.build",
            code="ANE202",
        ) from None
    return runtime


def _version() -> str | None:
    try:
        return importlib.metadata.version("aneforge")
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(compiled: Compiled, temporary: contextlib.ExitStack) -> Path:
    """Text and weights in a folder that lives as long as the compile."""
    folder = Path(temporary.enter_context(tempfile.TemporaryDirectory(prefix="ane_trainer-")))
    (folder / TEXT_FILE).write_text(compiled.text, encoding="utf-8")
    (folder / WEIGHTS_FILE).write_bytes(compiled.weights)
    return folder


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """The lines that libraries write to the process's standard error meanwhile."""
    said: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += file.read().decode(errors="replace").split("\n")
            said[:] = [line.strip() for line in said if line.strip()]


def _compile_failed(reason: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"program: needs the engine's compiler to take it; got: {reason}. Check the chip with "
        '`ane-trainer check`, or use device="sim"; more than 128 programs in a process fail, too.',
        code="ANE206",
    )


def _after_fork() -> EnvironmentFault:
    return EnvironmentFault(
        "e5rt: needs the process that loaded the program; this one was forked from it (ANEForge: no fork "
        'after use). Start workers with the method "spawn", or fork before the first program.',
        code="ANE208",
    )
