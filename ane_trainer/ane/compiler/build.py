"""Build what a device loads from a captured graph: MIL text and weight blob, with a fingerprint and a cache on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from ane_trainer.ane.compiler.blocks import Division
from ane_trainer.ane.compiler.constants import hold_weights
from ane_trainer.ane.compiler.legalize import legalize, rewritten
from ane_trainer.ane.compiler.lower import lower
from ane_trainer.ane.mil.program import Op
from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.ane.stages import Captured, Chain, Compiled, Legalized, Lowered
from ane_trainer.utils import added

TEXT_FILE = "model.mil"
WEIGHTS_FILE = "weights.bin"
#: Bytes that the cache may hold; what was not used for longest goes first.
LIMIT = 1 << 30


def compile_program(legalized: Legalized, *, cache: bool = True) -> Compiled:
    """Print the program and put it into the cache; a program that is there already is not written again.

    A cache that cannot be written is left out (`folder` is None): the program runs from memory as well.
    """
    text, weights = print_program(legalized.lowered.program)
    fingerprint = hashlib.sha256(text.encode() + b"\0" + weights).hexdigest()
    folder = _store(cache_folder() / fingerprint, text, weights) if cache else None
    return Compiled(legalized, text, weights, fingerprint, folder)


def cache_folder() -> Path:
    """Where compiled programs are kept, one folder per fingerprint."""
    return Path(platformdirs.user_cache_dir("ane_trainer")) / "programs"


def _store(folder: Path, text: str, weights: bytes) -> Path | None:
    """Write both files so that a reader sees the whole folder or none; None if the place is not writable."""
    if _holds(folder, text, weights):
        with contextlib.suppress(OSError):
            os.utime(folder)  # used again: it goes last
        return folder
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
        (scratch / TEXT_FILE).write_text(text, encoding="utf-8")
        (scratch / WEIGHTS_FILE).write_bytes(weights)
        if folder.exists():  # damaged: its name is the hash of what it should hold
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except OSError:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        return folder if _holds(folder, text, weights) else None  # another process may have been faster
    added(folder.parent, len(text) + len(weights), LIMIT, keep=folder)
    return folder


def _holds(folder: Path, text: str, weights: bytes) -> bool:
    with contextlib.suppress(OSError):
        stored = (folder / TEXT_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
        return stored == (text.encode(), weights)
    return False


def prepare(
    captured: Captured,
    chip: str,
    path: str,
    precision: str,
    division: Division | None = None,
    held: Mapping[str, Op] | None = None,
) -> Compiled:
    """Lower, legalize and compile; in the programs that `division` chooses.

    `held`: weights by target that the program holds, as the ops that decode them.

    A program in single precision never reaches an engine, which computes in fp16: no chip's limits bind it.
    Raises: UnsupportedModel for ops without a rule, and for what the chip refuses (fp16).
    """
    lowered = hold_weights(lower(captured, dtype=precision), held or {})
    if division is not None and (division.wish != "off" or division.checkpoint) and precision != "fp32":
        lowered = rewritten(lowered, chip, path)  # what is divided has the length that it will have
    lowered = lowered if division is None else division.again(lowered)
    divided = None if division is None else division.of(lowered, chip, path)
    if divided is None:
        return _compiled(lowered, chip, path, precision)
    programs = tuple(_compiled(each, chip, path, precision) for each in divided.programs)
    return _together(lowered, Chain(programs, tuple(divided.dispatches), divided.reason))


def whole(compiled: Compiled) -> Compiled:
    """A step in several programs as the one that it is: for files and people, not checked against the chip."""
    if compiled.chain is None:
        return compiled
    return compile_program(compiled.legalized, cache=False)


def _compiled(lowered: Lowered, chip: str, path: str, precision: str) -> Compiled:
    legal = Legalized(lowered, chip, path) if precision == "fp32" else legalize(lowered, chip, path)
    return compile_program(legal)


def _together(lowered: Lowered, chain: Chain) -> Compiled:
    """A step in several programs as one value."""
    first = chain.programs[0].legalized
    notes = tuple(dict.fromkeys(note for each in chain.programs for note in each.legalized.notes))
    legal = Legalized(lowered, first.chip, first.path, notes)
    names = [each.fingerprint for each in chain.programs]
    digest = hashlib.sha256(repr((names, chain.dispatches)).encode())
    text = "\n".join(
        f"// program {i} of {len(names)}: {_titles(chain, i)}\n{each.text}"
        for i, each in enumerate(chain.programs)
    )
    return Compiled(legal, text, b"", digest.hexdigest(), chain=chain)


def _titles(chain: Chain, number: int) -> str:
    return ", ".join(each.title for each in chain.dispatches if each.program == number)
