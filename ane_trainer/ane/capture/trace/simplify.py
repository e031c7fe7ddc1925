"""Simplify a traced graph: remove identities, repeated values and dead nodes before lowering.

before: `t = permute(x, [1, 0]); u = permute(t, [1, 0]); v = view(u, same shape)`   after: `x`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from ane_trainer.ane.capture.trace.moves import COPIES, TAKEN, VIEWS
from ane_trainer.ane.capture.trace.unrolled import multiply_together, read_through

aten = torch.ops.aten

#: Meta key of the products that `_multiply_one_by_one` makes, innermost 0.
_CHAIN = "ane_chain"

#: Operations of two tensors, and how they are spelled where the second is one number.
_WITH_NUMBER: dict[object, Callable[..., object]] = {
    **{op.Tensor: op.Tensor for op in (aten.mul, aten.div, aten.add, aten.sub)},
    **{op.Tensor: op.Scalar for op in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)},
    aten.pow.Tensor_Tensor: aten.pow.Tensor_Scalar,
    aten.maximum.default: aten.clamp.default,
    aten.minimum.default: aten.clamp.default,
}
_COMMUTE = {aten.mul.Tensor, aten.add.Tensor, aten.maximum.default, aten.minimum.default}

#: Tensors whose content nobody may read: with zeros, a calibration does not take old memory for values.
_UNWRITTEN = {
    aten.empty.memory_format, aten.empty_permuted.default, aten.empty_strided.default, aten.empty_like.default,
    aten.new_empty.default, aten.new_empty_strided.default,
}  # fmt: skip


def simplify(graph: Graph) -> None:
    """Simplify in place; results keep their values and order."""
    for node in list(graph.nodes):
        if node.op == "call_function":
            _rewrite(node)
            _spell_number(node)
            _read_whole(node)
            _multiply_one_by_one(node)
            _divide_first(node)
            same = _same_as(node)
            if same is not None:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
    _share_repeated(graph)
    _drop_needless_choices(graph)
    drop_dead(graph)
    if read_through(graph) + multiply_together(graph):
        _share_repeated(graph)
        drop_dead(graph)


def drop_dead(graph: Graph) -> None:
    """Take out operations and constants that nothing reads; inputs stay."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The static shape of a node's tensor, or None if it is no tensor."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return None if shape is None else tuple(shape)


def dtype_of(node: Node) -> torch.dtype | None:
    """The dtype of a node's tensor, or None if it is no tensor."""
    return getattr(node.meta.get("val"), "dtype", None)


def _rewrite(node: Node) -> None:
    """One spelling for reshapes; a view of a view and a permute of a permute become one."""
    source = _as_node(node.args[0]) if node.args else None
    inner_target = None if source is None else source.target
    if node.target in _UNWRITTEN and (shape := shape_of(node)) is not None:
        node.target = aten.full.default
        node.args, node.kwargs = (list(shape), 0), {"dtype": dtype_of(node)}
    elif node.target in VIEWS:
        node.target = aten.view.default
        node.args = (source, list(shape_of(node) or ()))
        if source is not None and inner_target is aten.view.default:
            node.args = (source.args[0], node.args[1])
    elif source is not None and node.target is inner_target is aten.permute.default:
        inner, outer = _permutation(source), _permutation(node)
        node.args = (source.args[0], [inner[i] for i in outer])


def _spell_number(node: Node) -> None:
    """`minimum(x, torch.tensor(1e12))` -> `clamp(x, max=1e12)`, and so on: a number fp16 need not hold.

    Autograd's own operations are in the graph already, so what it does where both are equal stays.
    """
    spelled = _WITH_NUMBER.get(node.target)
    if spelled is None:
        return
    for place in (1, 0) if node.target in _COMMUTE and not node.kwargs else (1,):
        other, value = _as_node(node.args[1 - place]), _number_of(node.args[place])
        if other is None or value is None or shape_of(other) != shape_of(node):
            continue
        if dtype_of(other) != dtype_of(node) and dtype_of(node) is not torch.bool:
            continue
        least = (None,) if node.target is aten.minimum.default else ()
        node.target, node.args = spelled, (other, *least, value)
        return


def _number_of(argument: object) -> float | None:
    """The finite number that a constant of one float is; None for anything else."""
    node = _as_node(argument)
    if node is None or node.op != "get_attr":
        return None
    held = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(held, torch.Tensor) or held.numel() != 1 or not held.is_floating_point():
        return None
    value = float(held)
    return value if math.isfinite(value) else None


def _read_whole(node: Node) -> None:
    """`move(i.float()).long()` -> `move(i).long()`, i whole: fp16 need not hold the number in between.

    So Keras hands class numbers to its losses, as floats. float32 would round beyond 16,777,216.
    """
    if node.target is not aten._to_copy.default or not _whole(node):
        return
    moves, source = list[Node](), _as_node(node.args[0])
    while source is not None and source.target in TAKEN:
        moves.append(source)
        source = _as_node(source.args[0])
    if source is None or source.target is not aten._to_copy.default:
        return
    origin = _as_node(source.args[0])
    if origin is None or not _whole(origin) or dtype_of(source) not in (torch.float32, torch.float64):
        return
    for move in reversed(moves):
        with node.graph.inserting_before(node):
            moved = node.graph.call_function(move.target, (origin, *move.args[1:]), move.kwargs)  # type: ignore[arg-type]
        value = torch.empty(shape_of(move) or (), dtype=dtype_of(origin), device="meta")
        moved.meta, origin = {**move.meta, "val": value}, moved
    node.args = (origin, *node.args[1:])


def _whole(node: Node) -> bool:
    kind = dtype_of(node)
    return kind is not None and not (kind.is_floating_point or kind.is_complex)


def _multiply_one_by_one(node: Node) -> None:
    """`mul(g, pow(rsqrt(v), 3))` -> `mul(mul(mul(g, r), r), r)`, r = rsqrt(v): the gradient of rsqrt.

    The cube leaves fp16 for v below 6e-4, the usual size before the first norm of a transformer; the product
    with g does not.
    """
    if node.target is not aten.mul.Tensor:
        return
    for power, other in (node.args, node.args[::-1]):
        if not isinstance(power, Node) or power.target is not aten.pow.Tensor_Scalar or power.args[1] != 3:
            continue
        root = _as_node(power.args[0])
        if root is None or root.target is not aten.rsqrt.default:
            continue
        for number in range(2):
            with node.graph.inserting_before(node):
                inner = node.graph.call_function(aten.mul.Tensor, (other, root))
            inner.meta = {**node.meta, _CHAIN: number}
            other = inner
        node.args = (other, root)
        node.meta[_CHAIN] = 2
        return


def _divide_first(node: Node) -> None:
    """`div(expand(mul(mul(mul(g, r), r), r)), n)` -> `expand(mul(mul(mul(div(g, n), r), r), r))`

    The gradient of rsqrt under that of a mean over n: the product of the sum over n with the cube of r may leave
    fp16, its n-th part does not.
    """
    if node.target not in (aten.div.Tensor, aten.div.Scalar) or not isinstance(node.args[1], (int, float)):
        return
    spread = _as_node(node.args[0])
    top = None if spread is None or spread.target is not aten.expand.default else _as_node(spread.args[0])
    if (
        spread is None
        or top is None
        or top.meta.get(_CHAIN) != 2
        or len(top.users) > 1
        or len(spread.users) > 1
    ):
        return
    first = top
    while first.meta.get(_CHAIN) != 0:
        first = first.args[0]  # type: ignore[assignment]
    with node.graph.inserting_before(first):
        part = node.graph.call_function(aten.div.Tensor, (first.args[0], node.args[1]))
    part.meta = {k: v for k, v in first.args[0].meta.items() if k != _CHAIN}  # type: ignore[union-attr]
    first.args = (part, first.args[1])
    node.target, node.args = aten.alias.default, (spread,)


def _permutation(node: Node) -> list[int]:
    dims = node.args[1]
    assert isinstance(dims, (list, tuple))
    return [int(d) % len(dims) for d in dims]  # type: ignore[arg-type]


def _same_as(node: Node) -> Node | None:
    """The argument that `node` is equal to, or None."""
    if node.target is aten.copy_.default:
        return _as_node(node.args[1])
    source = _as_node(node.args[0]) if node.args else None
    if source is None:
        return None
    if node.target in COPIES:  # values are immutable in a functional graph
        return source
    test = _IDENTITY_TESTS.get(node.target)
    alike = shape_of(node) == shape_of(source) and dtype_of(node) == dtype_of(source)
    return source if test is not None and alike and test(node) else None


def _as_node(argument: object) -> Node | None:
    return argument if isinstance(argument, Node) else None


_IDENTITY_TESTS: dict[object, Callable[[Node], bool]] = {
    aten.view.default: lambda node: True,
    aten.expand.default: lambda node: True,
    aten._to_copy.default: lambda node: True,
    aten.permute.default: lambda node: _permutation(node) == list(range(len(_permutation(node)))),
    aten.mul.Tensor: lambda node: _is_number(node.args[1], 1),
    aten.div.Tensor: lambda node: _is_number(node.args[1], 1),
    aten.add.Tensor: lambda node: _is_number(node.args[1], 0),
    aten.sub.Tensor: lambda node: _is_number(node.args[1], 0),
}


def _is_number(argument: object, number: int) -> bool:
    return isinstance(argument, (int, float)) and argument == number


def _share_repeated(graph: Graph) -> None:
    """Common subexpressions: a pure op on the same arguments is computed once."""
    seen: dict[object, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _drop_needless_choices(graph: Graph) -> None:
    """`where(c, x, x)` -> `x`."""
    for node in list(graph.nodes):
        if node.target is aten.where.self and node.args[1] is node.args[2]:
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)


def _frozen(argument: object) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(map(_frozen, argument))
    if isinstance(argument, dict):
        return tuple((key, _frozen(value)) for key, value in sorted(argument.items()))
    sign = math.copysign(1.0, argument) if isinstance(argument, float) else 1.0  # 0 and -0 are equal
    return (type(argument).__name__, argument, sign)
