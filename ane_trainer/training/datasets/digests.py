"""Hashes of many files, each read once: a file of the same size and time of change is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs

from ane_trainer.ane.errors import DataError
from ane_trainer.utils import added, atomic_write

#: Bytes of files that are read at most; of more, those of evenly spaced files.
WHOLE = 8 << 30
#: Bytes that the hashes of all sets of files may take on disk.
KEPT = 64 << 20
#: A file that was changed less than so many nanoseconds ago is read again: it may be written to within one tick.
_RECENT = 2_000_000_000

Known = dict[str, tuple[int, int, str]]  # path -> size, time of change, hash


def digest_of(paths: Sequence[Path]) -> bytes:
    """A hash of the files' sizes and bytes, in order: of all bytes up to WHOLE, beyond that of evenly spaced files.

    DataError DATA115 for a file that cannot be read.
    """
    names = [os.path.abspath(path) for path in paths]
    try:
        stats = [os.stat(name) for name in names]
        step = -(-sum(stat.st_size for stat in stats) // WHOLE) or 1
        key = hashlib.blake2b("\0".join(names).encode(errors="surrogateescape"), digest_size=16)
        place = folder() / key.hexdigest()
        known, now = _read(place), time.time_ns()
        marks = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        new = [k for k in range(0, len(names), step) if known.get(names[k], (0, 0, ""))[:2] != marks[k]]
        with ThreadPoolExecutor(4) as pool:
            for k, found in zip(new, pool.map(lambda k: _of_file(names[k]), new), strict=True):
                known[names[k]] = (*marks[k], found)
    except OSError as error:
        text = f"{error.filename}: needs a file that can be read; {error.strerror or error}. Take it out or mend it."
        raise DataError(text, code="DATA115") from None
    whole = hashlib.blake2b(digest_size=16)
    for k, name in enumerate(names):
        whole.update(f"{marks[k][0]} {known[name][2] if k % step == 0 else ''}\n".encode())
    if new:
        _write(place, {name: entry for name, entry in known.items() if now - entry[1] > _RECENT})
    return whole.digest()


def _of_file(name: str) -> str:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def folder() -> Path:
    """Where the hashes are kept."""
    return Path(platformdirs.user_cache_dir("ane_trainer")) / "digests"


def _read(place: Path) -> Known:
    """What is known of files; nothing where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        found = json.loads(place.read_bytes())
        return {name: (int(size), int(mark), str(text)) for name, (size, mark, text) in found.items()}
    return {}


def _write(place: Path, known: Known) -> None:
    """Keep what is known for the next time, if there is a place for it."""
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps(known).encode()
        atomic_write(place, data)
        added(place.parent, len(data), KEPT, place)
