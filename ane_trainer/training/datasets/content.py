"""What data holds: a fingerprint, by which a run knows its data again, and a remark on data that says nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets.batches import Examples, Subset, seeded_by

#: Examples that are looked at, evenly spaced, for whether they are all alike; and of a dataset that makes its examples.
LOOKED_AT, DRAWN = 256, 64
#: Bytes of an array that are read; of a larger one, evenly spaced rows.
WHOLE = 4 << 30


def fingerprint(parts: Mapping[str, Examples]) -> str:
    """A hash over the parts by name: how many examples, which rows they are, all targets, and what they hold.

    Arrays are read whole up to WHOLE bytes. Examples that are files or windows of a text give what stands for them by
    a method `content()`. A dataset that makes its examples when they are taken is asked for DRAWN of them twice, with
    one seed; where they differ, only its targets count.
    """
    found, seen = hashlib.blake2b(digest_size=16), dict[int, bytes]()
    for name in sorted(parts):
        part, rows = parts[name], b""
        while isinstance(part, Subset):
            rows, part = rows + np.ascontiguousarray(part.rows).tobytes(), part.examples
        if id(part) not in seen:  # several parts may be rows of one
            seen[id(part)] = _content(part)
        found.update(name.encode() + rows + seen[id(part)])
    return f"2:{found.hexdigest()}"


def _content(examples: Examples) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    if hasattr(examples, "content"):
        found.update(examples.content())
        return found.digest()
    arrays = [examples.targets()]
    if not examples.draws:
        arrays.append(_whole(examples))
    elif len(examples):
        rows = _spaced(len(examples), DRAWN)
        one, other = (_drawn(examples, rows) for _ in range(2))
        arrays += [one] if np.array_equal(one, other, equal_nan=one.dtype.kind == "f") else []
    for array in arrays:
        _add(found, array)
    return found.digest()


def _whole(examples: Examples) -> Array:
    """All x in memory, or evenly spaced rows of more than WHOLE bytes."""
    x: Array | None = getattr(examples, "x", None)
    if x is None or x.nbytes > WHOLE:
        size = WHOLE // max(x.nbytes // max(len(x), 1), 1) if x is not None else LOOKED_AT
        return examples.take(_spaced(len(examples), max(size, LOOKED_AT)))[0]
    return x


def _drawn(examples: Examples, rows: NDArray[np.int64]) -> Array:
    with seeded_by([0]):
        return examples.take(rows)[0]


def _add(found: Any, array: Array) -> None:
    found.update(f"{array.shape}{array.dtype.str}".encode())
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _spaced(count: int, most: int = LOOKED_AT) -> NDArray[np.int64]:
    """Row numbers of at most so many examples."""
    return np.arange(0, count, -(-count // most))


def all_alike(examples: Examples) -> bool:
    """Whether two or more examples have the same x, as far as looked at; those that are drawn each time have not."""
    if examples.draws or len(examples) < 2:
        return False
    first, _ = examples.take(np.array([0]))
    rows = _spaced(len(examples))
    return all(bool((examples.take(rows[k : k + 1])[0] == first).all()) for k in range(len(rows)))
