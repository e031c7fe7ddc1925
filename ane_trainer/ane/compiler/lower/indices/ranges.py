"""Bounds of the integers that a graph computes, and which of them something reads exactly.

fp16 holds integers up to 2048. A node whose bound is larger, and that a look-up, a comparison or a division reads, must
travel in two numbers (`split.py`); one that only turns into a float may round as every float does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS, MOVES
from ane_trainer.ane.mil.program import MAX_FP16

#: Least and largest integer.
Bounds = tuple[float, float]

COMPARISONS = frozenset("eq ne lt le gt ge".split())
#: Ops whose results are wrong, not only rounded, where their operands are.
DIVISIONS = frozenset(
    "floor_divide remainder fmod div bitwise_and bitwise_or bitwise_xor bitwise_not __and__ __or__ __xor__ "
    "__rshift__ __lshift__ bitwise_left_shift bitwise_right_shift".split()
)
#: Ops that order integers, or multiply them with each other: none of two that round to one.
_ORDERING = frozenset(
    "sort topk amax amin aminmax cummax cummin max min argmax argmin mode kthvalue median prod pow".split()
)
_LINEAR = frozenset(
    "add sub rsub mul neg abs sum cumsum clamp clamp_min clamp_max minimum maximum where".split()
)
_INDEXED = frozenset(
    "embedding embedding_dense_backward nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward "
    "gather index index_select index_put scatter scatter_add scatter_reduce one_hot _unsafe_index "
    "_unsafe_index_put".split()
)


def integral(value: object) -> bool:
    """Whether a (fake) tensor, or the first of several, holds integers."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    dtype = getattr(first, "dtype", None)
    return dtype is not None and not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def packet_name(node: Node) -> str:
    """The ATen name without namespace and overload."""
    if node.target is operator.getitem:
        return "getitem"
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def too_large(bounds: Bounds) -> bool:
    """Whether fp16 does not hold every integer within the bounds."""
    return max(-bounds[0], bounds[1]) > EXACT_INTEGERS


def read_exactly(graph: GraphModule, results: Iterable[Node] = ()) -> set[Node]:
    """The integer nodes that a look-up, comparison, division or difference reads, also through sums and movement.

    `results` are those of the graph's that are to be exact.
    """
    found: set[Node] = set(results)
    for node in reversed(list(graph.graph.nodes)):
        if integral(node.meta.get("val")) and any(_demands(user, node, found) for user in node.users):
            found.add(node)
    return found


def _demands(user: Node, node: Node, found: set[Node]) -> bool:
    name = packet_name(user)
    whole = integral(user.meta.get("val"))
    if name in _INDEXED:
        return any(a is node for a in _leaves(user.args[1:])) or (whole and user in found)
    if name in COMPARISONS or (whole and (name in DIVISIONS or name in _ORDERING or name in ("sub", "rsub"))):
        return True
    return (
        whole and user in found and (name in _LINEAR or name in MOVES or name in ("_to_copy", "masked_fill"))
    )


def _leaves(value: object) -> list[object]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def bounds_of(graph: GraphModule, inputs: Mapping[Node, Bounds]) -> dict[Node, Bounds]:
    """Bounds of each integer node; a node of an op that is not known here has none."""
    found: dict[Node, Bounds] = dict(inputs)
    constants: dict[Node, torch.Tensor] = {}
    for node in graph.graph.nodes:
        if node in found or not integral(node.meta.get("val")):
            continue
        value = _constant(graph, node, constants)
        if value is not None:
            constants[node] = value
            if value.numel():
                found[node] = (float(value.min()), float(value.max()))
            continue
        bounds = _computed(node, found)
        if bounds is not None:
            found[node] = bounds
    return found


def _constant(graph: GraphModule, node: Node, known: Mapping[Node, torch.Tensor]) -> torch.Tensor | None:
    """The node's value if it depends on no input."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(graph)
        return value if isinstance(value, torch.Tensor) else None
    if node.op != "call_function" or not all(source in known for source in node.all_input_nodes):
        return None
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    args = torch.fx.node.map_arg(node.args, lambda n: known[n])
    keywords = torch.fx.node.map_arg(node.kwargs, lambda n: known[n])
    if "device" in keywords:
        keywords = {**keywords, "device": torch.device("cpu")}
    assert callable(node.target)
    views = torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default
    # A constant's memory may lie otherwise than the tensor's that was traced.
    target = torch.ops.aten.reshape.default if node.target in views else node.target
    value = target(*args, **keywords)
    return value if isinstance(value, torch.Tensor) else None


def constant_of(graph: GraphModule, node: Node) -> torch.Tensor | None:
    """The value of a node that depends on no input; None of any other."""
    known: dict[Node, torch.Tensor] = {}
    pending = [node]
    while pending:
        source = pending[-1]
        missing = [n for n in source.all_input_nodes if n not in known]
        if source.op not in ("call_function", "get_attr"):
            return None
        pending += missing
        if not missing:
            value = _constant(graph, pending.pop(), known)
            if value is None:
                return None
            known[source] = value
    return known[node]


def _computed(node: Node, found: Mapping[Node, Bounds]) -> Bounds | None:
    name = packet_name(node)
    rule = _RULES.get(name)
    if rule is None:
        return _hull(node.all_input_nodes, found) if name in MOVES else None
    try:
        return rule(node, lambda arg: _known(arg, found))
    except KeyError:
        return None


def _known(arg: object, found: Mapping[Node, Bounds]) -> Bounds:
    """Bounds of an argument; KeyError if they are not known."""
    if isinstance(arg, Node):
        value = arg.meta.get("val")
        if arg not in found and getattr(value, "dtype", None) == torch.bool:
            return (0.0, 1.0)
        if arg not in found and value is not None and not integral(value):
            return (-MAX_FP16, MAX_FP16)
        return found[arg]
    if isinstance(arg, (int, float)):
        return (float(arg), float(arg))
    raise KeyError(arg)


def _hull(nodes: Iterable[Node], found: Mapping[Node, Bounds]) -> Bounds | None:
    bounds = [found[n] for n in nodes if n in found]
    if not bounds or any(integral(n.meta.get("val")) and n not in found for n in nodes):
        return None
    return (min(b[0] for b in bounds), max(b[1] for b in bounds))


_Of = Callable[[object], Bounds]


def _products(x: Bounds, y: Bounds) -> Bounds:
    ends = [a * b for a in x for b in y]
    return (min(ends), max(ends))


def _add(node: Node, of: _Of, sign: float = 1.0) -> Bounds:
    x, y = of(node.args[0]), _products(of(node.args[1]), of(node.kwargs.get("alpha", 1)))
    return (x[0] + y[0], x[1] + y[1]) if sign > 0 else (x[0] - y[1], x[1] - y[0])


def _rsub(node: Node, of: _Of) -> Bounds:
    x, y = of(node.args[1]), of(node.args[0])
    return (x[0] - y[1], x[1] - y[0])


def _divided(node: Node, of: _Of) -> Bounds:
    x, y = of(node.args[0]), of(node.args[1])
    if y[0] <= 0 <= y[1]:
        return (min(x[0], -x[1]), max(x[1], -x[0]))
    ends = [a / b for a in x for b in y]
    return (math.floor(min(ends)), math.floor(max(ends)))


def _remainder(node: Node, of: _Of) -> Bounds:
    y = of(node.args[1])
    return (min(y[0] + 1, 0.0), max(y[1] - 1, 0.0))


def _fmod(node: Node, of: _Of) -> Bounds:
    x, y = of(node.args[0]), of(node.args[1])
    most = max(-y[0], y[1]) - 1
    return (max(-most, min(x[0], 0.0)), min(most, max(x[1], 0.0)))


def _clamp(node: Node, of: _Of) -> Bounds:
    x = of(node.args[0])
    arguments = [*node.args[1:], node.kwargs.get("min"), node.kwargs.get("max")]
    name = packet_name(node)
    low = arguments[0] if name != "clamp_max" else None
    high = arguments[0] if name == "clamp_max" else (arguments[1] if name == "clamp" else None)
    least, most = x
    if low is not None:
        bound = of(low)
        least, most = max(least, bound[0]), max(most, bound[1])
    if high is not None:
        bound = of(high)
        least, most = min(least, bound[0]), min(most, bound[1])
    return (least, most)


def _sum(node: Node, of: _Of) -> Bounds:
    source: Any = node.args[0]
    count = source.meta["val"].numel() / max(1, node.meta["val"].numel())
    low, high = of(source)
    return (min(low * count, low), max(high * count, high))


def _cumsum(node: Node, of: _Of) -> Bounds:
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    count = shape[int(node.args[1])] if shape else 1  # type: ignore[arg-type]
    low, high = of(source)
    return (min(low * count, low), max(high * count, high))


def _copied(node: Node, of: _Of) -> Bounds:
    return of(node.args[0])


def _union(*places: int) -> Callable[[Node, _Of], Bounds]:
    def rule(node: Node, of: _Of) -> Bounds:
        found = [of(node.args[p]) for p in places if p < len(node.args)]
        return (min(b[0] for b in found), max(b[1] for b in found))

    return rule


def _joined(node: Node, of: _Of) -> Bounds:
    found = [of(item) for item in node.args[0]]  # type: ignore[union-attr]
    return (min(b[0] for b in found), max(b[1] for b in found))


def _padded(node: Node, of: _Of) -> Bounds:
    x, value = of(node.args[0]), float(node.args[2]) if len(node.args) > 2 else 0.0  # type: ignore[arg-type]
    return (min(x[0], value), max(x[1], value))


def _magnitude(node: Node, of: _Of) -> Bounds:
    low, high = of(node.args[0])
    return (0.0 if low <= 0 <= high else min(abs(low), abs(high)), max(-low, high))


def _negative(node: Node, of: _Of) -> Bounds:
    low, high = of(node.args[0])
    return (-high, -low)


def _places(node: Node, of: _Of) -> Bounds:
    """Positions along the axis that an argmax or sort searches."""
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    extent = shape[dim] if isinstance(dim, int) and shape else source.meta["val"].numel()
    return (0.0, float(extent - 1))


#: Ops whose second result are places along an axis -> the place of the axis among their arguments, and its default.
PLACING: Mapping[str, tuple[int, int]] = {
    "max": (1, 0), "min": (1, 0), "topk": (2, -1), "sort": (1, -1), "kthvalue": (2, -1), "median": (1, -1),
    "mode": (1, -1), "cummax": (1, 0), "cummin": (1, 0),
}  # fmt: skip


def _item(node: Node, of: _Of) -> Bounds:
    """One of several results: places along an axis, or what moves went on."""
    source: Any = node.args[0]
    place = PLACING.get(packet_name(source))
    if place is None or node.args[1] != 1:
        found = [of(a) for a in source.all_input_nodes if integral(a.meta.get("val"))]
        if (place is None and packet_name(source) not in MOVES) or not found:
            raise KeyError(source)
        return (min(b[0] for b in found), max(b[1] for b in found))
    given = source.args[place[0]] if len(source.args) > place[0] else source.kwargs.get("dim", place[1])
    shape = source.args[0].meta["val"].shape
    return (0.0, float(shape[given] - 1 if shape else 0))


def _found(place: int) -> Callable[[Node, _Of], Bounds]:
    """Places among boundaries, the argument at `place`."""

    def rule(node: Node, of: _Of) -> Bounds:
        boundaries = node.args[place]
        assert isinstance(boundaries, Node)
        return (0.0, float(boundaries.meta["val"].shape[-1]))

    return rule


def _power(node: Node, of: _Of) -> Bounds:
    low, high = of(node.args[0])
    most = max(-low, high, 1.0) ** min(of(node.args[1])[1], 64.0)
    return (-most if low < 0 else 0.0, most)


def _product(node: Node, of: _Of) -> Bounds:
    source: Any = node.args[0]
    low, high = of(source)
    most = max(-low, high, 1.0) ** min(source.meta["val"].numel() / max(1, node.meta["val"].numel()), 64.0)
    return (-most if low < 0 else 0.0, most)


def _bitwise(node: Node, of: _Of) -> Bounds:
    ends = [e for arg in node.args for e in of(arg)]
    power = 2.0 ** max(1, math.ceil(math.log2(max(1.0, *(abs(e) + 1 for e in ends)))))
    return (-power if min(ends) < 0 else 0.0, power - 1)


def _shifted(node: Node, of: _Of) -> Bounds:
    left = "left" in packet_name(node) or "lshift" in packet_name(node)
    by = of(node.args[1])
    x = of(node.args[0])
    factors = [2.0 ** (e if left else -e) for e in by]
    return _products(x, (min(factors), max(factors)))


_RULES: dict[str, Callable[[Node, _Of], Bounds]] = {
    "add": _add, "sub": lambda node, of: _add(node, of, -1.0), "rsub": _rsub,
    "mul": lambda node, of: _products(of(node.args[0]), of(node.args[1])),
    "floor_divide": _divided, "div": _divided, "remainder": _remainder, "fmod": _fmod,
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp, "minimum": _union(0, 1), "maximum": _union(0, 1),
    "abs": _magnitude, "neg": _negative, "sum": _sum, "cumsum": _cumsum, "where": _union(1, 2),
    "masked_fill": _union(0, 2), "cat": _joined, "stack": _joined, "constant_pad_nd": _padded, "_to_copy": _copied,
    "gather": _copied, "index": _copied, "index_select": _copied,
    **dict.fromkeys("amax amin max min".split(), _copied),
    "argmax": _places, "argmin": _places, "getitem": _item, "full_like": lambda node, of: of(node.args[1]),
    "zeros_like": lambda node, of: (0.0, 0.0), "ones_like": lambda node, of: (1.0, 1.0),
    "one_hot": lambda node, of: (0.0, 1.0),
    "bitwise_and": _bitwise, "bitwise_or": _bitwise, "bitwise_xor": _bitwise, "__and__": _bitwise, "__or__": _bitwise,
    "__xor__": _bitwise, "bitwise_not": lambda node, of: (-of(node.args[0])[1] - 1, -of(node.args[0])[0] - 1),
    "bitwise_left_shift": _shifted, "bitwise_right_shift": _shifted, "__lshift__": _shifted, "__rshift__": _shifted,
    "bucketize": _found(1), "searchsorted": _found(0),
    "pow": _power, "prod": _product,
    "sign": lambda node, of: (-1.0, 1.0), "masked_scatter": _union(0, 2),
    "slice_scatter": _union(0, 1),
    "select_scatter": _union(0, 1),
}  # fmt: skip
