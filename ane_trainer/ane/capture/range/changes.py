"""Find the increment of an update as a node: `new = old + change`, without the rounding of `new - old`.

    `new = old * 0.999 + x * 0.001`   ->   `change = x * 0.001 - old * 0.001`
    `new = old + (x - old) / n`       ->   `change = (x - old) / n`

Tests: `test_changes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch.fx import Graph, Node
from torch.fx.node import Argument

from ane_trainer.ane.capture.range.editing import Editor, aten, is_float, number, shape_of
from ane_trainer.ane.capture.trace.moves import CAST, RESHAPED
from ane_trainer.ane.capture.trace.sources import META_KEY

#: Operations that give their operand's numbers, in this or another shape.
_SAME = CAST | RESHAPED
#: A factor this far from 1 makes a new value of the old one, not a change of it.
_LARGEST_DECAY = 0.5


class _Unchanged:
    """The value itself: nothing is added."""


_NOTHING = _Unchanged()


def change_of(editor: Editor, new: Node, old: Node) -> Node | None:
    """`new - old` made in front of `editor.here`; None where `new` is not the old value and something added."""
    found = _change(editor, new, old)
    return found if isinstance(found, Node) and shape_of(found) == shape_of(new) else None


def changes_of(graph: Graph, inputs: Sequence[Node], changed: int) -> dict[int, tuple[Node, Node]]:
    """Of the first `changed` results, by number: the input whose new value it is, and what is added to it."""
    editor, found = Editor(graph), dict[int, tuple[Node, Node]]()
    results = graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    for place, new in enumerate(results[:changed]):
        if not isinstance(new, Node) or new.op != "call_function" or not is_float(new):
            continue
        for old in (n for n in inputs if is_float(n) and shape_of(n) == shape_of(new)):
            editor.here, editor.marks = new.next, {META_KEY: new.meta.get(META_KEY)}
            change = change_of(editor, new, old)
            if change is not None:
                found[place] = old, change
                break
    return found


def _change(editor: Editor, node: Argument, old: Node) -> Node | _Unchanged | None:
    if node is old:
        return _NOTHING
    if not isinstance(node, Node) or node.op != "call_function" or not is_float(node):
        return None
    if node.target in _SAME:
        found = _change(editor, node.args[0], old)
        return editor.view(found, shape_of(node)) if isinstance(found, Node) else found
    rule = _RULES.get(cast("Callable[..., object]", node.target))
    return None if rule is None else rule(editor, node, old)


def _added(editor: Editor, node: Node, old: Node) -> Node | _Unchanged | None:
    """add and sub, the second operand times `alpha`"""
    sign = 1.0 if "add" in str(node.target) else -1.0
    factor = number(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1.0))
    if factor is None:
        return None
    first, second = node.args[:2]
    found = _change(editor, first, old)
    if found is not None:
        return _joined(editor, found, _part(editor, node, second, sign * factor))
    if sign * factor != 1.0 or (found := _change(editor, second, old)) is None:
        return None
    return _joined(editor, found, _part(editor, node, first, 1.0))


def _joined(editor: Editor, found: Node | _Unchanged, part: Node | None) -> Node | None:
    return editor.emit(aten.add.Tensor, found, part) if isinstance(found, Node) and part is not None else part


def _part(editor: Editor, node: Node, value: Argument, factor: float) -> Node | None:
    """A number or tensor times `factor`, in the sum's shape."""
    constant = number(value)
    if constant is not None:
        return editor.emit(aten.full.default, list(shape_of(node)), factor * constant)
    if not isinstance(value, Node) or not is_float(value):
        return None
    value = value if factor == 1.0 else editor.emit(aten.mul.Tensor, value, factor)
    return (
        value
        if shape_of(value) == shape_of(node)
        else editor.emit(aten.expand.default, value, list(shape_of(node)))
    )


def _scaled(editor: Editor, node: Node, old: Node) -> Node | _Unchanged | None:
    """mul and div by a number: what it takes away."""
    if len(node.args) > 2 or node.kwargs:
        return None
    value, factor = node.args
    constant = number(factor)
    if constant is None:
        value, constant = factor, number(value)
        if "div" in str(node.target):
            return None
    if not constant:
        return None
    decay = (1.0 / constant if "div" in str(node.target) else constant) - 1.0
    if abs(decay) > _LARGEST_DECAY:
        return None
    found = _change(editor, value, old)
    if found is None:
        return None
    lost = editor.emit(aten.mul.Tensor, cast("Node", value), decay)
    return editor.emit(aten.add.Tensor, lost, found) if isinstance(found, Node) else lost


def _chosen(editor: Editor, node: Node, old: Node) -> Node | _Unchanged | None:
    """where(mask, a, b) of two changed values."""
    mask, *values = node.args
    parts = [_change(editor, value, old) for value in values]
    if any(part is None for part in parts):
        return None
    if not any(isinstance(part, Node) for part in parts):
        return _NOTHING
    zero = editor.emit(aten.full.default, list(shape_of(node)), 0.0)
    given = [part if isinstance(part, Node) else zero for part in parts]
    return editor.emit(aten.where.self, mask, *given)


_RULES: dict[Callable[..., object], Callable[[Editor, Node, Node], Node | _Unchanged | None]] = {
    aten.add.Tensor: _added, aten.add.Scalar: _added, aten.sub.Tensor: _added, aten.sub.Scalar: _added,
    aten.mul.Tensor: _scaled, aten.mul.Scalar: _scaled, aten.div.Tensor: _scaled, aten.div.Scalar: _scaled,
    aten.where.self: _chosen,
}  # fmt: skip
