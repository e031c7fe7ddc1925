"""Gradients that are 0 by algebra whatever the data: those of biases that a norm or a softmax cancels.

    before: `b_gradient = x_gradient.sum([0, 2, 3])`, x in front of a batch norm        after: `zeros([channels])`

In fp32 such a gradient is 1e-9 and Adam's epsilon damps it; in fp16 it is a thousand times larger and Adam makes full
steps of it, which running means follow late. That it is 0 is shown by algebra: each sum is written as sums of products
of values that are not looked into, through what is linear, until all terms cancel. Nothing is asked of the norm's form
(batch, instance, group, written by hand). Test: `test_cancelling.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import cast

from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.editing import (
    Editor,
    aten,
    dims_of,
    in_update,
    is_float,
    keeps_dims,
    number,
    shape_of,
)
from ane_trainer.ane.capture.range.softmaxes import SUMS, masked_gradient, softmax_gradient
from ane_trainer.ane.capture.trace.moves import CAST, PERMUTED, RESHAPED
from ane_trainer.ane.capture.trace.simplify import drop_dead

#: Names of an axis beside others: equal ones run together and have one extent. None: an extent of 1.
Label = Hashable
Labels = tuple[Label, ...]
#: A sum of products: (value, labels of its axes), ... -> factor. No terms: 0.
Terms = Mapping[tuple[Hashable, ...], float]

#: Sums of more terms, and values behind more operations, are not looked into.
_MOST_TERMS, _DEEPEST = 48, 300
#: Share of the larger of two numbers below which their difference is 0.
_EQUAL = 1e-9
_SUMMED = "summed"

_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_ADDED = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
_SOFTMAX = (
    aten._softmax.default, aten._softmax_backward_data.default, aten._log_softmax_backward_data.default,
)  # fmt: skip
#: Operations through which a gradient reaches the update.
_ONWARD = (*CAST, *RESHAPED, *PERMUTED, *_ADDED, *_PRODUCTS, aten.neg.default, aten.expand.default)


def drop_cancelled(graph: Graph) -> int:
    """Replace sums that are 0 by algebra, where they go to an update or a result, by zeros; returns their number."""
    sums, editor, found = Sums(), Editor(graph), 0
    for node in list(graph.nodes):
        if not _is_candidate(node) or not _is_result(node):
            continue
        if not sums.of(
            node, tuple((node.name, "result", i) for i in range(len(shape_of(node)))), frozenset()
        ):
            editor.here = node
            node.replace_all_uses_with(editor.emit(aten.full.default, list(shape_of(node)), 0.0))
            found += 1
    if found:
        drop_dead(graph)
    return found


def _is_candidate(node: Node) -> bool:
    if node.op != "call_function" or in_update(node) or not is_float(node):
        return False
    return node.target in SUMS or _bias_gradient(node) is not None


def _bias_gradient(node: Node) -> Node | None:
    """The gradient whose sum over all but the channels a node is."""
    if node.target is not operator.getitem or node.args[1] != 2:
        return None
    source = cast("Node", node.args[0])
    return cast("Node", source.args[0]) if source.target is aten.convolution_backward.default else None


def _is_result(node: Node) -> bool:
    """Whether the node's value goes on to the update, or is a result, without anything but linear operations."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.op == "output" or in_update(user):
                return True
            if user.target in _ONWARD and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


class Sums:
    """Sums of values over axes, as sums of products."""

    def __init__(self) -> None:
        self._known: dict[tuple[Node, Labels, frozenset[Label]], Terms] = {}
        self._extents: dict[Label, int] = {}
        self._depth = 0

    def of(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms:
        """The sum of a node, its axes called `labels`, over `axes`; those that it does not have count it often."""
        shape = shape_of(node)
        labels = tuple(None if n == 1 else name for name, n in zip(labels, shape, strict=True))
        self._extents |= {name: n for name, n in zip(labels, shape, strict=True) if name is not None}
        count = math.prod(self._extents.get(name, 1) for name in axes if name not in labels)
        own = frozenset(name for name in axes if name in labels)
        key = node, labels, own
        if key not in self._known:
            self._depth += 1
            terms = self._looked_into(node, labels, own) if self._depth < _DEEPEST else None
            self._depth -= 1
            if terms is None or len(terms) > _MOST_TERMS:
                terms = self._opaque(node, labels, own)
            self._known[key] = terms
        return _times(self._known[key], float(count))

    def _opaque(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms:
        return {((node.name, tuple(_SUMMED if name in axes else name for name in labels), 1),): 1.0}

    def _looked_into(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """None: nothing is known but that it is what it is."""
        bias = _bias_gradient(node)
        if bias is not None:
            rest = [(node.name, i) for i in range(len(shape_of(bias)))]
            return self.of(bias, (rest[0], *labels, *rest[2:]), axes | {rest[0], *rest[2:]})
        rule = _RULES.get(cast("Callable[..., object]", node.target)) if node.op == "call_function" else None
        if rule is None or not node.args or not is_float(node):
            return None
        return rule(self, node, labels, axes)

    def _operand(self, argument: object, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """The sum of an operand that is broadcast to a result with these axes."""
        if isinstance(argument, Node):
            rank = len(shape_of(argument))
            return self.of(argument, labels[len(labels) - rank :], axes)
        value = number(argument)
        if value is None:
            return None
        return _times({(): value}, math.prod(self._extents.get(name, 1) for name in axes))

    def _axes(self, argument: object, labels: Labels, axes: frozenset[Label]) -> frozenset[Label]:
        """Those of `axes` along which an operand changes."""
        if not isinstance(argument, Node):
            return frozenset()
        shape = shape_of(argument)
        own = zip(labels[len(labels) - len(shape) :], shape, strict=True)
        return frozenset(name for name, n in own if n != 1 and name in axes)

    # -- rules

    def _same(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        return self._operand(node.args[0], labels, axes)

    def _negative(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        terms = self._operand(node.args[0], labels, axes)
        return None if terms is None else _times(terms, -1.0)

    def _added(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        found = softmax_gradient(node)
        if found is not None and labels[found[1]] in axes:
            return {}
        a, b = (self._operand(argument, labels, axes) for argument in node.args[:2])
        factor = number(node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1.0))
        if a is None or b is None or factor is None:
            return None
        return _plus(a, _times(b, factor if "add" in str(node.target) else -factor))

    def _product(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """A factor that does not change along the axes stays outside of the sum."""
        a, b = node.args[:2]
        divided = "div" in str(node.target)
        if len(node.args) > 2 or node.kwargs:
            return None
        if divided and not isinstance(b, Node):
            a, b, divided = a, 1.0 / (number(b) or math.inf), False
        along = self._axes(a, labels, axes), self._axes(b, labels, axes)
        if divided and (along[1] or not isinstance(a, Node)):
            return None
        if all(along):
            sides = ((a, axes - along[1]), (b, axes - along[0]))
            zero = any(some and self._operand(side, labels, some) == {} for side, some in sides)
            return {} if zero else None
        if along[1]:
            a, b = b, a
        summed = self._operand(a, labels, axes)
        if not summed:
            return summed
        if divided:
            divisor = cast("Node", b)
            own = labels[len(labels) - len(shape_of(divisor)) :]
            own = tuple(None if n == 1 else name for name, n in zip(own, shape_of(divisor), strict=True))
            factor: Terms | None = {((divisor.name, own, -1),): 1.0}
        else:
            factor = self._operand(b, labels, frozenset())
        if factor is None or len(summed) * len(factor) > _MOST_TERMS:
            return None
        return _joined(summed, factor)

    def _total(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """sum and mean"""
        source, reduced = cast("Node", node.args[0]), dims_of(node)
        if reduced is None or not is_float(source):
            return None
        left = iter(labels)
        inner: list[Label] = []
        for i in range(len(shape_of(source))):
            summed = i in reduced
            if not summed or keeps_dims(node):
                name = next(left)
            inner.append((node.name, i) if summed else name)
        terms = self.of(source, tuple(inner), axes | {inner[i] for i in reduced if shape_of(source)[i] != 1})
        if "mean" in str(node.target):
            return _times(terms, 1.0 / (math.prod(shape_of(source)[i] for i in reduced) or 1))
        return terms

    def _expanded(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        return self._operand(node.args[0], labels, axes)

    def _permuted(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        source = cast("Node", node.args[0])
        rank = len(shape_of(source))
        order = list(range(rank))
        if node.target is aten.permute.default:
            order = [d % rank for d in cast("Sequence[int]", node.args[1])]
        elif rank > 1:
            a, b = (
                (0, 1) if node.target is aten.t.default else (cast("int", d) % rank for d in node.args[1:3])
            )
            order[a], order[b] = order[b], order[a]
        inner = dict(zip(order, labels, strict=True))
        return self.of(source, tuple(inner[i] for i in range(rank)), axes)

    def _reshaped(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """Axes that are merged or split are summed together, or not at all."""
        source = cast("Node", node.args[0])
        old, new = shape_of(source), shape_of(node)
        names: list[Label] = [None] * len(old)
        summed, cut = set(axes), False
        for before, after in _groups(old, new):
            outer = tuple(labels[i] for i in after)
            if len(before) == len(after) == 1:
                names[before[0]] = outer[0]
                continue
            for place, i in enumerate(before):
                names[i] = ("view", outer, tuple(old[k] for k in before), place)
            some = [name in axes for name in outer]
            summed -= set(outer)
            if all(some):
                summed |= {names[i] for i in before}
            cut |= any(some) and not all(some)
        terms = self.of(source, tuple(names), frozenset(summed))
        return terms if not cut or not terms else None

    def _softmax(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """Along its axis a softmax adds to 1, its gradient to 0."""
        place = 1 if node.target is aten._softmax.default else 2
        along = labels[cast("int", node.args[place]) % len(labels)]
        if along not in axes:
            return None
        if place == 2:
            return {}
        return {(): float(math.prod(self._extents.get(name, 1) for name in axes if name != along))}

    def _chosen(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """0 where both sides add to 0 along axes on which the test is one; a mask that a softmax had before is none."""
        test, *sides = node.args
        masked = masked_gradient(node)
        if masked is not None:
            return self._operand(masked, labels, axes)
        along = axes - self._axes(test, labels, axes)
        return {} if along and all(self._operand(side, labels, along) == {} for side in sides) else None

    def _concatenated(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """0 where each part adds to 0."""
        along = cast("int", node.args[1] if len(node.args) > 1 else 0) % len(labels)
        for place, part in enumerate(cast("Sequence[Node]", node.args[0])):
            name = (node.name, "part", place)
            own = (*labels[:along], name, *labels[along + 1 :])
            if self.of(part, own, axes - {labels[along]}) != {}:
                return None
        return {}

    def _matrix_product(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        """0 where the rows of the left, or the columns of the right operand add to 0."""
        for side, place in ((node.args[0], -2), (node.args[1], -1)):
            if labels[place] in axes and isinstance(side, Node):
                own = tuple((side.name, "operand", i) for i in range(len(shape_of(side))))
                if not self.of(side, own, frozenset({own[place]})):
                    return {}
        return None

    def _constant(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        value = number(node.args[1])
        if not value:
            return None if value is None else {}
        return {(): value * math.prod(self._extents[n] for n in axes)}

    def _power(self, node: Node, labels: Labels, axes: frozenset[Label]) -> Terms | None:
        return self._operand(node.args[0], labels, axes) if number(node.args[1]) == 1.0 else None


_RULES: dict[Callable[..., object], Callable[[Sums, Node, Labels, frozenset[Label]], Terms | None]] = {
    **dict.fromkeys(CAST, Sums._same),
    aten.neg.default: Sums._negative,
    **dict.fromkeys(_ADDED, Sums._added),
    **dict.fromkeys(_PRODUCTS, Sums._product),
    **dict.fromkeys((*SUMS, aten.mean.default, aten.mean.dim), Sums._total),
    aten.expand.default: Sums._expanded,
    **dict.fromkeys(PERMUTED, Sums._permuted),
    **dict.fromkeys(RESHAPED, Sums._reshaped),
    **dict.fromkeys(_SOFTMAX, Sums._softmax),
    **dict.fromkeys((aten.mm.default, aten.bmm.default), Sums._matrix_product),
    aten.full.default: Sums._constant,
    aten.where.self: Sums._chosen,
    aten.cat.default: Sums._concatenated,
    aten.pow.Tensor_Scalar: Sums._power,
}


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Axes of two shapes of the same numbers, in the least groups with equal products; extents of 1 are left out."""
    a = [i for i, n in enumerate(old) if n != 1]
    b = [i for i, n in enumerate(new) if n != 1]
    while a and b:
        before, after = [a.pop(0)], [b.pop(0)]
        sizes = [old[before[0]], new[after[0]]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                before.append(a.pop(0))
                sizes[0] *= old[before[-1]]
            else:
                after.append(b.pop(0))
                sizes[1] *= new[after[-1]]
        yield before, after


def _plus(a: Terms, b: Terms) -> Terms:
    result = dict(a)
    for key, factor in b.items():
        before = result.pop(key, 0.0)
        if abs(before + factor) > _EQUAL * max(abs(before), abs(factor)):
            result[key] = before + factor
    return result


def _times(terms: Terms, factor: float) -> Terms:
    return terms if factor == 1.0 else {key: f * factor for key, f in terms.items()} if factor else {}


def _joined(a: Terms, b: Terms) -> Terms:
    result: Terms = {}
    for left, x in a.items():
        for right, y in b.items():
            result = _plus(result, {_sorted((*left, *right)): x * y})
    return result


def _sorted(atoms: Collection[Hashable]) -> tuple[Hashable, ...]:
    return tuple(sorted(atoms, key=repr))
