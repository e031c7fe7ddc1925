"""Values selected by a `where` or behind a ReLU: only the selected part counts in their magnitudes.

    where(x > 0, x, exp(x) - 1): exp(100) stands in the graph, and nothing reads it; its gradient is multiplied by 0
    exp(-relu(x) * 1e10): its gradient is 1e10 only where the ReLU is closed

Test: `test_choosing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.editing import aten, is_float, shape_of

#: Only values beyond this, which the engine does not hold, are looked at.
_LIMIT = 2.0**15
_PRODUCTS = ("aten.mul.Tensor",)
_GATES = (aten.where.self, aten.threshold_backward.default)


class Choices:
    """The values of a graph of which parts are taken (`parts_of`), with what a run showed of them."""

    def __init__(self, parts: frozenset[Node]) -> None:
        self.parts = parts
        self._large: dict[Node, torch.Tensor] = {}
        self._taken: dict[Node, torch.Tensor | None] = {}

    def see(self, node: Node, values: Mapping[Node, object], result: object) -> None:
        """Note what a node takes of its operands (their values are given), and its result if it is large."""
        for operand in (
            node.all_input_nodes if not self._taken.keys().isdisjoint(node.all_input_nodes) else ()
        ):
            if operand in self._taken and node not in self.parts:
                taken, before = _taken(node, operand, values), self._taken[operand]
                self._taken[operand] = taken if before is None else before | taken
        if node in self.parts and isinstance(result, torch.Tensor) and result.numel():
            large = not float(result.abs().amax()) <= _LIMIT
            if large:
                self._large[node] = result
            if large or not self._taken.keys().isdisjoint(node.all_input_nodes):
                self._taken[node] = None

    def found(self) -> Iterator[tuple[Node, torch.Tensor]]:
        """The large values, each with the entries that are taken."""
        for node in reversed(self._taken):
            taken = self._taken[node]
            for user in node.users:
                if user in self.parts:
                    later = self._taken.get(user)
                    if later is not None:
                        taken = later if taken is None else taken | later
            self._taken[node] = taken
            if node in self._large and taken is not None and not bool(taken.all()):
                yield node, self._large[node][taken]


def parts_of(graph: Graph) -> frozenset[Node]:
    """Values that only end in a `where` of their shape, or in products; one `where` at least."""
    found: dict[Node, bool] = {}
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not _is_elementwise(node) or not is_float(node):
            continue
        ends = [_end(node, user, found) for user in node.users]
        if ends and all(end is not None for end in ends):
            found[node] = any(ends)
    return frozenset(node for node, chosen in found.items() if chosen)


def _is_elementwise(node: Node) -> bool:
    """Whether each entry depends on the same entry of an operand, by an operation that takes all of them."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and node.target not in _GATES


def _end(node: Node, user: Node, found: Mapping[Node, bool]) -> bool | None:
    """Whether what a user makes of a value is chosen from (True), or multiplied (False); None: it is all read."""
    if shape_of(user) != shape_of(node):
        return None
    if user.target is aten.where.self:
        return None if user.args[0] is node else True
    if user.target is aten.threshold_backward.default:
        return None if user.args[1] is node else True
    if found.get(user):
        return True
    return False if str(user.target) in _PRODUCTS else None


def _taken(user: Node, operand: Node, values: Mapping[Node, object]) -> torch.Tensor:
    """The entries of an operand that a `where`, an open ReLU, or a product with zeros, takes."""
    shape = shape_of(operand)
    if user.target is aten.threshold_backward.default:
        gate, least = values[user.args[1]], user.args[2]  # type: ignore[index]
        assert isinstance(gate, torch.Tensor)
        assert isinstance(least, (int, float))
        return gate > least
    if user.target is aten.where.self:
        condition = values[user.args[0]]  # type: ignore[index]
        assert isinstance(condition, torch.Tensor)
        first, second = (argument is operand for argument in user.args[1:])
        taken = condition.expand(shape)
        return torch.ones(shape, dtype=torch.bool) if first and second else taken if first else ~taken
    others = [a for a in user.args if a is not operand]
    other = values.get(others[0]) if others and isinstance(others[0], Node) else None
    return (
        (other != 0).expand(shape) if isinstance(other, torch.Tensor) else torch.ones(shape, dtype=torch.bool)
    )
