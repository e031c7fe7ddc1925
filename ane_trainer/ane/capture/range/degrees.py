"""Functions of gradients that are not linear take them without the loss scale.

    before: `clamp(g, -0.01, 0.01)`     after: `minimum(maximum(g, -0.01 * scale), 0.01 * scale)`
    before: `tanh(g)`                   after: `tanh(g * inverse) * scale`

Autograd's own backward is linear in the gradients that come in, so they may be multiplied by any number. Hooks
(`h.register_hook`) and the backward of an `autograd.Function` need not be: a threshold, a clamp, a division by a norm.
Each value is given its degree in the scale, 1 or 0; where an operation would mix them, its constants are multiplied by
the scale, or its gradients divided by it. A graph without such functions stays as it is. Test: `test_degrees.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from ane_trainer.ane.capture.range.editing import Editor, aten, in_update, is_float, number, shape_of
from ane_trainer.ane.capture.scaling import SCALING
from ane_trainer.ane.capture.trace.moves import CAST, TAKEN
from ane_trainer.ane.stages import Port

#: Functions of one tensor whose gradient has to be in its own unit.
_CURVED = (
    aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.exp.default, aten.expm1.default,
    aten.log.default, aten.log1p.default, aten.log2.default, aten.tanh.default, aten.sigmoid.default, aten.erf.default,
    aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default, aten.sin.default, aten.cos.default,
    aten.atan.default, aten.softplus.default, aten._softmax.default, aten._log_softmax.default,
)  # fmt: skip
_SIGNS = (aten.sign.default, aten.sgn.default)
#: Operations of two operands that need both in one unit; the bounds of `clamp` follow its operand.
_ALIKE = (
    aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.maximum.default,
    aten.minimum.default, *(getattr(getattr(aten, name), kind) for name in ("gt", "ge", "lt", "le", "eq", "ne")
                            for kind in ("Tensor", "Scalar")),
)  # fmt: skip
_TENSORS = {
    aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor,
    **{getattr(aten, n).Scalar: getattr(aten, n).Tensor for n in ("gt", "ge", "lt", "le", "eq", "ne")},
}  # fmt: skip
_CLAMPS: dict[Callable[..., object], tuple[int | None, int | None]] = {
    aten.clamp.default: (1, 2), aten.clamp.Tensor: (1, 2), aten.clamp_min.default: (1, None),
    aten.clamp_min.Tensor: (1, None), aten.clamp_max.default: (None, 1), aten.clamp_max.Tensor: (None, 1),
}  # fmt: skip
_PRODUCTS = (aten.mul.Tensor, aten.mm.default, aten.bmm.default)
#: What keeps numbers in the unit that they have; anything else takes gradients times the scale.
_POINTWISE = (
    *_CURVED, *_SIGNS, *_ALIKE, *_CLAMPS, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.abs.default,
    aten.pow.Tensor_Scalar, aten.where.self,
)  # fmt: skip
#: Tensors of the shape of another, whose numbers do not count.
_SHAPED_ALIKE = (
    aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default,
    aten.new_zeros.default, aten.new_full.default, aten.new_ones.default, aten.new_empty.default,
)  # fmt: skip
#: Operations whose result is 0 where the first operand is.
_ZERO_OF_ZERO = CAST | TAKEN | {
    aten.convolution_backward.default, operator.getitem, aten.mul.Tensor, aten.mm.default,
}  # fmt: skip
_FILLS = (aten.full.default, aten.full_like.default, aten.scalar_tensor.default, aten.zeros.default,
          aten.zeros_like.default, aten.new_zeros.default)  # fmt: skip


def undo_scale(graph: Graph, scale: Node, inverse: Node) -> int:
    """Rewrite a graph of gradients times `scale`, [1], so that each result is; the number of changes.

    `scale` and `inverse` are powers of two.
    """
    return _Degrees(graph, [scale], inverse).run()


def undo_loss_scale(graph: Graph, inputs: Sequence[Port]) -> int:
    """`undo_scale` for the loss scale among a step's inputs."""
    nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    known = {p.target: nodes[p.name] for p in inputs if p.target.startswith(SCALING)}
    return undo_scale(graph, known[f"{SCALING}loss_scale"], known[f"{SCALING}loss_scale_inverse"])


def is_linear(module: GraphModule) -> bool:
    """Whether a backward graph is linear in the gradients that come in, `tangents_...`."""
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    for old, new in copies.items():
        new.meta = dict(old.meta)
    tangents = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("tangents")]
    with graph.inserting_before(next(iter(graph.nodes))):
        one = graph.placeholder("loss_scale")
    one.meta["val"] = torch.ones(1)
    return not _Degrees(graph, [one, *tangents], one).run()


class _Degrees:
    def __init__(self, graph: Graph, scaled: Sequence[Node], inverse: Node) -> None:
        self._editor, self._scale, self._inverse = Editor(graph), scaled[0], inverse
        self._scaled = set(scaled)  # of degree 1
        self._own: set[Node] = set()  # made of gradients, of degree 0
        self._back: dict[Node, Node] = {}
        self._count = 0

    def run(self) -> int:
        for node in list(self._editor.graph.nodes):
            if node.op not in ("call_function", "output") or not node.all_input_nodes:
                continue
            self._editor.here = node
            if (
                node.op == "output"
                or in_update(node)
                or (self._own.intersection(node.all_input_nodes) and node.target not in _POINTWISE)
            ):
                for source in self._own.intersection(node.all_input_nodes):
                    node.replace_input_with(source, self._times_scale(source))
            if node.op == "output" or in_update(node):
                continue
            if self._scaled.intersection(node.all_input_nodes):
                self._treat(node)
            elif self._own.intersection(node.all_input_nodes):
                self._own.add(node)
        return self._count

    def _treat(self, node: Node) -> None:
        """An operation on gradients times the scale."""
        target, args = node.target, node.args
        first, second = (a if isinstance(a, Node) else None for a in (*args, None, None)[:2])
        free = False
        if target in _SHAPED_ALIKE:
            return
        if target in _SIGNS:
            free = True
        elif target in _CURVED or (target is aten.pow.Tensor_Scalar and number(args[1]) != 1.0):
            self._divide(node, 0)
            free = True
        elif target in _CLAMPS:
            self._clamp(node)
            return
        elif target in _PRODUCTS and first in self._scaled and second in self._scaled:
            self._divide(node, 1)
        elif target is aten.div.Tensor and second in self._scaled:
            if first not in self._scaled:
                self._divide(node, 1)
            free = True
        elif target in _ALIKE:
            self._alike(node, (0, 1))
        elif target is aten.where.self:
            self._alike(node, (1, 2))
        if is_float(node) or isinstance(node.meta.get("val"), (tuple, list)):
            (self._own if free else self._scaled).add(node)

    def _divide(self, node: Node, place: int) -> None:
        source = cast("Node", node.args[place])
        self._replace(
            node, place, self._editor.emit(aten.mul.Tensor, source, self._shaped(self._inverse, source))
        )

    def _clamp(self, node: Node) -> None:
        """`clamp` as a maximum and a minimum, with bounds times the scale."""
        source = found = cast("Node", node.args[0])
        if source not in self._scaled:
            self._alike(node, (0,))
            found = cast("Node", node.args[0])
        bounds = [
            None if i is None or i >= len(node.args) else node.args[i]
            for i in _CLAMPS[cast("Callable[..., object]", node.target)]
        ]
        if all(b is None or number(b) == 0.0 for b in bounds):
            self._scaled.add(node)
            return
        for bound, function in zip(bounds, (aten.maximum.default, aten.minimum.default), strict=True):
            if bound is not None:
                found = self._editor.emit(function, found, self._bound(bound, source))
        node.replace_all_uses_with(found)
        self._scaled.add(found)
        self._count += 1

    def _bound(self, bound: Argument, like: Node) -> Node:
        if isinstance(bound, Node):
            return bound if bound in self._scaled else self._times_scale(bound)
        return self._editor.times(self._shaped(self._scale, like), cast("float", number(bound)))

    def _alike(self, node: Node, places: tuple[int, ...]) -> None:
        """Operands without the scale times it, but for zeros."""
        for place in places:
            operand = node.args[place]
            if isinstance(operand, Node) and operand not in self._scaled and not _is_zero(operand):
                self._replace(node, place, self._times_scale(operand))
            elif number(operand) and place < 2:
                like = cast("Node", node.args[1 - place])
                self._replace(
                    node,
                    place,
                    self._editor.times(self._shaped(self._scale, like), cast("float", number(operand))),
                )
                node.target = _TENSORS.get(cast("Callable[..., object]", node.target), node.target)

    def _times_scale(self, source: Node) -> Node:
        """A value of degree 0 times the scale."""
        if source not in self._back:
            self._back[source] = self._editor.emit(aten.mul.Tensor, source, self._shaped(self._scale, source))
            self._scaled.add(self._back[source])
            self._count += 1
        return self._back[source]

    def _shaped(self, factor: Node, like: Node) -> Node:
        """The scale, or its inverse, for a tensor that may have no axes."""
        return factor if shape_of(like) else self._editor.view(factor, ())

    def _replace(self, node: Node, place: int, new: Node) -> None:
        node.args = (*node.args[:place], new, *node.args[place + 1 :])
        self._count += 1


def _is_zero(node: Node) -> bool:
    """Whether a value is 0, in any unit."""
    if node.op != "call_function" or node.target not in _FILLS:
        return (
            node.op == "call_function" and node.target in _ZERO_OF_ZERO and _is_zero(node.all_input_nodes[0])
        )
    if "zeros" in str(node.target):
        return True
    value = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
    return number(value) == 0.0
