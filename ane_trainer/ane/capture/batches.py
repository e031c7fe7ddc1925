"""A batch or an output as nested tuples, lists and dicts: tensors are ports, everything else is compiled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ane_trainer.ane.capture.trace.torch_private import pytree


@dataclass(frozen=True)
class Structure:
    """How the leaves are nested, and those that are no tensors (by their number among all leaves)."""

    spec: Any
    constants: tuple[tuple[int, object], ...] = field(default=())

    @staticmethod
    def of(example: object) -> Structure:
        """The structure of `example`, with None, numbers, strings and other things that are no tensors."""
        leaves, spec = pytree.tree_flatten(example)
        others = [(i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)]
        return Structure(spec, tuple(others))

    def filled(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The structure with these tensors in order."""
        leaves: list[object] = list(tensors)
        for number, value in self.constants:
            leaves.insert(number, value)
        return pytree.tree_unflatten(leaves, self.spec)

    def differing(self, other: object) -> list[tuple[object, object]]:
        """(own, other's) for every leaf of `other` that is no tensor and not what was compiled in."""
        leaves = pytree.tree_leaves(other)
        pairs = [(value, leaves[i] if i < len(leaves) else None) for i, value in self.constants]
        return [(mine, theirs) for mine, theirs in pairs if not _same(mine, theirs)]


def tensors_of(part: object) -> list[torch.Tensor]:
    """The tensors of a structure in order."""
    return [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor)]


def program_form(part: object) -> Any:
    """A structure with its tensors as a program takes them: dense, floats in single precision."""
    return pytree.tree_map(lambda leaf: plain_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, part)


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in memory order without gaps: sparse ones made dense, floats of other precisions in single."""
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.float() if dense.is_floating_point() else dense


def _same(mine: object, theirs: object) -> bool:
    if mine is theirs:
        return True
    return type(mine) is type(theirs) and bool(mine == theirs)
