"""Powers of two beside values that fp16 or the accumulator would lose, chosen from the calibration.

    before: `y = matmul(x, w)`, |x| near 1e-4        after: `y = matmul(x * 2^12, w)`, and y stands for y * 2^-12
    before: `q = (o - y) ** 2`, |o - y| near 1000    after: `d = (o - y) * 2^-8; q = d * d`, and q stands for q * 2^16
    before: `p.sum()` of 131,072 numbers             after: `p.mean() * 2`, and the sum stands for its 2^16-fold
    before: `g / 131072`                             after: `g * 2^-8 * 2^-9`, no constant that fp16 rounds

Each node of the graph holds its value times 2^-e, e = 0 unless the value itself leaves the range. An exponent goes
through what is linear, joins in products, halves in roots, and is taken out where an operation needs the true value.
A graph whose values are all in range is left as it is, node by node. Tests: `test_exponents.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from ane_trainer.ane.capture.range import transcendental
from ane_trainer.ane.capture.range.bands import (
    ALIGNED,
    CONTRACTIONS,
    LARGEST,
    LINEAR,
    POWERS,
    PRODUCTS,
    SMALLEST,
    TOTALS,
    WANTED,
    reads_number,
)
from ane_trainer.ane.capture.range.calibration import INTEGERS, Magnitude
from ane_trainer.ane.capture.range.divisors import raised_divisor
from ane_trainer.ane.capture.range.editing import (
    aten,
    dims_of,
    in_update,
    is_float,
    keeps_dims,
    number,
    shape_of,
)
from ane_trainer.ane.capture.range.rows import DONE
from ane_trainer.ane.capture.range.shifting import LARGEST_SUM, Shifting
from ane_trainer.ane.capture.trace.simplify import drop_dead
from ane_trainer.ane.stages import PAIR

#: Factors that are left as they are.
LEAST_FACTOR, LARGEST_FACTOR = 2.0**-14, 2.0**15

Target = Callable[..., object]


def scale_values(
    graph: Graph,
    found: Mapping[str, Magnitude],
    fixed: Sequence[str] = (),
    held: Mapping[str, int] = MappingProxyType({}),
) -> Exponents:
    """Rewrite a graph in place; the result says which values carry which exponent.

    `fixed`: placeholders that must stay in their own units; `held`: those with a given exponent. Others may get one.
    """
    exponents = Exponents(graph, found, frozenset(fixed), held)
    for node in list(graph.nodes):
        exponents.visit(node)
    if exponents.changed:
        drop_dead(graph)
    return exponents


class Exponents(Shifting):
    """One walk over a graph. `of[node]` is the exponent of a node, 0 where it is missing."""

    def __init__(
        self, graph: Graph, found: Mapping[str, Magnitude], fixed: frozenset[str], held: Mapping[str, int]
    ) -> None:
        super().__init__(graph, found)
        self.fixed, self.held = fixed, held
        self._as_floats: dict[Node, Node] = {}

    def visit(self, node: Node) -> None:
        """Bring one node into range."""
        self.here = node
        self.follow_masks(node)
        if node.op == "call_function":
            self.follow_noise(node)
        if node.op == "placeholder":
            if node.name in self.held:
                self.note(node, self.held[node.name])
            elif node.name not in self.fixed and self.risky(node, 0):
                self.note(node, self.wanted(node, 0))
        elif node.op == "call_function":
            rule = _RULES.get(str(node.target))
            if rule is not None and is_float(node):
                self._floats(node)
            if node.target is operator.getitem:
                self.item(node)
            elif rule is not None and ((rule in _ALWAYS and not in_update(node)) or self._concerns(node)):
                rule(self, node)
            else:
                self.settle(node)

    def _concerns(self, node: Node) -> bool:
        if in_update(node):
            return any(self.of.get(a) for a in node.all_input_nodes)
        return self.risky(node, 0) or any(self.of.get(a) for a in node.all_input_nodes)

    # -- rules

    def linear(self, node: Node) -> None:
        """Operations that are linear in one argument: the exponent goes through; a result out of range shifts it."""
        source = node.args[0] if isinstance(node.args[0], Node) else None
        value = node.meta.get("val")
        if source is None or (isinstance(value, torch.Tensor) and not value.is_floating_point()):
            return self.settle(node)
        if not is_float(source):
            return None
        if in_update(node) and node.target is aten.amax.default and self.of.get(source, 0) < 0:
            self._peaks.add(node)
        natural = self.of.get(source, 0)
        if source in self.squares:
            self.squares.add(node)
        exponent = natural if in_update(node) else self.wanted(node, natural)
        for argument in node.all_input_nodes:
            wanted = exponent if argument is source else 0
            node.replace_input_with(argument, cast("Node", self.at(argument, wanted)))
        self.note(node, exponent)
        if isinstance(value, (list, tuple)):
            floats = [isinstance(v, torch.Tensor) and v.is_floating_point() for v in value]
            self.parts[node] = [exponent if is_one else 0 for is_one in floats]
            if str(node.target).startswith("aten.nll_loss"):  # the second is a count
                self.parts[node][1] = 0
        return None

    def _floats(self, node: Node) -> None:
        """Give an operation on floats its large integers as floats that carry an exponent.

        `f = i * y` -> `f = ((i // 1024) * (1024 * 2^-e) + (i % 1024) * 2^-e) * y`
        """
        for source in node.all_input_nodes:
            size = self.found.get(INTEGERS + source.name)
            if size is None or size.peak <= LARGEST or in_update(node) or not reads_number(node, source):
                continue
            if source not in self._as_floats:
                exponent = math.ceil(math.log2(size.peak / WANTED))
                high = self.emit(aten.bitwise_right_shift.Tensor_Scalar, source, PAIR.bit_length() - 1)
                parts = (high, float(PAIR)), (self.emit(aten.remainder.Scalar, source, PAIR), 1.0)
                products = (self.emit(aten.mul.Tensor, p, math.ldexp(f, -exponent)) for p, f in parts)
                joined = self.emit(aten.add.Tensor, *products)
                self.found[joined.name] = size
                self.note(joined, exponent)
                self._as_floats[source] = joined
            node.replace_input_with(source, self._as_floats[source])
        if node.target is aten._to_copy.default and node.args[0] in self._as_floats.values():
            node.target, node.kwargs = aten.alias.default, {}

    def aligned(self, node: Node) -> None:
        """add, sub, where, cat, maximum and the like: all operands with one exponent."""
        if in_update(node) and node.target is aten.cat.default:
            return  # whether gradients overflowed is asked of what is stored
        places = ALIGNED[str(node.target)]
        operands = [node.args[p] for p in places if p < len(node.args)]
        listed = bool(operands) and isinstance(operands[0], (list, tuple))
        flat = list(cast("Sequence[Argument]", operands[0])) if listed else operands
        nodes = [a for a in flat if isinstance(a, Node)]
        if any(a in self.squares for a in nodes):
            self.squares.add(node)
        leading = max(nodes, key=self._true_peak, default=None)
        natural = 0 if leading is None else self.of.get(leading, 0)
        compares = not is_float(node)
        exponent = natural if compares or in_update(node) else self.wanted(node, natural)
        new = [self.at(a, exponent) for a in flat]
        args = list(node.args)
        if listed:
            args[0] = cast("list[Node]", new)
        else:
            for place, value in zip(places, new, strict=False):
                args[place] = cast("Node", value)
        if compares and any(isinstance(a, float) for a in new) and isinstance(args[1], float):
            args[1] = max(-65504.0, min(65504.0, args[1])) if math.isfinite(args[1]) else args[1]
        node.args = tuple(args)
        for argument in node.all_input_nodes:  # scales, masks
            if argument not in new and self.of.get(argument):
                node.replace_input_with(argument, cast("Node", self.at(argument, 0)))
        if not compares:
            self.note(node, exponent)

    def _true_peak(self, node: Node) -> float:
        size = self.found.get(node.name)
        return 0.0 if size is None else size.peak

    def product(self, node: Node) -> None:
        """mul and div."""
        sign = -1 if "div" in str(node.target) else 1
        a, b = node.args[0], node.args[1]
        if len(node.args) > 2 or node.kwargs:
            return self.settle(node)
        if not isinstance(b, Node) or not isinstance(a, Node):
            return self._by_number(node, sign)
        if a is b and sign == 1:
            return self._power(node, a, 2)
        b = raised_divisor(self, node, a, b) if sign < 0 else b
        natural = self.of.get(a, 0) + sign * self.of.get(b, 0)
        if a in self.squares or (sign == 1 and b in self.squares):
            self.squares.add(node)
        exponent = 0 if in_update(node) else self.wanted(node, natural)
        if exponent != natural:
            self._place(node, a, b, sign, natural - exponent)
        self.note(node, exponent)
        return None

    def _place(self, node: Node, a: Node, b: Node, sign: int, shift: int) -> None:
        """Multiply the product by 2^shift at one of its operands, the smaller one where it stays in range."""
        choices = [(math.prod(shape_of(x)), s, place, x) for place, (x, s) in enumerate(((a, 1), (b, sign)))]
        choices = sorted([c for c in choices if is_float(c[3])] or choices, key=lambda c: c[0])
        for _, s, place, x in choices:
            moved = self.of.get(x, 0) - s * shift
            size = self.found.get(x.name)
            fits = (
                size is None
                or size.peak == 0.0
                or (size.peak * 2.0**-moved <= LARGEST * 2 and size.rms * 2.0**-moved >= SMALLEST / 2)
            ) and not LARGEST * 2 < self.bound(x) * 2.0**-moved < math.inf
            if fits or len(choices) == 1:
                new = list(node.args)
                new[place] = cast("Node", self.at(x, moved))
                node.args = tuple(new)
                return
        half = shift // 2  # both a little
        node.args = (
            cast("Node", self.at(a, self.of.get(a, 0) - half)),
            cast("Node", self.at(b, self.of.get(b, 0) - sign * (shift - half))),
        )

    def _by_number(self, node: Node, sign: int) -> None:
        """A product with a number: the number takes the shift; one that fp16 does not hold becomes two."""
        first = isinstance(node.args[0], Node)
        source = cast("Node", node.args[0 if first else 1])
        constant = number(node.args[1 if first else 0])
        if constant is None or not is_float(node) or (not first and sign < 0) or constant == 0.0:
            if constant and not first and sign < 0:  # constant / x
                return self._inverse(node, source, constant)
            return self.settle(node)
        natural = self.of.get(source, 0)
        if source in self.squares:
            self.squares.add(node)
        factor = constant if sign == 1 else 1.0 / constant
        exponent = 0 if in_update(node) else self.wanted(node, natural)
        total = math.ldexp(factor, natural - exponent)
        if (
            exponent == natural
            and LEAST_FACTOR * (2.0 if sign > 0 else 0.5) / 2 <= abs(factor) <= LARGEST_FACTOR
        ):
            return self.note(node, exponent)
        if not in_update(node) and not LEAST_FACTOR <= abs(total) <= LARGEST_FACTOR:
            power = math.frexp(factor)[1] - 1
            if not self.risky(node, natural + power):  # the power stays beside the value
                exponent, total = natural + power, math.ldexp(factor, -power)
        node.target = aten.mul.Tensor
        parts = self.times(source, total)
        if parts is source:  # the same numbers, which stand for others: others still read the source's
            node.target, node.args = aten.alias.default, (source,)
        else:
            node.args = parts.args
        self.note(node, exponent)
        return None

    def _inverse(self, node: Node, source: Node, constant: float) -> None:
        """constant / x"""
        source = raised_divisor(self, node, constant, source)
        natural = -self.of.get(source, 0)
        exponent = 0 if in_update(node) else self.wanted(node, natural)
        if exponent != natural:
            node.args = (math.ldexp(constant, natural - exponent), source)
        self.note(node, exponent)

    def power(self, node: Node) -> None:
        """Integer powers, roots and reciprocals."""
        source = cast("Node", node.args[0])
        name = str(node.target)
        fixed = {"aten.sqrt.default": 0.5, "aten.rsqrt.default": -0.5, "aten.reciprocal.default": -1.0}
        degree = fixed.get(name) or number(node.args[1]) or 0.0
        if in_update(node) or not degree:
            return self.settle(node)
        if degree not in (2.0, 3.0, 4.0, 0.5, -0.5, -1.0, -2.0):
            return transcendental.power(self, node, degree)
        return self._power(node, source, degree)

    def _power(self, node: Node, source: Node, degree: float) -> None:
        if degree > 1 and DONE not in node.meta:  # norms bound their squares themselves
            self.squares.add(node)
        own = self.of.get(source, 0)
        if degree in (0.5, -0.5) and own % 2:
            own += 1
        exponent = self.wanted(node, int(own * degree)) if not in_update(node) else 0
        moved = exponent / degree
        if moved != int(moved):
            moved = math.ceil(moved)
        if degree in (0.5, -0.5) and int(moved) % 2:
            moved += 1
        argument = cast("Node", self.at(source, int(moved)))
        node.replace_input_with(source, argument)
        self.note(node, int(moved * degree))

    def total(self, node: Node) -> None:
        """sum and mean; a sum that is too large becomes a mean, a mean too small a sum."""
        source = cast("Node", node.args[0])
        natural = self.of.get(source, 0)
        if source in self.squares:
            self.squares.add(node)
        axes = dims_of(node)
        if in_update(node) or axes is None or not self.risky(node, natural):
            return self.note(node, natural)
        exponent = self.wanted(node, natural)
        count = math.prod(shape_of(source)[a] for a in axes) or 1
        averages = node.target in (aten.mean.default, aten.mean.dim)
        other = aten.sum.dim_IntList if averages else aten.mean.dim
        size = self.found[node.name]
        reduced = size.peak * 2.0**-natural * (count if averages else 1 / count)
        small = size.rms * 2.0**-natural * (count if averages else 1 / count)
        if reduced <= LARGEST and small >= SMALLEST:
            node.target = other
            node.args = (source, axes, keeps_dims(node))
            node.kwargs = {}
            inner = self.emit(other, *node.args)
            factor = (1.0 / count if averages else float(count)) * 2.0 ** (natural - exponent)
            outer = self.times(inner, factor)
            if outer is inner:
                return self.note(node, exponent)
            node.target, node.args = aten.mul.Tensor, outer.args
        else:
            node.replace_input_with(source, cast("Node", self.at(source, exponent)))
        return self.note(node, exponent)

    def contraction(self, node: Node) -> None:
        """mm, bmm, addmm, convolution: operands are shifted where their products would vanish or overflow."""
        bias, left, right = CONTRACTIONS[str(node.target)]
        a, b = cast("Node", node.args[left]), cast("Node", node.args[right])
        natural = self.of.get(a, 0) + self.of.get(b, 0)
        shift = self.contraction_shift(node, a, b, natural)
        pair = self.shared_shift(a, b, shift)
        args = list(node.args)
        args[left], args[right] = (
            cast("Node", self.at(x, self.of.get(x, 0) - s)) for x, s in zip((a, b), pair, strict=True)
        )
        exponent = natural - sum(pair)
        if bias is not None and isinstance(args[bias], Node):
            args[bias] = cast("Node", self.at(args[bias], exponent))
        node.args = tuple(args)
        self.note(node, exponent)

    def convolution_backward(self, node: Node) -> None:
        """Three results: the exponents of gradient and weight, of gradient and input, of the gradient."""
        g, x, w = (cast("Node", a) for a in node.args[:3])
        eg, ex, ew = (self.of.get(a, 0) for a in (g, x, w))
        results = {cast("int", u.args[1]): u for u in node.users if u.target is operator.getitem}
        shape, kernel = shape_of(g), shape_of(w)
        counts = math.prod(kernel) // max(1, kernel[1]), shape[0] * math.prod(shape[2:])
        shifts, rooms = [], []
        for place, (other, count) in enumerate(zip((w, x), counts, strict=True)):
            if place in results:
                wish, room = self.growth(results[place], g, other, count, eg + (ew, ex)[place])
                shifts.append(wish)
                rooms.append(room)
        if 2 in results and results[2].name in self.found:  # the sum of the gradient
            peak = self.found[results[2].name].peak * 2.0**-eg
            rooms.append(math.floor(math.log2(LARGEST_SUM / peak)) if peak else 0)
            shifts.append(min(0, rooms[-1]))
        if any(shifts):
            shift = min(shifts) if min(shifts) < 0 else min(max(shifts), *rooms, self.room(g))
            node.args = (cast("Node", self.at(g, eg - shift)), *node.args[1:])
            eg -= shift
        self.parts[node] = [eg + ew, eg + ex, eg]


_RULES: dict[str, Callable[[Exponents, Node], None]] = {
    **dict.fromkeys(LINEAR, Exponents.linear),
    **dict.fromkeys(ALIGNED, Exponents.aligned),
    **dict.fromkeys(PRODUCTS, Exponents.product),
    **dict.fromkeys(POWERS, Exponents.power),
    **dict.fromkeys(TOTALS, Exponents.total),
    **dict.fromkeys(CONTRACTIONS, Exponents.contraction),
    **dict.fromkeys(
        ("aten.log.default", "aten.log2.default", "aten.log10.default"), transcendental.logarithm
    ),
    **dict.fromkeys(("aten.log1p.default", "aten.expm1.default"), transcendental.near_one),
    "aten.exp.default": transcendental.exponential,
    "aten.linalg_vector_norm.default": transcendental.norm,
    "aten._log_softmax.default": transcendental.log_softmax,
    "aten.convolution_backward.default": Exponents.convolution_backward,
}
#: Rules that look beyond the values themselves: sums of products, constants.
_ALWAYS = (Exponents.contraction, Exponents.product, transcendental.norm)
