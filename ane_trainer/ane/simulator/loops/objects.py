"""Machine code of the simulator's loops, kept on disk: a program seen before is not optimized and compiled again.

A file is named by the SHA-256 of the IR, the processor and its features, LLVM's version and the options, and begins
with the SHA-256 of what follows: the functions' signatures as one line of JSON, then the object file. The folder is
bounded: what was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import platformdirs

from ane_trainer.utils import added

#: Bytes that the folder may hold.
LIMIT = 256 * 1024**2
#: IR that holds addresses of this process is of no use to another.
_OF_THIS_PROCESS = "inttoptr i64"

#: Names of the result's type and of the parameters' types, by function.
Signatures = Mapping[str, tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class MachineCode:
    """An object file, and the signatures of its functions."""

    data: bytes
    signatures: Signatures


def folder() -> Path:
    """Where machine code is kept."""
    return Path(platformdirs.user_cache_dir("ane_trainer")) / "code"


def key_of(ir_text: str, names: Sequence[str], options: str) -> str | None:
    """The name of a module's machine code; None for what is not kept."""
    if _OF_THIS_PROCESS in ir_text:
        return None
    machine = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), llvm.get_process_triple())
    version = (llvmlite.__version__, *llvm.llvm_version_info)
    content = "\0".join([ir_text, *names, options, *machine, *map(str, version)])
    return hashlib.sha256(content.encode()).hexdigest()


def load(key: str | None) -> MachineCode | None:
    """The machine code of that name; None if there is none. A damaged file is left out with a warning, and goes."""
    path = folder() / (key or "none")
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError("its checksum differs")
        line, _, data = content[32:].partition(b"\n")
        found = MachineCode(data, {name: (result, args) for name, (result, args) in json.loads(line).items()})
    except ValueError as error:
        warnings.warn(f"{path}: is left out, and compiled again: {error}.", stacklevel=2)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    with contextlib.suppress(OSError):
        path.touch()
    return found


def store(key: str | None, code: MachineCode) -> None:
    """Keep machine code, as far as the place can be written."""
    if key is None:
        return
    line = json.dumps(code.signatures).encode() + b"\n"
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{key[:16]}.", dir=folder())
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(line + code.data).digest() + line + code.data)
        os.replace(name, folder() / key)
        added(folder(), len(line) + len(code.data), LIMIT)
