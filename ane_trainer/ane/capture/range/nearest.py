"""Distances of which only the nearest counts: codes too far away to be it are cut to where they still are not.

    before: `(x * x).sum(1, True) - 2 * x @ e.T + (e * e).sum(1)`, argmin
    after:  the same of `c = minimum(maximum(e, -L), L)`,  L = 1.05 * (1 + sqrt(D)) * (max |x| + min_k max_d |e_kd|)

A codebook of running averages (VQ-VAE) gives codes that nothing chose `average / 1e-5`: entries of 350,000 beside
those of 1. In one power of two with their squares, differences between near codes vanish, and the wrong ones are
chosen. The code of the least largest entry is nearer than sqrt(D) * (max |x| + min ...), and one with an entry beyond
L is farther, cut or not: what is chosen is what it was, for every batch. Codes within L keep their bits.
Test: `test_nearest.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.editing import Editor, aten, dims_of, number, shape_of
from ane_trainer.ane.capture.range.norms import squared
from ane_trainer.ane.capture.trace.moves import SPREAD
from ane_trainer.ane.capture.trace.simplify import drop_dead

#: Meta key of distances that were looked at: a graph may come twice (before and after it is partitioned).
DONE = "ane_nearest"

_LEAST = (aten.argmin.default, aten.min.dim)
_MOST = (aten.argmax.default, aten.max.dim)
#: Functions that keep the order of distances.
_RISING = (aten.sqrt.default, aten.clamp_min.default, aten.clamp.default, aten.relu.default)
_SUMS, _TIMES = (aten.add.Tensor, aten.sub.Tensor), (aten.mul.Tensor, aten.div.Tensor)
_PRODUCTS = (aten.mm.default, aten.bmm.default)
#: Over what is needed, for rounding; and the least bound.
_ROOM, _LEAST_BOUND = 1.05, 2.0**-10


@dataclass(frozen=True)
class _Distances:
    """A product of rows with codes, `x @ e.T`, and the squares of the codes beside it."""

    product: Node
    square: Node


def cut_far_codes(graph: Graph) -> int:
    """Rewrite the distances of a graph that only a choice of the nearest reads, in place; returns their number."""
    editor, count = Editor(graph), 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _LEAST + _MOST and not node.meta.get(DONE):
            found = _distances(node)
            if found is not None and _cut(editor, found):
                node.meta[DONE] = True
                count += 1
    if count:
        drop_dead(graph)
    return count


def _distances(choice: Node) -> _Distances | None:
    """What a choice along the last axis reads, if that is squared distances, or what rises with them, alone."""
    whole = choice.args[0]
    axis = choice.args[1] if len(choice.args) > 1 else None
    if not isinstance(whole, Node) or axis not in (-1, len(shape_of(whole)) - 1):
        return None
    sign = 1.0 if choice.target in _LEAST else -1.0
    while whole.target is aten.neg.default or whole.target in _RISING or _factor(whole) is not None:
        factor = -1.0 if whole.target is aten.neg.default else _factor(whole) or 1.0
        if len(whole.users) > 1 or (whole.target in _RISING and sign < 0.0):
            return None
        sign, whole = sign * factor, whole.all_input_nodes[0]
    terms = list(_terms(whole, sign))
    codes = shape_of(whole)[-1]
    products = [(n, f) for n, f in terms if n is not None and n.target in _PRODUCTS]
    squares = [
        (n, f) for n, f in terms if n is not None and n.target not in _PRODUCTS and _per_code(n, codes)
    ]
    if len(products) != 1 or len(squares) != 1 or any(n is None for n, _ in terms):
        return None
    (product, twice), (square, one) = products[0], squares[0]
    row, factor = _row(product)
    code, axes = squared(square.all_input_nodes[0]), dims_of(square)
    if code is None or one <= 0.0 or twice * factor != -2.0 * one or shape_of(product) != shape_of(whole):
        return None
    base, width = _chain(code)[0], shape_of(product.all_input_nodes[-1])[-2]
    same = base is _chain(product.args[1])[0] is not _chain(row)[0]
    summed = axes is not None and [shape_of(code)[a] for a in axes] == [width]
    return _Distances(product, square) if same and summed else None


def _terms(node: Node, factor: float) -> Iterator[tuple[Node | None, float]]:
    """The terms of a sum with their factors, views taken off; None for one that something else reads."""
    if len(node.users) > 1 and not _is_row(node):
        yield None, factor
    elif node.target in _SUMS and len(node.args) == 2 and number(node.kwargs.get("alpha", 1)) == 1.0:
        for place, term in enumerate(node.args):
            if isinstance(term, Node):
                yield from _terms(term, -factor if place and node.target is aten.sub.Tensor else factor)
    elif _factor(node) is not None:
        yield from _terms(node.all_input_nodes[0], factor * (_factor(node) or 1.0))
    elif node.target in SPREAD and not _is_row(node):
        yield from _terms(node.all_input_nodes[0], factor)
    elif not _is_row(node):
        yield node, factor


def _is_row(node: Node) -> bool:
    """Whether a term is one number for all codes."""
    return not shape_of(node) or (shape_of(node)[-1] == 1)


def _per_code(node: Node, codes: int) -> bool:
    return dims_of(node) is not None and math.prod(shape_of(node)) % codes == 0


def _factor(node: Node) -> float | None:
    """The number that a node multiplies by, if it does nothing else."""
    if node.target not in _TIMES or not isinstance(node.args[0], Node):
        return None
    value = number(node.args[1])
    return None if value is None or value == 0.0 else 1.0 / value if node.target is aten.div.Tensor else value


def _row(product: Node) -> tuple[Node, float]:
    """The rows that codes are compared with, and what they are multiplied by."""
    row, factor = product.args[0], 1.0
    assert isinstance(row, Node)
    while row.target in SPREAD or _factor(row) is not None:
        factor *= _factor(row) or 1.0
        row = row.all_input_nodes[0]
    return row, factor


def _chain(node: object) -> list[Node]:
    """What a node is a view of, then the views up to it."""
    assert isinstance(node, Node)
    found = [node]
    while found[0].op == "call_function" and found[0].target in SPREAD:
        found.insert(0, found[0].all_input_nodes[0])
    return found


def _cut(editor: Editor, found: _Distances) -> bool:
    """Give the product and the squares codes that are cut, in front of what reads them."""
    product, square, order = found.product, found.square, {n: i for i, n in enumerate(editor.graph.nodes)}
    row, code, turned = _row(product)[0], squared(square.all_input_nodes[0]), _chain(product.args[1])
    codes = turned[0]
    readers = [product, *square.users]
    editor.here = min(readers, key=order.__getitem__)
    if any(order[n] > order[editor.here] for n in (row, codes)):
        return False
    size = _largest(editor, row)
    rows = editor.emit(
        aten.amax.default, _moved(editor, editor.emit(aten.abs.default, codes), turned), [-2], True
    )
    least = editor.emit(aten.amin.default, rows, list(range(len(shape_of(rows)))), False)
    reach = _ROOM * (1.0 + math.sqrt(shape_of(turned[-1])[-2]))
    bound = editor.times(editor.emit(aten.add.Tensor, size, least), reach)
    bound = editor.emit(aten.add.Tensor, bound, _LEAST_BOUND)
    cut = editor.emit(aten.maximum.default, codes, editor.emit(aten.neg.default, bound))
    cut = editor.emit(aten.minimum.default, cut, bound)
    near = _moved(editor, cut, _chain(code))
    squares = editor.emit(aten.mul.Tensor, near, near)
    square.replace_all_uses_with(editor.emit(_target(square), squares, *square.args[1:]))
    editor.here = product
    product.replace_all_uses_with(editor.emit(_target(product), product.args[0], _moved(editor, cut, turned)))
    return True


def _largest(editor: Editor, node: Node) -> Node:
    """The largest magnitude of a tensor."""
    size = editor.emit(aten.abs.default, node)
    return editor.emit(aten.amax.default, size, list(range(len(shape_of(node)))), False)


def _moved(editor: Editor, node: Node, chain: list[Node]) -> Node:
    """A node in the shape that the views of a chain give."""
    for view in chain[1:]:
        node = editor.emit(_target(view), node, *view.args[1:])
    return node


def _target(node: Node) -> Callable[..., object]:
    return cast("Callable[..., object]", node.target)
