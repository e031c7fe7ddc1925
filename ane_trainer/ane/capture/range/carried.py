"""Values that carry a factor per row, and the operations that preserve or transform the factors.

`rows.py` makes such values where a norm starts and joins their factors in sums and products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.editing import TINY, Editor, Shape, aten, number, shape_of
from ane_trainer.ane.capture.range.norms import is_zero
from ane_trainer.ane.capture.range.scaled import Scaled, times

COMPARISONS = {
    f"aten.{name}.Scalar": getattr(aten, name).Tensor for name in ("ge", "gt", "le", "lt", "eq", "ne")
}


class Carried(Editor):
    """A graph's values that exist scaled only, and the factors by family: s and 1/s."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.values: dict[Node, Scaled] = {}
        self.families: list[tuple[Node, Node]] = []
        self._views: dict[tuple[int, Shape, bool], Node] = {}

    def true(self, value: Scaled) -> Node:
        """The value itself."""
        node = self.times(value.node, value.gain)
        for family, (power, shape) in value.powers.items():
            for _ in range(abs(power)):
                node = self.emit(aten.mul.Tensor, node, self.scale(family, shape, power < 0))
        return node

    def scale(self, family: int, shape: Shape, inverse: bool) -> Node:
        """The row scales, or their inverses, in this shape."""
        key = family, shape, inverse
        if key not in self._views:
            self._views[key] = self.view(self.families[family][inverse], shape)
        return self._views[key]

    def operand(self, argument: object) -> Scaled | None:
        """A node argument as a scaled value; None for numbers."""
        if not isinstance(argument, Node):
            return None
        return self.values.get(argument) or Scaled(argument)

    def sum_of_mean(self, mean: Node, value: Scaled, count: int, shape: Shape) -> Scaled:
        """n times a mean; the powers of four in n stay beside it."""
        gain = 4.0 ** ((count.bit_length() - 1) // 2)
        powers = {f: (p, shape) for f, (p, _) in value.powers.items()}
        return Scaled(self.times(mean, count / gain), powers, value.gain * gain)

    def shrunk(self, value: Scaled, constant: float) -> Node | float | None:
        """A constant in the value's factors; None where that would be a quotient by small scales."""
        constant /= value.gain
        if not value.powers:
            return constant
        if any(power > 0 for power, _ in value.powers.values()):
            return None
        scales = [
            self.scale(f, shape, False) for f, (power, shape) in value.powers.items() for _ in range(-power)
        ]
        self.marks = {TINY: True}
        node = self.times(scales[0], constant)
        for s in scales[1:]:
            node = self.emit(aten.mul.Tensor, node, s)
        self.marks = {}
        return node

    def power(self, node: Node) -> Scaled | None:
        """An integer power; -1 is `reciprocal`."""
        source = cast("Node", node.args[0])
        exponent = -1.0 if node.target is aten.reciprocal.default else number(node.args[1])
        value = self.values.get(source)
        if value is None or exponent is None or exponent != int(exponent):
            return None
        count = math.prod(shape_of(value.node))
        if exponent == 2.0 and any(p > 0 and math.prod(shape) < count for p, shape in value.powers.values()):
            return None  # a quotient by a scaled root, whose square would be subnormal
        result = self.emit(cast("Callable[..., object]", node.target), value.node, *node.args[1:])
        return Scaled(result, times(value.powers, int(exponent)), value.gain**exponent)

    def same(self, node: Node) -> Scaled | None:
        """Operations that commute with positive factors, element by element."""
        value = self.values.get(cast("Node", node.args[0]))
        if value is None:
            return None
        return value.on(self.emit(cast("Callable[..., object]", node.target), value.node, *node.args[1:]))

    def reshaped(self, node: Node) -> Scaled | None:
        """Views of a value that has one entry a row: the factors take the same shape."""
        value = self.values.get(cast("Node", node.args[0]))
        if value is None or node.kwargs:
            return None
        count = math.prod(shape_of(value.node))
        if any(math.prod(shape) != count for _, shape in value.powers.values()):
            return None
        result = self.view(value.node, shape_of(node))
        return Scaled(result, {f: (p, shape_of(node)) for f, (p, _) in value.powers.items()}, value.gain)

    def bounded(self, node: Node) -> Scaled | None:
        """clamp by numbers: the bounds are divided by the factors."""
        value = self.values.get(cast("Node", node.args[0]))
        if value is None or node.kwargs:
            return None
        result = value.node
        for bound, target in zip(node.args[1:], (aten.maximum.default, aten.minimum.default), strict=False):
            limit = number(bound)
            if bound is not None and limit is None:
                return None
            shrunk = None if limit is None else self.shrunk(value, limit)
            if limit is not None and not isinstance(shrunk, Node):
                return None
            result = result if shrunk is None else self.emit(target, result, shrunk)
        return value.on(result)

    def compare(self, node: Node) -> Scaled | None:
        """A comparison with a number: the number is divided by the factors."""
        value = self.values.get(cast("Node", node.args[0]))
        limit = number(node.args[1])
        if value is None or limit is None:
            return None
        if limit == 0:
            return Scaled(self.emit(cast("Callable[..., object]", node.target), value.node, 0))
        shrunk = self.shrunk(value, limit)
        if not isinstance(shrunk, Node):
            return None
        return Scaled(self.emit(COMPARISONS[str(node.target)], value.node, shrunk))

    def chosen(self, node: Node) -> Scaled | None:
        """where(test, x, 0) and where(test, 0, x)."""
        test, *sides = node.args
        found = [self.values.get(side) if isinstance(side, Node) else None for side in sides]
        if (found[0] is None) == (found[1] is None):
            return None
        place = 0 if found[0] is not None else 1
        value, other = found[place], sides[1 - place]
        if value is None or not is_zero(other):
            return None
        new = (value.node, other) if place == 0 else (other, value.node)
        return value.on(self.emit(aten.where.self, test, *new))
