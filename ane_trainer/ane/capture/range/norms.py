"""Find the norms of a graph: sums of squares under a root, and the epsilon under it."""

from __future__ import annotations

from typing import cast

from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.editing import (
    aten,
    dims_of,
    in_update,
    is_float,
    keeps_dims,
    number,
    shape_of,
)
from ane_trainer.ane.capture.trace.moves import SPREAD, TAKEN

_ROOTS = (aten.sqrt.default, aten.rsqrt.default)
REDUCTIONS = (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
_SHARED = (*REDUCTIONS, aten.sub.Tensor, aten.mul.Tensor, aten.view.default, aten.expand.default)
_PASSED = (
    *REDUCTIONS, *TAKEN, aten.clamp.default, aten.clamp_min.default, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor,
    aten.div.Scalar, aten.add.Tensor, aten.add.Scalar, aten.maximum.default,
)  # fmt: skip


def share_centred(graph: Graph) -> None:
    """One node for `x - mean(x, 1)`, `x - mean(x, -1)` and what the backward pass writes once more."""
    seen: dict[str, Node] = {}
    for node in list(graph.nodes):
        axes = dims_of(node) if node.op == "call_function" else None
        if axes and len(node.args) > 1:
            node.args = (node.args[0], axes, *node.args[2:])
        if node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(cast("Node", node.args[0]))
        if node.target is aten.view.default:
            _collapse(node)
        if node.target is aten.sub.Tensor:
            _keep_axes(node, seen)
        if node.target in _SHARED:
            first = seen.setdefault(f"{node.target}{node.args}{node.kwargs}", node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _keep_axes(node: Node, seen: dict[str, Node]) -> None:
    """`x - mean(x, [0])` as `x - mean(x, [0], True)`, which the variance over these axes has."""
    x, mean = node.args[:2]
    axes = dims_of(mean) if isinstance(mean, Node) and mean.target in REDUCTIONS[2:] else None
    if (
        not isinstance(mean, Node)
        or not axes
        or mean.args[0] is not x
        or keeps_dims(mean)
        or len(node.args) > 2
    ):
        return
    if sorted(axes) != list(range(len(axes))) or mean.kwargs:
        return
    key = f"{aten.mean.dim}{(x, axes, True)}{{}}"
    if key not in seen:
        with node.graph.inserting_before(node):
            seen[key] = node.graph.call_function(aten.mean.dim, (x, axes, True))
        seen[key].meta = dict(mean.meta)
        seen[key].meta["val"] = mean.meta["val"].reshape([1] * len(axes) + list(mean.meta["val"].shape))
    node.args = (x, seen[key])


def _collapse(node: Node) -> None:
    """A view of a view as one; a view in its source's own shape as the source."""
    source = cast("Node", node.args[0])
    while source.target is aten.view.default:
        source = cast("Node", source.args[0])
    if shape_of(source) == shape_of(node) and source.meta["val"].dtype == node.meta["val"].dtype:
        node.replace_all_uses_with(source)
    else:
        node.args = (source, list(shape_of(node)))


def squared(node: Node) -> Node | None:
    """x of `x * x`."""
    if not is_float(node):
        return None
    x = node.args[0] if node.args else None
    product = node.target is aten.mul.Tensor and x is node.args[1]
    power = node.target is aten.pow.Tensor_Scalar and number(node.args[1]) == 2.0
    return cast("Node", x) if product or power else None


def centred(c: Node) -> Node | None:
    """x of `x - mean(x)`."""
    if c.target is not aten.sub.Tensor or not isinstance(c.args[1], Node):
        return None
    mean, source = c.args[1], c.args[0]
    while mean.target in SPREAD and isinstance(mean.args[0], Node):
        mean = mean.args[0]
    return source if isinstance(source, Node) and dims_of(mean) and mean.args[0] is source else None


def is_square(node: Node) -> bool:
    """Whether a node is a value times itself."""
    return squared(node) is not None


def norm_axes(square: Node) -> list[int] | None:
    """The axes over which a square is summed before its root is taken; None if it is not."""
    for user in square.users:
        if user.target in REDUCTIONS and _to_root(user, set()):
            return dims_of(user)
    return None


def _to_root(node: Node, seen: set[Node]) -> bool:
    if node in seen or in_update(node):
        return False
    seen.add(node)
    for user in node.users:
        exponent = number(user.args[1]) if user.target is aten.pow.Tensor_Scalar else None
        if user.target in _ROOTS or exponent in (0.5, -0.5):
            return True
        if user.target in _PASSED and _by_constant(user) and _to_root(user, seen):
            return True
    return False


def _by_constant(node: Node) -> bool:
    """Whether only one argument is a node that depends on data."""
    return sum(n.op != "get_attr" and n.target is not aten.full.default for n in node.all_input_nodes) == 1


def epsilon(square: Node) -> float:
    """The number that is added before the root, 0 if there is none."""
    pending, seen = list(square.users), set()
    while pending:
        node = pending.pop()
        if node in seen or node.target not in _PASSED:
            continue
        seen.add(node)
        if node.target in (aten.add.Tensor, aten.add.Scalar) and (number(node.args[1]) or 0.0) > 0.0:
            return number(node.args[1]) or 0.0
        pending.extend(node.users)
    return 0.0


def euclidean(node: Node) -> bool:
    """Whether a node is the norm of order 2 of a tensor."""
    if node.target is not aten.linalg_vector_norm.default:
        return False
    order = number(node.args[1]) if len(node.args) > 1 else 2.0
    return (
        order == 2.0 and is_float(node) and not in_update(node) and bool(shape_of(cast("Node", node.args[0])))
    )


def is_zero(argument: object) -> bool:
    """Whether an argument is the number 0 or a tensor of zeros."""
    if number(argument) == 0.0:
        return True
    if not isinstance(argument, Node):
        return False
    places = {"aten.scalar_tensor.default": 0, "aten.full.default": 1, "aten.full_like.default": 1}
    place = places.get(str(argument.target))
    zeros = argument.target in (aten.zeros_like.default, aten.zeros.default)
    return zeros or (place is not None and number(argument.args[place]) == 0.0)
