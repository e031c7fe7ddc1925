"""Batches on their way to the engine: checked, and converted to fp16."""

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
from ane_trainer.ane.stages import Port

LARGEST_FP16 = 65504.0
#: Integers up to this magnitude are exact in fp16.
LARGEST_INTEGER = 2048


@dataclass(frozen=True)
class Slot:
    """One tensor of the batch: its place in the user's structure, its port (None: not used) and shape."""

    place: str
    port: str | None
    shape: tuple[int, ...]


class Feeds:
    """Turns (x, y), or x alone, into the arrays of a program's batch ports."""

    def __init__(self, example: Sequence[Any], names: Sequence[str], inputs: Sequence[Port]) -> None:
        ports = {port.target: port.name for port in inputs if port.role == "batch"}
        self._parts = []
        for part, name in zip(example, names, strict=True):
            leaves = [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor)]
            wanted = batch_ports(part, name)
            slots = [
                Slot(p.target, ports.get(p.target), tuple(t.shape))
                for p, t in zip(wanted, leaves, strict=True)
            ]
            self._parts.append((name, slots))

    def __call__(self, *batch: Any) -> dict[str, NDArray[np.float16]]:
        """float16 arrays by port name.

        Raises: DataError for another structure or shape, for values that are not finite or beyond fp16,
        and for integers that fp16 does not hold exactly.
        """
        feeds: dict[str, NDArray[np.float16]] = {}
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
                    feeds[slot.port] = _to_half(slot, leaf)
        return feeds


def _tensors(part: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor)]


def _wrong_shape(slot: Slot, leaf: torch.Tensor) -> DataError:
    return DataError(
        f"{slot.place}: needs the shape {list(slot.shape)} that the program was compiled for; got "
        f"{list(leaf.shape)}. Drop the last, smaller batch, or compile a program for this shape.",
        code="DATA105",
    )


def _to_half(slot: Slot, leaf: torch.Tensor) -> NDArray[np.float16]:
    """The tensor as contiguous float16 (ties to even, as a host converts); rank 0 becomes [1]."""
    leaf = leaf.detach()
    if leaf.numel() and leaf.dtype != torch.bool:
        largest = float(leaf.abs().amax())
        if leaf.is_floating_point() and not largest <= LARGEST_FP16:
            raise _not_representable(slot, leaf, largest)
        if not leaf.is_floating_point() and largest > LARGEST_INTEGER:
            raise DataError(
                f"{slot.place}: needs integers up to {LARGEST_INTEGER} (fp16 holds no larger ones exactly); "
                f"got {largest:g}. Use fewer classes or a smaller vocabulary.",
                code="DATA107",
            )
    half: NDArray[np.float16] = leaf.to("cpu", torch.float16).contiguous().numpy()
    return half.reshape(slot.shape or (1,))


def _not_representable(slot: Slot, leaf: torch.Tensor, largest: float) -> DataError:
    finite = torch.isfinite(leaf)
    if bool(finite.all()):
        need, got, fix = f"magnitudes up to {LARGEST_FP16:g} (fp16)", f"{largest:g}", "Normalise the data."
    else:
        wrong = int(leaf.numel() - finite.sum())
        need, got, fix = "finite numbers", f"{wrong} that are nan or inf", "Clean the data."
    return DataError(f"{slot.place}: needs {need}; got {got}. {fix}", code="DATA106")
