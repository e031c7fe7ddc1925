"""Sorting, extrema and their indices along axes beyond fp16's integers: counts and indices in two numbers.

An axis is taken in blocks of 1,024, so that no count within one is rounded.
"""

from __future__ import annotations

import math

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices import arithmetic as exact
from ane_trainer.ane.compiler.lower.operands import Encoded, Operand, shape_of
from ane_trainer.ane.compiler.lower.rules.indexing import MOST_COMPARISONS, move_axis_back
from ane_trainer.ane.stages import PAIR

#: So many of the first are looked for one after the other.
MOST_FIRST = 16


def ordered(
    ctx: Context, x: Operand, dim: int, *, descending: bool, take: tuple[int, int]
) -> tuple[Operand, Encoded]:
    """Values and places along `dim` in order (of equal elements the first comes first), the places `take` only.

    `rank = reduce_sum(greater(x_j, x_i))` by blocks, `greater_equal` for those before; then one-hot ranks
    Raises: Refusal for more comparisons than fit.
    """
    shape = shape_of(x)
    n, dim = shape[dim], dim % len(shape)
    order = [a for a in range(len(shape)) if a != dim] + [dim]
    moved = ctx.transpose(x, order)
    lead = shape_of(moved)[:-1]
    rows = math.prod(lead)
    if rows * n * n > MOST_COMPARISONS:
        raise ctx.refuse(
            f"compares {n} elements with each other in {rows} lines; needs at most {MOST_COMPARISONS} comparisons.",
            f"Sort on the host, in parts, or take at most {MOST_FIRST} with topk.",
        )
    line = ctx.reshape(moved, (rows, n))
    rank = _ranks(ctx, line, descending)
    places = torch.arange(n, dtype=torch.float64).reshape(1, 1, n)
    sources = (ctx.reshape(line, (rows, 1, n)), places % PAIR, torch.floor(places / PAIR))
    found: list[list[Operand]] = [[], [], []]
    for block in range(take[0] // PAIR, (take[1] - 1) // PAIR + 1):
        start, stop = max(take[0] - block * PAIR, 0), min(take[1] - block * PAIR, PAIR)
        within = ctx.where(ctx.binary("equal", rank.parts[1], float(block)), rank.parts[0], -1.0)
        wanted = torch.arange(start, stop, dtype=torch.float64).reshape(1, -1, 1)
        hit = ctx.binary("equal", ctx.reshape(within, (rows, 1, n)), wanted)
        for parts, source in zip(found, sources, strict=True):
            parts.append(ctx.sum(ctx.where(hit, source, 0.0), [-1]))
    taken = (*lead, take[1] - take[0])
    results = [
        move_axis_back(ctx, ctx.reshape(parts[0] if len(parts) == 1 else ctx.concat(parts, 1), taken), dim)
        for parts in found
    ]
    return results[0], exact.pair(results[1], results[2])


def first(ctx: Context, kind: str, x: Operand, dim: int, count: int) -> list[tuple[Operand, Encoded]]:
    """The first `count` of a sorted axis ("max": of the largest) and their places, one after the other, axis kept."""
    taken: Operand | None = None
    found = []
    for _ in range(count):
        best, place, hit = exact.first_place(ctx, kind, x, dim, taken)
        taken = hit if taken is None else ctx.add(taken, hit)
        found.append((best, place))
    return found


def _ranks(ctx: Context, line: Operand, descending: bool) -> Encoded:
    """How many elements of its line come before each."""
    rows, n = shape_of(line)
    kind = "greater" if descending else "less"
    ends = [(start, min(start + PAIR, n)) for start in range(0, n, PAIR)]
    found: list[Encoded] = []
    for own_start, own_stop in ends:
        own = ctx.reshape(ctx.slice(line, 1, own_start, own_stop), (rows, own_stop - own_start, 1))
        rank: Encoded | None = None
        for start, stop in ends:
            other = ctx.reshape(ctx.slice(line, 1, start, stop), (rows, 1, stop - start))
            before = ctx.number(ctx.binary(f"{kind}_equal" if start < own_start else kind, other, own))
            if start == own_start:
                earlier = torch.ones(stop - start, stop - start).tril(-1)
                before = ctx.add(before, ctx.mul(ctx.number(ctx.binary("equal", other, own)), earlier))
            count = exact.as_pair(ctx, ctx.sum(before, [-1]))
            rank = count if rank is None else exact.add(ctx, rank, count)
        assert rank is not None
        found.append(rank)
    return exact.pair(*(ctx.concat([rank.parts[part] for rank in found], 1) for part in (0, 1)))


def numbered(shape: tuple[int, ...], axis: int) -> Encoded:
    """The place of each element along an axis."""
    order = torch.arange(shape[axis], dtype=torch.float64)
    order = order.reshape([n if i == axis else 1 for i, n in enumerate(shape)]).expand(shape)
    return exact.pair(order % PAIR, torch.floor(order / PAIR))
