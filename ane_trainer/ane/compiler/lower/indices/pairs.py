"""Integers in two numbers: a batch port whose integers look up a table that codes do not reach, or after a sum.

Such a port becomes two: what is left of a division by 1024, and the quotient (rounded down, so -100 is -1 and 924).
Both are fp16 integers, and so are their sums with constants, for tables of up to 2 million rows. Movement acts on
both; look-ups and comparisons ask for both (`Context.high`: remainder -> quotient).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from ane_trainer.ane.compiler.lower.context import Context, Operand, shape_of
from ane_trainer.ane.compiler.lower.indices.integers import EXACT_INTEGERS, MOVES, most_rows
from ane_trainer.ane.mil.program import Value
from ane_trainer.ane.stages import PAIR, Captured, Port

#: The largest number of rows that a pair tells apart.
MOST_ROWS = PAIR * EXACT_INTEGERS
#: What the target of the quotients' port ends with.
HIGH = "#high"
_SUMS = ("add", "sub")


def paired_inputs(captured: Captured, dtype: str) -> set[Node]:
    """The integer batch inputs that must travel as pairs."""
    if dtype != "fp16":
        return set()
    placeholders = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    batch = [n for n, p in zip(placeholders, captured.inputs, strict=True) if p.role == "batch"]
    return {
        node
        for node in batch
        if _integral(node)
        and any(rows > (EXACT_INTEGERS if summed else most_rows(dtype)) for rows, summed in _looked_up(node))
    }


def declare(ctx: Context, low: Value, port: Port) -> Port:
    """The port of the quotients, for an input that holds the remainders from now on."""
    name = f"{low.name}_high"
    value = ctx.builder.input(name, low.type)
    ctx.high[low] = value
    return Port(value.name, port.shape, "batch", f"{port.target}{HIGH}")


def add(ctx: Context, x: Operand, y: Operand, sign: int) -> Operand | None:
    """`x + sign y` of a pair and constant integers as a pair, None if it is no such sum.

    `low = lx + ly; carry = greater_equal(low, 1024); low - 1024 carry, hx + hy + carry`
    """
    if isinstance(y, Value) and y in ctx.high and not isinstance(x, Value) and sign > 0:
        x, y = y, x
    if not isinstance(x, Value) or x not in ctx.high or isinstance(y, Value):
        return None
    numbers = torch.as_tensor(y).double() * sign
    if not bool((numbers == numbers.floor()).all()) or bool((numbers.abs() >= MOST_ROWS).any()):
        return None
    low = ctx.add(x, numbers % PAIR)
    carry = ctx.number(ctx.binary("greater_equal", low, float(PAIR)))
    result = ctx.sub(low, ctx.mul(carry, float(PAIR)))
    high = ctx.add(ctx.add(ctx.high[x], torch.floor(numbers / PAIR)), carry)
    assert isinstance(result, Value)
    assert isinstance(high, Value)
    ctx.high[result] = high
    return result


def equal(ctx: Context, x: Operand, y: Operand) -> Operand | None:
    """Where a pair equals constant integers, or another pair; None if neither is a pair."""
    pairs = [isinstance(v, Value) and v in ctx.high for v in (x, y)]
    if not any(pairs) or (not all(pairs) and isinstance(x, Value) and isinstance(y, Value)):
        return None
    (low_x, high_x), (low_y, high_y) = halves(ctx, x), halves(ctx, y)
    same = ctx.mul(
        ctx.number(ctx.binary("equal", low_x, low_y)), ctx.number(ctx.binary("equal", high_x, high_y))
    )
    return ctx.boolean_of_01(same)


def halves(ctx: Context, x: Operand) -> tuple[Operand, Operand]:
    """(remainder, quotient) of a pair, of constants, or of a value below 1024."""
    if isinstance(x, Value):
        return x, ctx.high.get(x, 0.0)
    numbers = torch.as_tensor(x).double()
    return numbers % PAIR, torch.floor(numbers / PAIR)


def one_hot(ctx: Context, index: Value, numbers: torch.Tensor, axis: int) -> Operand:
    """1 where a pair with a new `axis` equals the numbers along it; negative numbers equal nothing."""
    shape = shape_of(index)
    spread = (*shape[:axis], 1, *shape[axis:])
    line = numbers.reshape([-1 if i == axis else 1 for i in range(len(spread))])
    hits = [
        ctx.number(ctx.binary("equal", ctx.reshape(half, spread), part))
        for half, part in zip(
            (index, ctx.high[index]),
            (torch.where(line < 0, -1.0, line % PAIR), torch.floor(line / PAIR)), strict=True,
        )
    ]  # fmt: skip
    return ctx.mul(*hits)


def check_rows(ctx: Context, rows: int) -> None:
    """Refuses tables with more rows than pairs tell apart."""
    if rows > MOST_ROWS:
        raise ctx.refuse(
            f"needs a table of at most {MOST_ROWS} rows; got {rows}.", "Use a smaller vocabulary."
        )


def look_up(ctx: Context, table: Operand, flat: Value, scale: float) -> Operand:
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


def add_up(ctx: Context, gradient: Operand, flat: Value, rows: int, skip: int) -> Operand:
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


def _low_one_hot(ctx: Context, flat: Value, on: float) -> Operand:
    column = ctx.reshape(flat, (shape_of(flat)[0], 1))
    return ctx.where(ctx.binary("equal", column, torch.arange(float(PAIR)).reshape(1, PAIR)), on, 0.0)


def _in_block(ctx: Context, flat: Value, number: int) -> Operand:
    column = ctx.reshape(ctx.high[flat], (shape_of(flat)[0], 1))
    return ctx.number(ctx.binary("equal", column, float(number)))


def _integral(node: Node) -> bool:
    dtype = node.meta["val"].dtype
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _looked_up(node: Node) -> Iterator[tuple[int, bool]]:
    """(rows of the table, whether constants were added on the way) for every look-up by the input."""
    pending, seen = [(node, False)], set()
    while pending:
        source, summed = pending.pop()
        if (source, summed) in seen:
            continue
        seen.add((source, summed))
        for user in source.users:
            name = _name(user)
            rows = _rows(user, source, name)
            if rows is not None:
                yield rows, summed
            elif name in _SUMS and isinstance(user.args[1], (int, Node)) and _integral_result(user):
                pending.append((user, True))
            elif (name in MOVES or name in ("_to_copy", "where", "masked_fill")) and _integral_result(user):
                pending.append((user, summed))


def _rows(user: Node, index: Node, name: str) -> int | None:
    """How many rows or classes a look-up tells apart; None if the node is none."""
    args: Any = user.args
    if name == "embedding" and args[1] is index:
        return int(args[0].meta["val"].shape[0])
    if name == "embedding_dense_backward" and args[1] is index:
        return int(args[2])
    if name.startswith("nll_loss") and index in args[1:3]:
        scores = args[1] if "backward" in name else args[0]
        return int(scores.meta["val"].shape[1 if scores.meta["val"].dim() > 1 else 0])
    if name == "gather" and args[2] is index:
        return int(args[0].meta["val"].shape[args[1]])
    return None


def _name(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _integral_result(node: Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = value[0]
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool
