"""Norms that cannot leave fp16: each row is scaled near 1 by a power of two before it is squared.

    before: `r = rsqrt(mean(c * c) + eps); y = c * r`
    after:  `d = c * s; r = rsqrt(mean(d * d) + eps * s * s); y = d * r`, s = 2^-10, 2^-4, 1 or 2^9 by the row's max |c|

A square leaves fp16 from 256 on and vanishes below 2^-12; entries of one activation differ by more than both together
(SmolLM2's residual stream: 24,370 in one row, 1 in the others), so that no power for all rows helps. Powers of two are
exact: a row of ordinary size has the same bits as before. What follows is computed on the scaled numbers and carries
the power beside them (`Scaled`), so that y and its gradient need the true root nowhere.

Where: every square under a sum or mean whose root is taken (Layer, RMS, Batch, Group and InstanceNorm, std, normalize,
vector norms), written out or fused, forward and backward. Tests: `tests/ane/capture/range/test_rows.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.carried import COMPARISONS, Carried
from ane_trainer.ane.capture.range.editing import (
    aten,
    dims_of,
    in_update,
    is_float,
    keeps_dims,
    number,
    padded,
    shape_of,
)
from ane_trainer.ane.capture.range.norms import (
    REDUCTIONS,
    centred,
    epsilon,
    euclidean,
    is_square,
    norm_axes,
    share_centred,
    squared,
)
from ane_trainer.ane.capture.range.scaled import Scaled, joined, times
from ane_trainer.ane.capture.range.switch import NORMS, is_allowed, note
from ane_trainer.ane.capture.trace.simplify import drop_dead
from ane_trainer.ane.capture.trace.sources import META_KEY

#: A row whose largest entry is above the first is scaled by the second; the squares then stay below 2^12. Two steps,
#: so that the root of what is left is never far below 1: a gradient is divided by it before it is scaled back.
LARGE, DOWN = 2.0**6, 2.0**-4
HUGE, FAR_DOWN = 2.0**10, 2.0**-10
#: The same for rows below; their squares would be subnormal.
SMALL, UP = 2.0**-4, 2.0**9
#: A third step for norms without an epsilon to speak of.
LEAST, FAR_UP = 2.0**-13, 2.0**15
#: From here on epsilon, scaled like the squares, decides before the third step (the second step) matters.
EPSILON_OF_LEAST, EPSILON_OF_SMALL = 2.0**-34, 2.0**-4

#: Meta key of squares that are scaled already: a graph may come twice (before and after it is partitioned).
DONE = "ane_rows"


def scale_rows(graph: Graph) -> int:
    """Rewrite all norms of a graph in place; returns their number."""
    if not is_allowed(NORMS):
        return 0
    share_centred(graph)
    rows = Rows(graph)
    for node in list(graph.nodes):
        if node.op in ("call_function", "output") and not in_update(node):
            rows.visit(node)
        elif node.op in ("call_function", "output"):
            rows.settle(node)
    for scale, _ in rows.families:
        note(
            NORMS, str(scale.meta.get(META_KEY, scale.name)), "norm",
            "each row times 2^-10, 2^-4, 1 or 2^9 by its largest entry, before it is squared",
            "a square leaves fp16 from 256 on and vanishes below 2^-12",
        )  # fmt: skip
    if rows.families:
        drop_dead(graph)
    return len(rows.families)


class Rows(Carried):
    """One walk over a graph: `twins` are scaled copies beside the original."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.twins: dict[Node, Scaled] = {}
        self._settled: dict[Node, Node] = {}
        self._sources: dict[Node, int] = {}
        self._by_row: dict[tuple[Node, tuple[int, ...]], int] = {}

    def visit(self, node: Node) -> None:
        """Rewrite one node where it starts a norm or takes scaled values."""
        self.here = node
        if euclidean(node):
            self._replace(node, self._vector_norm(node))
            return
        square = None if node.meta.get(DONE) else squared(node)
        axes = None if square is None else norm_axes(node)
        if square is not None and axes is not None:
            twin = self._twin(square, axes, epsilon(node))
            product = self.emit(aten.mul.Tensor, twin.node, twin.node)
            product.meta[DONE] = True
            self._replace(node, Scaled(product, times(twin.powers, 2)))
            return
        rule = _RULES.get(cast("Callable[..., object]", node.target))
        if (rule is not None and is_float(node)) or str(node.target) in COMPARISONS:
            result = (rule or Carried.compare)(self, node)
            if result is not None:
                self._replace(node, result)
                return
        self.settle(node)

    def settle(self, node: Node) -> None:
        """Give the node the true values of its scaled arguments."""
        self.here = node
        for argument in node.all_input_nodes:
            if argument in self.values:
                node.replace_input_with(argument, self._true_of(argument))

    def _true_of(self, node: Node) -> Node:
        """The value itself of a node; what made it may have left fp16 where only its scaled form is read."""
        if node in self.values and node not in self._settled:
            self._settled[node] = self.true(self.values[node])
        return self._settled.get(node, node)

    def _replace(self, node: Node, value: Scaled) -> None:
        if value.plain:
            node.replace_all_uses_with(value.node)
        else:
            self.values[node] = value

    # -- where scales begin

    def _twin(self, c: Node, axes: list[int], epsilon: float) -> Scaled:
        """`c` times its row scales; the rows run over `axes`."""
        c = self._true_of(c)
        family = self._by_row.get((c, tuple(axes)))
        if family is None:
            family = self._family(c, axes, epsilon)
            self._by_row[c, tuple(axes)] = family
            s = self.families[family][0]
            twin = Scaled(self.emit(aten.mul.Tensor, c, s), {family: (-1, shape_of(s))})
            self.twins[c] = twin
            source = centred(c)
            if source is not None:
                self._sources[source] = family
        return self.twins[c]

    def _family(self, c: Node, axes: list[int], epsilon: float) -> int:
        peak = self.emit(aten.amax.default, self.emit(aten.abs.default, c), axes, True)
        steps = [(aten.gt.Scalar, LARGE, DOWN), (aten.gt.Scalar, HUGE, FAR_DOWN)]
        if epsilon <= EPSILON_OF_SMALL:
            steps.append((aten.lt.Scalar, SMALL, UP))
        if epsilon <= EPSILON_OF_LEAST:
            steps.append((aten.lt.Scalar, LEAST, FAR_UP))
        tests = [(self.emit(test, peak, level), power) for test, level, power in steps]
        one = self.emit(aten.full.default, list(shape_of(peak)), 1.0)
        pair = [one, one]
        for test, power in tests:
            for place, factor in enumerate((power, 1.0 / power)):
                constant = self.emit(aten.full.default, list(shape_of(peak)), factor)
                pair[place] = self.emit(aten.where.self, test, constant, pair[place])
        self.families.append((pair[0], pair[1]))
        return len(self.families) - 1

    def _vector_norm(self, node: Node) -> Scaled:
        """`norm(x)` as the root of a mean of squares."""
        x = cast("Node", node.args[0])
        rank = len(shape_of(x))
        given = node.args[2] if len(node.args) > 2 else None
        some = [given] if isinstance(given, int) else given
        axes = sorted(a % rank for a in cast("list[int]", some)) if some else list(range(rank))
        twin = self._twin(x, axes, 0.0)
        square = self.emit(aten.mul.Tensor, twin.node, twin.node)
        square.meta[DONE] = True
        keep = bool(node.args[3]) if len(node.args) > 3 else False
        count = math.prod(shape_of(x)[a] for a in axes)
        mean = self.emit(aten.mean.dim, square, axes, keep)
        total = self.sum_of_mean(mean, Scaled(square, times(twin.powers, 2)), count, shape_of(node))
        return self._root(aten.sqrt.default, total)

    # -- where factors join

    def _product(self, node: Node) -> Scaled | None:
        """mul and div: factors join; a plain operand gives way to its twin where that cancels a factor."""
        sign = -1 if node.target in (aten.div.Tensor, aten.div.Scalar) else 1
        target = cast("Callable[..., object]", node.target)
        a, b = self.operand(node.args[0]), self.operand(node.args[1])
        if a is not None and b is not None and sign == 1:
            a, b = self._cubes(a, b)
        if a is None or b is None or len(node.args) > 2 or node.kwargs:
            single = a or b
            if single is None or len(node.args) > 2 or node.kwargs:
                return None
            return self._by_number(node, single, a is not None)
        a, b = self._twinned(a, b, sign), self._twinned(b, a, sign) if sign == 1 else b
        if a.plain and b.plain:
            a, b = self._for_reduction(node, a, b, sign)
        if a.plain and b.plain:
            return None
        powers = joined(a.powers, times(b.powers, sign))
        if powers is None:
            return None
        return Scaled(self.emit(target, a.node, b.node), powers, a.gain * b.gain**sign)

    def _cubes(self, a: Scaled, b: Scaled) -> tuple[Scaled, Scaled]:
        """`g * r^3` as `((g * r) * r) * r`: the cube of a root may leave fp16 where the product does not."""
        for cube, other in ((a, b), (b, a)):
            if (
                cube.plain
                or cube.node.target is not aten.pow.Tensor_Scalar
                or number(cube.node.args[1]) != 3.0
            ):
                continue
            root, value = cast("Node", cube.node.args[0]), other.node
            for _ in range(2):
                value = self.emit(aten.mul.Tensor, value, root)
            powers = {f: (p // 3, shape) for f, (p, shape) in cube.powers.items()}
            both = joined(other.powers, times(powers, 2))
            if both is not None:
                return Scaled(value, both, other.gain * cube.gain), Scaled(root, powers)
        return a, b

    def _by_number(self, node: Node, value: Scaled, first: bool) -> Scaled | None:
        """A product with a number, or a quotient by one; twins are carried along."""
        source = node.args[0] if first else node.args[1]
        target = cast("Callable[..., object]", node.target)
        if isinstance(source, Node) and source in self.twins and first:
            twin = self.twins[source]
            self.twins[node] = twin.on(self.emit(target, twin.node, node.args[1]))
        if value.plain or (not first and node.target is aten.div.Tensor):
            return None
        return value.on(self.emit(target, value.node, node.args[1 if first else 0]))

    def _twinned(self, x: Scaled, other: Scaled, sign: int) -> Scaled:
        """x's twin if a factor of `other` cancels it; `x` of a scaled `x - mean(x)` gets one here."""
        family = self._sources.get(x.node) if x.plain else None
        if family is not None and family in other.powers and x.node not in self.twins:
            shape = shape_of(self.families[family][0])
            s = self.scale(family, shape, False)
            self.twins[x.node] = Scaled(self.emit(aten.mul.Tensor, x.node, s), {family: (-1, shape)})
        twin = self.twins.get(x.node) if x.plain else None
        if twin is None:
            return x
        cancels = any(f in other.powers and sign * other.powers[f][0] > 0 for f in twin.powers)
        return twin if cancels else x

    def _for_reduction(self, node: Node, a: Scaled, b: Scaled, sign: int) -> tuple[Scaled, Scaled]:
        """The twin of one operand where only reductions over its rows use the product: the sum of g * x."""
        users = list(node.users)
        for number_of, x in enumerate((a, b)):
            twin = self.twins.get(x.node)
            if twin is None or not users or (number_of and sign < 0):
                continue
            rank, shapes = len(shape_of(node)), [shape for _, shape in twin.powers.values()]
            within = (
                u.target in REDUCTIONS
                and all(padded(s, rank)[d] == 1 for s in shapes for d in dims_of(u) or ())
                for u in users
            )
            if all(within) and a.node is b.node and sign > 0:
                return twin, twin
            if all(within):
                return (twin, b) if number_of == 0 else (a, twin)
        return a, b

    def _total(self, node: Node) -> Scaled | None:
        """sum and mean over axes along which the factors do not change."""
        value = self.values.get(cast("Node", node.args[0]))
        axes = dims_of(node)
        if value is None or axes is None:
            return None
        rank = len(shape_of(value.node))
        powers = {}
        for family, (power, shape) in value.powers.items():
            whole = padded(shape, rank)
            if any(whole[a] != 1 for a in axes):
                return None
            left = whole if keeps_dims(node) else tuple(n for i, n in enumerate(whole) if i not in axes)
            powers[family] = (power, left)
        count = math.prod(shape_of(value.node)[a] for a in axes)
        squares = node.target in (aten.sum.default, aten.sum.dim_IntList) and is_square(value.node)
        if squares:
            mean = self.emit(aten.mean.dim, value.node, axes, keeps_dims(node))
            total = self.sum_of_mean(mean, value, count, ())
            return Scaled(total.node, powers, total.gain)
        target = cast("Callable[..., object]", node.target)
        return Scaled(self.emit(target, value.node, *node.args[1:]), powers, value.gain)

    def _sum(self, node: Node) -> Scaled | None:
        """add and sub: equal factors stay outside; an epsilon is divided by them."""
        target = cast("Callable[..., object]", node.target)
        if len(node.args) > 2 or node.kwargs:
            return None
        a, b = self.operand(node.args[0]), self.operand(node.args[1])
        if a is not None and b is not None:
            if a.plain and b.plain:
                return None
            if a.like(b):
                return a.on(self.emit(target, a.node, b.node))
            return None
        value, other = (a, node.args[1]) if a is not None else (b, node.args[0])
        constant = number(other)
        if value is None or value.plain or constant is None or a is None:
            return None
        shift = self.shrunk(value, constant)
        if shift is None:
            return None
        return value.on(self.emit(_TENSOR[str(node.target)], value.node, shift))

    def _root_rule(self, node: Node) -> Scaled | None:
        source = cast("Node", node.args[0])
        value, target = self.values.get(source), cast("Callable[..., object]", node.target)
        if node.target is aten.pow.Tensor_Scalar:
            exponent = number(node.args[1])
            if exponent == 1.0:
                node.replace_all_uses_with(source)
                return None
            if exponent not in (0.5, -0.5):
                return self.power(node)
            target = aten.sqrt.default if exponent == 0.5 else aten.rsqrt.default
        if value is None or any(power % 2 for power, _ in value.powers.values()):
            return None
        return self._root(target, value)

    def _root(self, target: Callable[..., object], value: Scaled) -> Scaled:
        sign = 1 if target is aten.sqrt.default else -1
        powers = {f: (sign * p // 2, shape) for f, (p, shape) in value.powers.items()}
        return Scaled(self.emit(target, value.node), powers, value.gain ** (0.5 * sign))


_TENSOR = {
    f"aten.{name}.{kind}": getattr(aten, name).Tensor
    for name in ("add", "sub")
    for kind in ("Tensor", "Scalar")
}
_RULES: dict[Callable[..., object], Callable[[Rows, Node], Scaled | None]] = {
    aten.mul.Tensor: Rows._product,
    aten.mul.Scalar: Rows._product,
    aten.div.Tensor: Rows._product,
    aten.div.Scalar: Rows._product,
    aten.add.Tensor: Rows._sum,
    aten.add.Scalar: Rows._sum,
    aten.sub.Tensor: Rows._sum,
    aten.sub.Scalar: Rows._sum,
    aten.sqrt.default: Rows._root_rule,
    aten.rsqrt.default: Rows._root_rule,
    aten.pow.Tensor_Scalar: Rows._root_rule,
    aten.reciprocal.default: Carried.power,
    aten.neg.default: Carried.same,
    aten.alias.default: Carried.same,
    aten.expand.default: Carried.same,
    aten.view.default: Carried.reshaped,
    aten.unsqueeze.default: Carried.reshaped,
    aten.squeeze.dim: Carried.reshaped,
    aten.squeeze.dims: Carried.reshaped,
    aten.clamp.default: Carried.bounded,
    aten.clamp_min.default: Carried.bounded,
    aten.where.self: Carried.chosen,
    **dict.fromkeys(REDUCTIONS, Rows._total),
}
