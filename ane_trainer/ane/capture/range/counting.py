"""Large integer sums that only floats read, as float sums, which the range pass scales by a power of two.

    before: `p.sum() + (y > 0).sum()`           after: `p.sum() + (y > 0).float().sum()`

A count beyond 65,504 leaves fp16; as a float it is one more sum, also where it is compared with a number up to 1024.
What else compares or looks up by the integers keeps them.
Tests: `test_counting.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument, map_arg

from ane_trainer.ane.capture.range.editing import Editor, aten, in_update, is_float, shape_of
from ane_trainer.ane.capture.trace.moves import SPREAD
from ane_trainer.ane.capture.trace.simplify import drop_dead

#: Sums of fewer numbers stay as they are.
_FEW = 2048

_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
_COMPARISONS = tuple(getattr(aten, name).Scalar for name in ("eq", "ne", "lt", "le", "gt", "ge"))
#: Operations on integers that floats know, too, with the same meaning.
_ALIKE = (
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.mul.Tensor, aten.mul.Scalar,
    aten.neg.default, aten.abs.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
    aten.maximum.default, aten.minimum.default, aten.where.self, *SPREAD,
)  # fmt: skip


def count_in_floats(graph: Graph) -> int:
    """Give floats that read large sums of integers a float in their place; returns how many sums have one."""
    editor, twins, found = Editor(graph), dict[Node, Node](), 0
    for node in list(graph.nodes):
        if node.op != "call_function" or in_update(node):
            continue
        if is_float(node) or _compares(node, twins):
            _read_floats(node, twins)
        elif _is_integer(node):
            editor.here = node
            if _is_large_sum(node):
                twins[node] = _summed(editor, node)
                found += 1
            elif any(source in twins for source in node.all_input_nodes) and _is_alike(node):
                twins[node] = _alike(editor, node, twins)
    if found:
        drop_dead(graph)
    return found


def _compares(node: Node, twins: dict[Node, Node]) -> bool:
    """Whether a sum is compared with a number: what is below 2048 fp16 holds, and what is above stays above."""
    if node.target not in _COMPARISONS or node.args[0] not in twins:
        return False
    value = node.args[1]
    return isinstance(value, (int, float)) and abs(value) <= _FEW / 2


def _read_floats(node: Node, twins: dict[Node, Node]) -> None:
    if node.target is aten._to_copy.default and node.args[0] in twins:
        node.replace_all_uses_with(twins[cast("Node", node.args[0])])
        return
    for source in node.all_input_nodes:
        if source in twins:
            node.replace_input_with(source, twins[source])


def _is_integer(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )


def _is_large_sum(node: Node) -> bool:
    if node.target not in _SUMS:
        return False
    source = cast("Node", node.args[0])
    return math.prod(shape_of(source)) > _FEW * math.prod(shape_of(node))


def _is_alike(node: Node) -> bool:
    if node.target is aten._to_copy.default:
        return True
    return node.target in _ALIKE and not node.kwargs


def _as_float(editor: Editor, node: Node) -> Node:
    with editor.graph.inserting_before(editor.here):
        new = editor.graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
    value = torch.empty(shape_of(node), dtype=torch.float32, device="meta")
    new.meta = {k: v for k, v in editor.here.meta.items() if k != "val"} | {"val": value}
    return new


def _summed(editor: Editor, node: Node) -> Node:
    source = cast("Node", node.args[0])
    if "count_nonzero" in str(node.target):
        source = editor.emit(aten.ne.Scalar, source, 0)
        axes = node.args[1] if len(node.args) > 1 and node.args[1] else list(range(len(shape_of(source))))
        return editor.emit(aten.sum.dim_IntList, _as_float(editor, source), cast("Argument", axes))
    return editor.emit(cast("Callable[..., object]", node.target), _as_float(editor, source), *node.args[1:])


def _alike(editor: Editor, node: Node, twins: dict[Node, Node]) -> Node:
    if node.target is aten._to_copy.default:
        return twins[cast("Node", node.args[0])]

    def floating(argument: Node) -> Node:
        if argument in twins:
            return twins[argument]
        return _as_float(editor, argument) if _is_integer(argument) else argument

    args = map_arg(node.args, floating)
    return editor.emit(cast("Callable[..., object]", node.target), *args)
