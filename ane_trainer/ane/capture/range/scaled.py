"""Values that are carried as a node times powers of row scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from ane_trainer.ane.capture.range.editing import Shape, padded

#: Family of row scales -> the power of its scales in a value, and their shape beside it.
Powers = Mapping[int, tuple[int, Shape]]


@dataclass(frozen=True)
class Scaled:
    """A value as `node * gain * s^power` for each family of row scales s; the shape is that of s beside the value."""

    node: Node
    powers: Powers = field(default_factory=dict)
    gain: float = 1.0

    @property
    def plain(self) -> bool:
        return not self.powers and self.gain == 1.0

    def on(self, node: Node) -> Scaled:
        """The same factors on another node."""
        return Scaled(node, self.powers, self.gain)

    def like(self, other: Scaled) -> bool:
        """Whether the factors are the same."""
        return self.powers == other.powers and self.gain == other.gain


def joined(a: Powers, b: Powers) -> dict[int, tuple[int, Shape]] | None:
    """The factors of a product; None where one family has two shapes that do not match."""
    powers = dict(a)
    for family, (power, shape) in b.items():
        old, at = powers.pop(family, (0, shape))
        if padded(at, len(shape)) != padded(shape, len(at)):
            return None
        if old + power:
            powers[family] = (old + power, max(at, shape, key=len))
    return powers


def times(powers: Powers, factor: int) -> dict[int, tuple[int, Shape]]:
    """The factors to a power."""
    return {f: (p * factor, shape) for f, (p, shape) in powers.items()}
