"""Magnitudes of weights and batches in the steps compared with fp32; a step outside them is compared as well."""

from __future__ import annotations

import math

import torch

from ane_trainer.ane.capture.trace.torch_private import pytree

#: A largest entry this many times beyond those so far, or below them, is of another size.
FAR = 8.0


class Sizes:
    """The least and largest of the largest entries of each tensor so far."""

    def __init__(self) -> None:
        self._ends: dict[str, tuple[float, float]] = {}

    def unlike(self, model: torch.nn.Module | None, batch: object) -> bool:
        """Whether a tensor of the batch, or a parameter if the model is given, has another size; it then counts.

        batch: tensors in whatever holds them; whole numbers, sparse ones, and what is 0 or not finite are left out.
        """
        leaves = {str(number): leaf for number, leaf in enumerate(pytree.tree_leaves(batch))}
        named = leaves | (dict(model.named_parameters()) if model is not None else {})
        found = [self._is_far(name, value) for name, value in named.items()]
        return any(found)

    def _is_far(self, name: str, value: object) -> bool:
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or not value.numel():
            return False
        if not value.is_floating_point():
            return False
        size = float(value.detach().abs().amax())
        if not 0.0 < size < math.inf:
            return False
        low, high = self._ends.get(name, (size, size))
        far = size > FAR * high or size < low / FAR
        if far or name not in self._ends:
            self._ends[name] = min(low, size), max(high, size)
        return far
