"""Look-ups in tables by integers in two numbers, and the gradients of the tables."""

from __future__ import annotations

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices.choose import MOST_ROWS
from ane_trainer.ane.compiler.lower.operands import Encoded, Operand, shape_of
from ane_trainer.ane.stages import PAIR


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
    """Refuses tables with more rows than pairs distinguish."""
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
