"""Unrolled recurrent steps: reads of what was just written, and sums over steps of products with one weight.

before: `y = slice_scatter(x, v, 1, 0, 8); split(y, [8, 8], 1)[0]`        after: `v`
before: `mm(a0.T, b0) + mm(a1.T, b1) + ...; sum(a0, 0) + sum(a1, 0) + ...`
after:  `a = cat(a0, a1, ...); mm(a.T, cat(b0, b1, ...)); sum(a, 0)`

The first is how PyTorch's LSTM writes its gates (`chunk`, then `sigmoid_`), the second how the gradients of weights
that each step uses add up: one product in place of many small ones, and rounded once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

#: Products from which a sum of them is made one.
_LEAST = 4


def read_through(graph: Graph) -> int:
    """Parts of a tensor that was written to are read from what was written there, or from what was there before.

    Returns how many.
    """
    count = 0
    for node in list(graph.nodes):
        part = _part(node)
        if part is None:
            continue
        start = part.base
        while (written := _written(part.base, part.axis)) is not None:
            value, first, last = written
            if first <= part.first and part.last <= last:
                part = _Part(value, part.axis, part.first - first, part.last - first)
                break
            if part.first < last and first < part.last:
                break
            part = _Part(part.base.all_input_nodes[0], part.axis, part.first, part.last)
        if part.base is not start:
            node.replace_all_uses_with(_read(part, node))
            graph.erase_node(node)
            count += 1
    return count


@dataclass(frozen=True)
class _Part:
    """Places `first` up to `last` of an axis of `base`."""

    base: Node
    axis: int
    first: int
    last: int


def _part(node: Node) -> _Part | None:
    """What a node reads, if that is a part of a tensor along one axis."""
    if node.target is aten.slice.Tensor:
        return _Part(node.args[0], *ends) if (ends := _ends(node, 1)) is not None else None  # type: ignore[arg-type]
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, Node) or split.target is not aten.split_with_sizes.default:
        return None
    base, sizes, *axis = split.args
    assert isinstance(base, Node)
    assert isinstance(sizes, Sequence)
    number = int(node.args[1])  # type: ignore[arg-type]
    first = sum(int(size) for size in sizes[:number])  # type: ignore[arg-type, misc]
    dims = len(_shape(base))
    return _Part(base, int(axis[0]) % dims if axis else 0, first, first + int(sizes[number]))  # type: ignore[arg-type]


def _written(node: Node, axis: int) -> tuple[Node, int, int] | None:
    """What was written to a tensor along this axis, and where."""
    if node.target is not aten.slice_scatter.default:
        return None
    ends, value = _ends(node, 2), node.args[1]
    if ends is None or ends[0] != axis or not isinstance(value, Node):
        return None
    return value, ends[1], ends[2]


def _ends(node: Node, skipped: int) -> tuple[int, int, int] | None:
    """(axis, first, last) of a slice without steps."""
    base = node.args[0]
    given = (*node.args[skipped:], *(None,) * 4)[:4]
    if not isinstance(base, Node) or node.kwargs or any(isinstance(each, Node) for each in given):
        return None
    axis, first, last, step = (each if isinstance(each, int) else None for each in given)
    shape = _shape(base)
    axis = (axis or 0) % len(shape)
    first, last, _ = slice(first, last).indices(shape[axis])
    return (axis, first, last) if step in (None, 1) and first < last else None


def _read(part: _Part, node: Node) -> Node:
    """The part as a node in front of `node`, which it stands for."""
    if (part.first, part.last) == (0, _shape(part.base)[part.axis]):
        return part.base
    with node.graph.inserting_before(node):
        found = node.graph.call_function(aten.slice.Tensor, (part.base, part.axis, part.first, part.last))
    found.meta = dict(node.meta)
    return found


@dataclass(frozen=True)
class _Term:
    """One of the terms of a sum: `mm(left.T, right)`, or the sum of `left` over its rows (`right` is None)."""

    left: Node
    right: Node | None

    @property
    def kind(self) -> tuple[object, ...]:
        return _shape(self.left), None if self.right is None else _shape(self.right)


def multiply_together(graph: Graph) -> int:
    """Sums of products over steps become one product, and sums of the same steps' rows one sum; returns how many."""
    count = 0
    sums = [(end, terms) for end, leaves in _chains(graph) if (terms := _terms(leaves))]
    joined = {tuple(term.left for term in terms) for _, terms in sums if _is_worth_while(terms)}
    for end, terms in sums:
        if tuple(term.left for term in terms) not in joined:
            continue
        with graph.inserting_before(end):
            left = _joined([term.left for term in terms], end)
            rights = [term.right for term in terms if term.right is not None]
            if rights:
                across = _like(graph.call_function(aten.permute.default, (left, [1, 0])), end, left, (1, 0))
                found = graph.call_function(aten.mm.default, (across, _joined(rights, end)))
            else:
                found = graph.call_function(aten.sum.dim_IntList, (left, [0]))
        found.meta = dict(end.meta)
        end.replace_all_uses_with(found)
        count += 1
    return count


def _chains(graph: Graph) -> list[tuple[Node, list[Node]]]:
    """Sums of several terms: the last addition, and the terms in the order of the graph."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    inner: set[Node] = set()
    found = []
    for end in reversed(list(order)):
        if end in inner or not _is_sum(end):
            continue
        leaves, pending = [], list(end.all_input_nodes)
        while pending:
            node = pending.pop()
            if _is_sum(node) and len(node.users) == 1 and _shape(node) == _shape(end):
                inner.add(node)
                pending += node.all_input_nodes
            else:
                leaves.append(node)
        if len(leaves) >= _LEAST and all(len(leaf.users) == 1 for leaf in leaves):
            found.append((end, sorted(leaves, key=order.__getitem__)))
    return found


def _is_sum(node: Node) -> bool:
    return node.target is aten.add.Tensor and len(node.all_input_nodes) == 2 and not node.kwargs


def _terms(leaves: Sequence[Node]) -> list[_Term]:
    """The leaves as terms of one kind; none if one of them is another thing."""
    found = [term for leaf in leaves if (term := _term(leaf)) is not None]
    alike = len(found) == len(leaves) and len({term.kind for term in found}) == 1
    return found if alike else []


def _term(node: Node) -> _Term | None:
    if node.target is aten.mm.default:
        across, right = node.all_input_nodes[0], node.all_input_nodes[-1]
        if across.target is aten.permute.default and across.args[1] == [1, 0]:
            return _Term(across.all_input_nodes[0], right)
        return None
    total = node.all_input_nodes[0] if node.target is aten.view.default else node
    if total.target is aten.sum.dim_IntList and total.args[1] == [0] and len(_shape(node)) == 1:
        return _Term(total.all_input_nodes[0], None) if len(total.users) == 1 or total is node else None
    return None


def _is_worth_while(terms: Sequence[_Term]) -> bool:
    """Whether putting the factors together moves less than adding the products does."""
    right = terms[0].right
    if right is None:
        return False
    (rows, width), other = _shape(terms[0].left), _shape(right)[1]
    return rows * (width + other) <= width * other


def _joined(parts: Sequence[Node], end: Node) -> Node:
    """The parts below each other."""
    first = parts[0].meta["val"]
    node = end.graph.call_function(aten.cat.default, (list(parts), 0))
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    node.meta = {**end.meta, "val": torch.empty(shape, dtype=first.dtype, device="meta")}
    return node


def _like(node: Node, end: Node, source: Node, dims: tuple[int, ...]) -> Node:
    node.meta = {**end.meta, "val": source.meta["val"].permute(dims)}
    return node


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))
