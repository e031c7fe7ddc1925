"""What data holds: a fingerprint, by which a run knows its data again, and a remark on data that says nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.training.datasets.batches import Examples, Subset

#: Examples of each part that are looked at, evenly spaced; of the targets all are.
LOOKED_AT = 256


def fingerprint(parts: Mapping[str, Examples]) -> str:
    """A hash over the parts by name: how many examples, their targets, and some of them.

    Examples that are files or windows of a text give what stands for them by a method `content()`. Of examples that
    are drawn anew when taken only the targets count.
    """
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(parts):
        found.update(name.encode())
        _add(found, parts[name])
    return found.hexdigest()


def _add(found: Any, examples: Examples) -> None:
    if isinstance(examples, Subset) and hasattr(examples.examples, "content"):
        found.update(np.ascontiguousarray(examples.rows).tobytes())
        _add(found, examples.examples)
    elif hasattr(examples, "content"):
        found.update(examples.content())
    else:
        arrays = [examples.targets()]
        if not examples.draws and len(examples):
            arrays.append(examples.take(_spaced(len(examples)))[0])
        for array in arrays:
            found.update(f"{array.shape}{array.dtype.str}".encode())
            found.update(np.ascontiguousarray(array).tobytes())


def _spaced(count: int) -> NDArray[np.int64]:
    """Row numbers of at most LOOKED_AT examples."""
    return np.arange(0, count, -(-count // LOOKED_AT))


def all_alike(examples: Examples) -> bool:
    """Whether two or more examples have the same x, as far as looked at; those that are drawn anew have not."""
    if examples.draws or len(examples) < 2:
        return False
    first, _ = examples.take(np.array([0]))
    rows = _spaced(len(examples))
    return all(bool((examples.take(rows[k : k + 1])[0] == first).all()) for k in range(len(rows)))
