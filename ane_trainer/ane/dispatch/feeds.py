"""Batches on their way to the engine: checked, and converted to the program's precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from ane_trainer.ane.capture.step import batch_ports
from ane_trainer.ane.errors import DataError
from ane_trainer.ane.lower.integers import coded, most_rows
from ane_trainer.ane.stages import Port


@dataclass(frozen=True)
class Range:
    """A float type: its name, its largest number, and the integer up to which all are exact."""

    name: str
    dtype: torch.dtype
    numpy: type[np.float16] | type[np.float32]
    largest: float
    largest_integer: int


RANGES = {
    "fp16": Range("fp16", torch.float16, np.float16, 65504.0, 2048),
    "fp32": Range("fp32", torch.float32, np.float32, float(np.finfo(np.float32).max), 2**24),
}


@dataclass(frozen=True)
class Slot:
    """One tensor of the batch: its place in the user's structure, its port (None: not used) and shape."""

    place: str
    port: str | None
    shape: tuple[int, ...]
    wide: bool = False


class Feeds:
    """Turns (x, y), or x alone, into the arrays of a program's batch ports."""

    def __init__(
        self, example: Sequence[Any], names: Sequence[str], inputs: Sequence[Port], precision: str = "fp16"
    ) -> None:
        self._range = RANGES[precision]
        ports = {port.target: port.name for port in inputs if port.role == "batch"}
        wide = {port.target for port in inputs if port.wide}
        self._parts = []
        for part, name in zip(example, names, strict=True):
            leaves = [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor)]
            wanted = batch_ports(part, name)
            slots = [
                Slot(p.target, ports.get(p.target), tuple(t.shape), p.target in wide)
                for p, t in zip(wanted, leaves, strict=True)
            ]
            self._parts.append((name, slots))

    def __call__(self, *batch: Any) -> dict[str, NDArray[Any]]:
        """Arrays of the program's precision by port name.

        Raises: DataError for another structure or shape, for values that are not finite or beyond the
        precision's range, and for integers that it does not hold exactly.
        """
        feeds: dict[str, NDArray[Any]] = {}
        for (name, slots), part in zip(self._parts, batch, strict=True):
            leaves = [part] if isinstance(part, torch.Tensor) else _tensors(part)
            if len(leaves) != len(slots):
                raise DataError(
                    f"{name}: needs {len(slots)} tensors like the example; got {len(leaves)}. "
                    "Pass batches of one structure.",
                    code="DATA105",
                )
            for slot, leaf in zip(slots, leaves, strict=True):
                if tuple(leaf.shape) != slot.shape:
                    raise _wrong_shape(slot, leaf)
                if slot.port is not None:
                    feeds[slot.port] = to_float(slot, leaf, self._range)
        return feeds


def _tensors(part: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor)]


def _wrong_shape(slot: Slot, leaf: torch.Tensor) -> DataError:
    return DataError(
        f"{slot.place}: needs the shape {list(slot.shape)} that the program was compiled for; got "
        f"{list(leaf.shape)}. Drop the last, smaller batch, or compile a program for this shape.",
        code="DATA105",
    )


def to_float(slot: Slot, leaf: torch.Tensor, limits: Range) -> NDArray[Any]:
    """The tensor as a contiguous array (rounded ties to even, as a host converts); rank 0 becomes [1]."""
    leaf = leaf.detach()
    if leaf.numel() and leaf.dtype != torch.bool:
        low, high = torch.aminmax(leaf)
        largest = max(-float(low), float(high))  # nan if any entry is
        if leaf.is_floating_point() and not largest <= limits.largest:
            raise _not_representable(slot, leaf, largest, limits)
        if slot.wide and limits.largest_integer < largest < most_rows(limits.name) and float(low) >= -2048:
            leaf = coded(leaf)
        elif not leaf.is_floating_point() and largest > limits.largest_integer:
            raise DataError(
                f"{slot.place}: needs integers up to {limits.largest_integer} "
                f"({limits.name} holds no larger ones exactly); "
                f"got {largest:g}. Use fewer classes or a smaller vocabulary.",
                code="DATA107",
            )
    array: NDArray[Any] = leaf.to("cpu", limits.dtype).contiguous().numpy()
    return array.reshape(slot.shape or (1,))


def _not_representable(slot: Slot, leaf: torch.Tensor, largest: float, limits: Range) -> DataError:
    finite = torch.isfinite(leaf)
    if bool(finite.all()):
        need, got = f"magnitudes up to {limits.largest:g} ({limits.name})", f"{largest:g}"
        fix = "Normalise the data."
    else:
        wrong = int(leaf.numel() - finite.sum())
        need, got, fix = "finite numbers", f"{wrong} that are nan or inf", "Clean the data."
    return DataError(f"{slot.place}: needs {need}; got {got}. {fix}", code="DATA106")
