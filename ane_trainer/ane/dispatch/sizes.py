"""Magnitudes of weights and batches in the steps compared with fp32; a step outside them is compared as well."""

from __future__ import annotations

import math

import torch

from ane_trainer.ane.capture.trace.torch_private import pytree

#: A largest entry this many times beyond those so far, or below them, is of another size.
FAR = 8.0
#: A batch that far from the first is compared whenever it is this many times beyond those so far.
FURTHER = 1.1


class Sizes:
    """The least and largest of the largest entries of each tensor so far."""

    def __init__(self) -> None:
        self._ends: dict[str, tuple[float, float]] = {}
        self._first: dict[str, float] = {}

    def unlike(self, model: torch.nn.Module | None, batch: object) -> bool:
        """Whether a tensor of the batch, or a parameter if the model is given, has another size; it then counts.

        batch: tensors in whatever holds them; whole numbers, sparse ones, and what is 0 or not finite are left out.
        """
        leaves = {str(number): leaf for number, leaf in enumerate(pytree.tree_leaves(batch))}
        found = [self._is_far(name, value, FURTHER) for name, value in leaves.items()]
        if model is not None:
            found += [self._is_far(name, value, FAR) for name, value in model.named_parameters()]
        return any(found)

    def _is_far(self, name: str, value: object, further: float) -> bool:
        """Whether it is `FAR` from its first size, and `further` times beyond all that counted."""
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or not value.numel():
            return False
        if not value.is_floating_point():
            return False
        size = float(value.detach().abs().amax())
        if not 0.0 < size < math.inf:
            return False
        low, high = self._ends.get(name, (size, size))
        first = self._first.setdefault(name, size)
        far = size > max(FAR * first, further * high) or size < min(first / FAR, low / further)
        if far or name not in self._ends:
            self._ends[name] = min(low, size), max(high, size)
        return far
