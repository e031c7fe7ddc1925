"""Integer nodes in split form: moved, computed or looked up as two numbers, and joined where one number is enough.

Integers in two numbers are what is left of a division by 1024, and the quotient (rounded down, so -100 is -1 and 924).
Both are fp16 integers, and so are their sums, for integers and tables of up to 2 million.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices import arithmetic as exact
from ane_trainer.ane.compiler.lower.indices import ordering
from ane_trainer.ane.compiler.lower.indices.choose import MOST_ROWS, Integers, float_source, rows_of
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS, MOVES, coded
from ane_trainer.ane.compiler.lower.indices.ranges import (
    COMPARISONS,
    DIVISIONS,
    integral,
    packet_name,
    too_large,
)
from ane_trainer.ane.compiler.lower.operands import Encoded, Operand, as_tensor, is_bool, shape_of
from ane_trainer.ane.compiler.lower.registry import ACCEPTS, RULES
from ane_trainer.ane.mil.program import Value
from ane_trainer.ane.stages import PAIR

#: Places of numbers, beside the tensors, among the arguments of ops that move integers.
_NUMBERS = {"constant_pad_nd": (2,), "where": (1, 2), "masked_fill": (2,)}
#: Ops that pick elements of their first argument.
_PICKS = ("gather", "index", "index_select", "_unsafe_index")
_NARROW = "Keep them below 2048: take the remainder or the difference earlier, or do this on the host."


def concerns(integers: Integers, node: Any, leaves: list[object]) -> bool:
    """Whether a node's integers need more than its rule: they are encoded, leave fp16's integers, or are divided."""
    if any(isinstance(leaf, Encoded) for leaf in leaves) or node in integers.split:
        return True
    if _small_index(integers, node):
        return True
    return integral(node.meta.get("val")) and packet_name(node) in DIVISIONS


def _small_index(integers: Integers, node: torch.fx.Node) -> bool:
    """Whether computed integers that fp16 holds look up a table of more rows than it has integers."""
    name = packet_name(node)
    index = node.args[1] if name in ("embedding", "embedding_dense_backward") else None
    if not isinstance(index, torch.fx.Node) or index.op != "call_function":
        return False
    known = integers.bounds.get(index)
    if known is None or too_large(known):
        return False
    return (rows_of(node, index, name) or 0) > EXACT_INTEGERS + 1


def lower(
    ctx: Context, integers: Integers, rule: Callable[..., object], args: list[Any], keywords: dict[str, Any]
) -> Any:
    """The result of the present node, which `concerns`.

    Movement acts on each part alike; arithmetic and comparisons have rules here; look-ups take the integers as they
    are; what becomes a float is joined, and so is a result that fp16 holds.
    Raises: Refusal for ops on integers in two numbers that have no rule, and for integers beyond 2 million.
    """
    assert ctx.node is not None
    node, name, whole = ctx.node, packet_name(ctx.node), integral(ctx.meta)
    bounds = integers.bounds.get(node)
    encoded = [leaf for leaf in _leaves(args) if isinstance(leaf, Encoded)]
    source = None if encoded else float_source(node)
    if source is not None and source[0] in ctx.wide:
        return _turned(ctx, node)
    if _small_index(integers, node) and isinstance(args[1], Value):
        return rule(ctx, args[0], exact.as_pair(ctx, args[1]), *args[2:], **keywords)
    if name in _PICKS and (node in integers.split or isinstance(args[0], Encoded)):
        first = args[0] if isinstance(args[0], Encoded) else exact.as_pair(ctx, args[0])
        return _moved(ctx, name, rule, [first, *args[1:]], keywords, only_first=True)
    if name in MOVES or (name in _NUMBERS and encoded) or (name == "_to_copy" and whole and encoded):
        return _moved(ctx, name, rule, args, keywords)
    if str(node.target) in ACCEPTS["encoded"] or any(e.encoding == "coded" for e in encoded):
        return _looked_up(ctx, name, rule, args, keywords)
    if name in COMPARISONS:
        return _compared(ctx, name, args[0], args[1])
    if not whole:
        return rule(ctx, *[_each(arg, lambda a: exact.joined(ctx, a)) for arg in args], **keywords)
    if bounds is not None and max(-bounds[0], bounds[1]) >= MOST_ROWS:
        raise ctx.refuse(f"needs integers below {MOST_ROWS}; these can reach {bounds[1]:.0f}.", _NARROW)
    own = _RULES.get(name)
    result = own(ctx, integers, *args, **keywords) if own is not None else None
    if isinstance(result, tuple):  # values in order, and their places
        return result
    if result is None:
        if encoded or node in integers.split:
            raise ctx.refuse("needs integers up to 2048, which fp16 holds; these can be larger.", _NARROW)
        return rule(ctx, *args, **keywords)
    result = _each(result, lambda part: ctx.broadcast(part, ctx.shape) if isinstance(part, Encoded) else part)
    if isinstance(result, Encoded) and (bounds is None or too_large(bounds)):
        return result.each(lambda part: ctx.broadcast(part, ctx.shape))
    return ctx.broadcast(exact.joined(ctx, result), ctx.shape)


def _turned(ctx: Context, node: torch.fx.Node) -> Encoded:
    """Floats of an input, moved as the graph moves them, without what is behind the point."""
    moves, source = [], cast("torch.fx.Node", node.args[0])
    while source not in ctx.wide:
        moves.append(source)
        source = source.all_input_nodes[0]
    value = ctx.wide[source]
    for move in reversed([m for m in moves if packet_name(m) in MOVES]):  # the others undo the port's scale
        ctx.node = move
        value = _moved(
            ctx, packet_name(move), RULES[str(move.target)], [value, *move.args[1:]], dict(move.kwargs)
        )
    ctx.node = node
    low, high = value.parts
    whole = ctx.mul(ctx.unary("sign", low), exact.floor(ctx, ctx.unary("abs", low)))
    return exact.carried(ctx, whole, high)


def _looked_up(
    ctx: Context, name: str, rule: Callable[..., object], args: list[Any], keywords: dict[str, object]
) -> Any:
    assert ctx.node is not None
    if name in ("eq", "ne"):
        return _compared(ctx, name, args[0], args[1])
    if str(ctx.node.target) not in ACCEPTS["encoded"]:
        raise ctx.refuse("computes with integers that are sent as codes.", "Pass them as two inputs.")
    return rule(ctx, *args, **keywords)


def _moved(
    ctx: Context, name: str, rule: Callable[..., Any], args: list[object], keywords: dict[str, object], *,
    only_first: bool = False,
) -> Any:  # fmt: skip
    """The movement of each part; constants and other integers among the arguments are encoded alike."""
    found = [leaf for leaf in _leaves(args[:1] if only_first else args) if isinstance(leaf, Encoded)]
    encoding = "split" if not found or any(e.encoding == "split" for e in found) else "coded"
    if name == "constant_pad_nd":
        args = [*args, 0][:3]
    numbers = _NUMBERS.get(name, ())
    moved = args[:1] if only_first else args
    encoded = [_encoded(ctx, arg, encoding, place in numbers) for place, arg in enumerate(moved)]
    rest = args[len(moved) :]
    if name in ("where", "masked_fill"):
        at = 0 if name == "where" else 1
        encoded[at] = args[at]
    count = 2 if encoding == "split" else 1
    parts = [rule(ctx, *(_part(arg, k) for arg in encoded), *rest, **keywords) for k in range(count)]
    if isinstance(parts[0], (list, tuple)):
        return [Encoded(tuple(part), encoding) for part in zip(*parts, strict=True)]
    return Encoded(tuple(parts), encoding)


def _leaves(args: Any) -> list[object]:
    return [leaf for arg in args for leaf in (_leaves(arg) if isinstance(arg, (list, tuple)) else [arg])]


def _each(arg: object, function: Callable[[Any], object]) -> Any:
    return [_each(item, function) for item in arg] if isinstance(arg, (list, tuple)) else function(arg)


def _encoded(ctx: Context, arg: object, encoding: str, number: bool) -> Any:
    if isinstance(arg, (list, tuple)) and any(isinstance(a, (Value, torch.Tensor, Encoded)) for a in arg):
        return [_encoded(ctx, item, encoding, number) for item in arg]
    if isinstance(arg, (Value, torch.Tensor, Encoded)) or (number and isinstance(arg, (int, float))):
        return _in_encoding(ctx, arg, encoding)
    return arg


def _part(arg: object, k: int) -> Any:
    if isinstance(arg, list):
        return [_part(item, k) for item in arg]
    part = arg.parts[k] if isinstance(arg, Encoded) else arg
    return float(part) if isinstance(part, torch.Tensor) and not part.dim() else part


def _in_encoding(ctx: Context, x: Operand, encoding: str) -> Encoded:
    """Integers (constants, or a value that fp16 holds) in an encoding; refuses codes in two numbers."""
    if isinstance(x, Encoded):
        if x.encoding != encoding:
            raise ctx.refuse(
                "mixes integers sent as codes with integers in two numbers.", "Pass them as two inputs."
            )
        return x
    if encoding == "coded":
        return Encoded((x if isinstance(x, Value) else coded(torch.as_tensor(x)),), "coded")
    return exact.as_pair(ctx, x)


def _compared(ctx: Context, name: str, x: Operand, y: Operand) -> Operand:
    """`mul(equal(lx, ly), equal(hx, hy))`, by their order otherwise; codes are equal where their integers are"""
    encoding = next((e.encoding for e in (x, y) if isinstance(e, Encoded)), "split")
    a, b = (_in_encoding(ctx, v, encoding).parts for v in (x, y))
    if encoding == "coded":
        return ctx.binary("equal" if name == "eq" else "not_equal", a[0], b[0])
    if name not in ("eq", "ne"):
        kind = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}[name]
        return ctx.binary(kind, exact.order(ctx, x, y), 0.0)
    both = ctx.mul(*(ctx.number(ctx.binary("equal", p, q)) for p, q in zip(a, b, strict=True)))
    same = ctx.boolean_of_01(both)
    if not isinstance(same, Value):
        return as_tensor(same).bool() if name == "eq" else ~as_tensor(same).bool()
    return same if name == "eq" else ctx.emit("logical_not", x=same)


# -- arithmetic: (ctx, integers, arguments) -> integers in two numbers, one number, or None ------------------


def _least(ctx: Context, integers: Integers, place: int) -> float:
    assert ctx.node is not None
    source = ctx.node.args[place]
    if isinstance(source, torch.fx.Node):
        known = integers.bounds.get(source)
        return known[0] if known is not None else -float(MOST_ROWS)
    return float(source)  # type: ignore[arg-type]


def _signed(ctx: Context, integers: Integers) -> bool:
    return _least(ctx, integers, 0) < 0 or _least(ctx, integers, 1) < 0


def _sum(sign: int) -> Callable[..., Operand]:
    def rule(ctx: Context, integers: Integers, x: Operand, y: Operand, alpha: int = 1) -> Operand:
        if not isinstance(y, (Value, Encoded)):
            return exact.add(ctx, x, as_tensor(ctx.number(y)) * sign * alpha)
        if alpha != 1:
            y = exact.multiply(ctx, y, float(alpha), signed=True)
        return exact.add(ctx, x, y) if sign > 0 else exact.subtract(ctx, x, y)

    return rule


def _product(ctx: Context, integers: Integers, x: Operand, y: Operand) -> Operand:
    return exact.multiply(ctx, x, y, signed=_signed(ctx, integers))


def _division(part: int, mode: str = "floor") -> Callable[..., Operand | None]:
    def rule(
        ctx: Context, integers: Integers, x: Operand, y: Operand, rounding_mode: str | None = mode
    ) -> Operand | None:
        if rounding_mode is None or is_bool(x):
            return None
        constant = not isinstance(y, (Value, Encoded)) and bool((as_tensor(y) > 0).all())
        least = _least(ctx, integers, 0)
        if constant and (rounding_mode == "floor" or least >= 0):
            small = not isinstance(x, Encoded) and least >= 0 and bool((as_tensor(y) <= PAIR).all())
            known = ctx.node is not None and integers.bounds.get(ctx.node.args[0])  # type: ignore[arg-type]
            if small and known and not too_large(known):
                return exact.small_divmod(ctx, x, as_tensor(y))[part]
            return exact.divmod_by(ctx, x, y, least)[part]
        if constant:
            return exact.truncated_divmod(ctx, x, y)[part]
        if isinstance(x, Encoded) or isinstance(y, Encoded):
            return None
        return exact.signed_divmod(ctx, x, y, truncated=rounding_mode == "trunc")[part]

    return rule


def _total(
    ctx: Context,
    integers: Integers,
    x: Operand,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: object = None,
) -> Operand | None:
    assert ctx.node is not None
    rank = len(shape_of(x))
    axes = list(range(rank)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    known = integers.bounds.get(ctx.node.args[0])  # type: ignore[arg-type]
    largest = 1.0 if is_bool(x) else max(-known[0], known[1]) if known else float(MOST_ROWS)
    return exact.total(ctx, x, axes, largest).each(lambda part: ctx.reshape(part, ctx.shape))


def _running(ctx: Context, integers: Integers, x: Operand, dim: int, *, dtype: object = None) -> Operand:
    return exact.running_total(ctx, x, dim % len(shape_of(x)))


def _clamped(
    ctx: Context, integers: Integers, x: Operand, min: Operand | None = None, max: Operand | None = None
) -> Operand:
    result = x
    for bound, kind in ((min, "less"), (max, "greater")):
        if bound is not None:
            result = exact.chosen(ctx, ctx.binary(kind, exact.order(ctx, result, bound), 0.0), bound, result)
    return result


def _extremum(kind: str) -> Callable[..., Operand]:
    def rule(ctx: Context, integers: Integers, x: Operand, y: Operand) -> Operand:
        return exact.chosen(ctx, ctx.binary(kind, exact.order(ctx, x, y), 0.0), x, y)

    return rule


def _bitwise(kind: str) -> Callable[..., Operand]:
    def rule(ctx: Context, integers: Integers, x: Operand, y: Operand) -> Operand:
        return exact.bitwise(ctx, kind, x, y)

    return rule


def _found(name: str) -> Callable[..., Operand]:
    """What the rule itself gives."""
    return lambda ctx, integers, *args, **keywords: RULES[name](ctx, *args, **keywords)  # type: ignore[return-value]


def _shift(ctx: Context, integers: Integers, x: Operand, by: Operand) -> Operand | None:
    if isinstance(by, (Value, Encoded)):
        return None
    factor = 2.0 ** as_tensor(by)
    assert ctx.node is not None
    if "left" in packet_name(ctx.node) or "lshift" in packet_name(ctx.node):
        return exact.multiply(ctx, x, factor, signed=_least(ctx, integers, 0) < 0)
    return exact.divmod_by(ctx, x, factor, _least(ctx, integers, 0))[0]


_RULES: dict[str, Callable[..., object]] = {
    "add": _sum(1), "sub": _sum(-1), "rsub": lambda ctx, integers, x, y: exact.subtract(ctx, y, x), "mul": _product,
    "neg": lambda ctx, integers, x: exact.negative(ctx, x), "abs": lambda ctx, integers, x: exact.magnitude(ctx, x)[0],
    "floor_divide": _division(0), "div": _division(0, "true"), "remainder": _division(1), "fmod": _division(1, "trunc"),
    "sum": _total, "cumsum": _running, "clamp": _clamped, "clamp_min": _clamped,
    "clamp_max": lambda ctx, integers, x, y: _clamped(ctx, integers, x, None, y),
    "maximum": _extremum("greater"), "minimum": _extremum("less"),
    "where": lambda ctx, integers, cond, x, y: exact.chosen(ctx, ctx.boolean(cond), x, y),
    "masked_fill": lambda ctx, integers, x, mask, y: exact.chosen(ctx, ctx.boolean(mask), y, x),
    "bitwise_and": _bitwise("and"), "bitwise_or": _bitwise("or"), "bitwise_xor": _bitwise("xor"),
    "__and__": _bitwise("and"), "__or__": _bitwise("or"), "__xor__": _bitwise("xor"),
    "bitwise_not": lambda ctx, integers, x: exact.subtract(ctx, -1.0, x),
    "bitwise_left_shift": _shift, "bitwise_right_shift": _shift, "__lshift__": _shift, "__rshift__": _shift,
    "argmax": ordering.place_of_extremum("max"), "argmin": ordering.place_of_extremum("min"),
    **dict.fromkeys(("amax", "max"), ordering.extremum("max")),
    **dict.fromkeys(("amin", "min"), ordering.extremum("min")),
    **dict.fromkeys(("sort", "topk", "kthvalue", "median", "cummax", "cummin"), ordering.in_order),
    "bucketize": _found("aten.bucketize.Tensor"), "searchsorted": _found("aten.searchsorted.Tensor"),
    "full_like": lambda ctx, integers, x, value, **_: exact.as_pair(ctx, torch.full(ctx.shape, float(value))),
}  # fmt: skip
