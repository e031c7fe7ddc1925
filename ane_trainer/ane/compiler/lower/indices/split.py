"""Ops on integers that one fp16 number does not hold (`Encoded`): movement, sums, comparisons, one-hot rows, look-ups.

Integers in two numbers are what is left of a division by 1024, and the quotient (rounded down, so -100 is -1 and 924).
Both are fp16 integers, and so are their sums, for tables of up to 2 million rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS, MOVES, coded
from ane_trainer.ane.compiler.lower.operands import Encoded, Operand, as_tensor, shape_of
from ane_trainer.ane.compiler.lower.registry import ACCEPTS
from ane_trainer.ane.mil.program import Value
from ane_trainer.ane.stages import PAIR

#: The largest number of rows that a pair tells apart.
MOST_ROWS = PAIR * EXACT_INTEGERS
#: Places of numbers, beside the tensors, among the arguments of ops that move integers.
_NUMBERS = {"constant_pad_nd": (2,), "where": (1, 2), "masked_fill": (2,)}


def apply(
    ctx: Context, name: str, rule: Callable[..., Any], args: list[Any], keywords: dict[str, Any]
) -> Any:
    """The result of a node (ATen name `name`) some of whose arguments are `Encoded`.

    Movement acts on each part alike; sums and comparisons have rules here; look-ups take the integers as they are.
    Raises: Refusal for every other op.
    """
    if name in MOVES or name in _NUMBERS or (name == "_to_copy" and not ctx.meta.dtype.is_floating_point):
        return _moved(ctx, name, rule, args, keywords)
    own = _RULES.get(name)
    if own is not None:
        found = own(ctx, *args, **keywords)
        if found is not None:
            return found
    if str(ctx.node.target if ctx.node is not None else "") in ACCEPTS["encoded"]:
        return rule(ctx, *args, **keywords)
    raise ctx.refuse(
        "computes with integers that also look up a table of more than 2048 rows.",
        "Pass them as two inputs, one for the table and one for the arithmetic.",
    )


def _moved(
    ctx: Context, name: str, rule: Callable[..., Any], args: list[Any], keywords: dict[str, Any]
) -> Any:
    """The movement of each part; constants and other integers among the arguments are encoded alike."""
    found = [leaf for leaf in _leaves(args) if isinstance(leaf, Encoded)]
    encoding = "split" if any(e.encoding == "split" for e in found) else "coded"
    if name == "constant_pad_nd":
        args = [*args, 0][:3]
    numbers = _NUMBERS.get(name, ())
    whole = [_encoded(ctx, arg, encoding, place in numbers) for place, arg in enumerate(args)]
    if name == "where":
        whole[0] = args[0]
    elif name == "masked_fill":
        whole[1] = args[1]
    parts = [
        rule(ctx, *(_part(arg, k) for arg in whole), **keywords)
        for k in range(2 if encoding == "split" else 1)
    ]
    if isinstance(parts[0], (list, tuple)):
        return [Encoded(tuple(part), encoding) for part in zip(*parts, strict=True)]
    return Encoded(tuple(parts), encoding)


def _leaves(args: Any) -> list[Any]:
    return [leaf for arg in args for leaf in (_leaves(arg) if isinstance(arg, (list, tuple)) else [arg])]


def _encoded(ctx: Context, arg: Any, encoding: str, number: bool) -> Any:
    if isinstance(arg, (list, tuple)) and any(isinstance(a, (Value, torch.Tensor, Encoded)) for a in arg):
        return [_encoded(ctx, item, encoding, number) for item in arg]
    if isinstance(arg, (Value, torch.Tensor, Encoded)) or (number and isinstance(arg, (int, float))):
        return in_encoding(ctx, arg, encoding)
    return arg


def _part(arg: Any, k: int) -> Any:
    if isinstance(arg, list):
        return [_part(item, k) for item in arg]
    part = arg.parts[k] if isinstance(arg, Encoded) else arg
    return float(part) if isinstance(part, torch.Tensor) and not part.dim() else part


def in_encoding(ctx: Context, x: Operand, encoding: str) -> Encoded:
    """Integers (constants, or a value that fp16 holds) in an encoding; refuses codes in two numbers."""
    if isinstance(x, Encoded):
        if x.encoding != encoding:
            raise ctx.refuse(
                "mixes integers that are looked up only and integers that are computed with.", ""
            )
        return x
    if encoding == "coded":
        return Encoded((x if isinstance(x, Value) else coded(torch.as_tensor(x)),), "coded")
    if isinstance(x, Value):
        high = ctx.unary("floor", ctx.mul(x, 1.0 / PAIR))
        low = ctx.sub(x, ctx.mul(high, float(PAIR)))
        assert isinstance(low, Value)
        return Encoded((low, high), "split")
    numbers = torch.as_tensor(x).double()
    return Encoded((numbers % PAIR, torch.floor(numbers / PAIR)), "split")


def _whole(x: Operand) -> bool:
    """Constant integers that a pair holds."""
    if isinstance(x, (Value, Encoded)):
        return False
    numbers = torch.as_tensor(x).double()
    return bool((numbers == numbers.floor()).all()) and bool((numbers.abs() < MOST_ROWS).all())


def _sum(sign: int) -> Callable[..., Operand | None]:
    def rule(ctx: Context, x: Operand, y: Operand, alpha: int = 1) -> Operand | None:
        """`low = lx + ly; carry = greater_equal(low, 1024); low - 1024 carry, hx + hy + carry`"""
        if isinstance(y, Encoded) and not isinstance(x, Encoded) and sign * alpha == 1:
            x, y = y, x
        if alpha not in (1, -1) or not isinstance(x, Encoded) or x.encoding != "split" or not _whole(y):
            return None
        low_y, high_y = in_encoding(ctx, as_tensor(y) * sign * alpha, "split").parts
        low = ctx.add(x.parts[0], low_y)
        carry = ctx.number(ctx.binary("greater_equal", low, float(PAIR)))
        result = ctx.sub(low, ctx.mul(carry, float(PAIR)))
        high = ctx.add(ctx.add(x.parts[1], high_y), carry)
        assert isinstance(result, Value)
        assert isinstance(high, Value)
        return Encoded((result, high), "split")

    return rule


def _equality(kind: str) -> Callable[..., Operand | None]:
    def rule(ctx: Context, x: Operand, y: Operand) -> Operand | None:
        """`mul(equal(lx, ly), equal(hx, hy))`; codes are equal where their integers are"""
        encoding = next(e.encoding for e in (x, y) if isinstance(e, Encoded))
        pairs = zip(in_encoding(ctx, x, encoding).parts, in_encoding(ctx, y, encoding).parts, strict=True)
        if encoding == "coded":
            ((a, b),) = pairs
            return ctx.binary("equal" if kind == "eq" else "not_equal", a, b)
        same = ctx.boolean_of_01(ctx.mul(*(ctx.number(ctx.binary("equal", a, b)) for a, b in pairs)))
        assert isinstance(same, Value)
        return same if kind == "eq" else ctx.emit("logical_not", x=same)

    return rule


_RULES: dict[str, Callable[..., Any]] = {
    "add": _sum(1), "sub": _sum(-1), "eq": _equality("eq"), "ne": _equality("ne")
}  # fmt: skip


def one_hot(ctx: Context, index: Encoded, numbers: torch.Tensor, axis: int) -> Operand:
    """1 where integers with a new `axis` equal the numbers along it; negative numbers equal nothing."""
    shape = shape_of(index)
    spread = (*shape[:axis], 1, *shape[axis:])
    line = numbers.reshape([-1 if i == axis else 1 for i in range(len(spread))])
    if index.encoding == "coded":
        raise AssertionError("codes are one number")
    hits = [
        ctx.number(ctx.binary("equal", ctx.reshape(half, spread), part))
        for half, part in zip(
            index.parts, (torch.where(line < 0, -1.0, line % PAIR), torch.floor(line / PAIR)), strict=True
        )
    ]
    return ctx.mul(*hits)


def check_rows(ctx: Context, rows: int) -> None:
    """Refuses tables with more rows than pairs tell apart."""
    if rows > MOST_ROWS:
        raise ctx.refuse(
            f"needs a table of at most {MOST_ROWS} rows; got {rows}.", "Use a smaller vocabulary."
        )


def look_up(ctx: Context, table: Operand, flat: Encoded, scale: float) -> Operand:
    """Rows of a table [V, D] by a pair [M], times `scale`: 1024 rows at a time.

    `add over blocks(mul(matmul(onehot(low), table[block]), equal(high, block)))`
    """
    rows = shape_of(table)[0]
    check_rows(ctx, rows)
    total: Operand = 0.0
    picks = _low_one_hot(ctx, flat, scale)
    for number, start in enumerate(range(0, rows, PAIR)):
        block = ctx.slice(table, 0, start, min(start + PAIR, rows))
        own = ctx.slice(picks, 1, 0, shape_of(block)[0])
        part = ctx.mul(ctx.matmul(own, block), _in_block(ctx, flat, number))
        total = part if number == 0 else ctx.add(total, part)
    return total


def add_up(ctx: Context, gradient: Operand, flat: Encoded, rows: int, skip: int) -> Operand:
    """The gradient of a table [V, D] from that of the rows [M, D]; row `skip` stays 0."""
    picks = _low_one_hot(ctx, flat, 1.0)
    parts: list[Operand] = []
    for number, start in enumerate(range(0, rows, PAIR)):
        size = min(PAIR, rows - start)
        own = ctx.mul(ctx.slice(picks, 1, 0, size), _in_block(ctx, flat, number))
        part = ctx.matmul(own, gradient, tx=True)
        if start <= skip < start + size:
            kept = torch.ones(size, 1)
            kept[skip - start] = 0
            part = ctx.mul(part, kept)
        parts.append(part)
    return ctx.concat(parts, 0)


def _low_one_hot(ctx: Context, flat: Encoded, on: float) -> Operand:
    column = ctx.reshape(flat.parts[0], (shape_of(flat)[0], 1))
    return ctx.where(ctx.binary("equal", column, torch.arange(float(PAIR)).reshape(1, PAIR)), on, 0.0)


def _in_block(ctx: Context, flat: Encoded, number: int) -> Operand:
    column = ctx.reshape(flat.parts[1], (shape_of(flat)[0], 1))
    return ctx.number(ctx.binary("equal", column, float(number)))
