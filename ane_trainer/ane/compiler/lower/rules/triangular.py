"""Triangular systems: known matrices are inverted beforehand, others solved by substitution, row by row."""

from __future__ import annotations

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, as_tensor, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.mil.program import Value

#: Rows up to which a system is solved by substitution: three ops each.
MOST_ROWS = 64


@lowering("linalg_solve_triangular.default")
def solve_triangular(
    ctx: Context, a: Operand, b: Operand, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Operand:
    """`linalg_solve_triangular(a, b) -> matmul(inverse, b)` for a known a, else row by row
    `x_i = real_div(sub(b_i, matmul(a_i, x)), a_ii)`
    """
    if not left:  # x a = b  <=>  a^T x^T = b^T
        rows = _solve(ctx, _mirrored(ctx, a), _mirrored(ctx, b), not upper, unitriangular)
        return _mirrored(ctx, rows)
    return _solve(ctx, a, b, upper, unitriangular)


def _mirrored(ctx: Context, x: Operand) -> Operand:
    return ctx.swap(x, -1, -2)


def _solve(ctx: Context, a: Operand, b: Operand, upper: bool, unitriangular: bool) -> Operand:
    n = shape_of(a)[-1]
    if not isinstance(a, Value):
        known = as_tensor(a)
        eye = torch.eye(n, dtype=torch.float64).expand(known.shape)
        inverse = torch.linalg.solve_triangular(known, eye, upper=upper, unitriangular=unitriangular)
        return ctx.matmul(inverse, b)
    if n > MOST_ROWS:
        raise ctx.refuse(
            f"needs at most {MOST_ROWS} rows of a matrix that the step computes; got {n}.",
            "Solve on the host: fallback='cpu'.",
        )
    solved: list[Operand] = []
    for i in reversed(range(n)) if upper else range(n):
        row, rest = ctx.slice(a, -2, i, i + 1), ctx.slice(b, -2, i, i + 1)
        if solved:
            known_rows = ctx.concat(solved[::-1] if upper else solved, -2)
            part = ctx.slice(row, -1, i + 1, n) if upper else ctx.slice(row, -1, 0, i)
            rest = ctx.sub(rest, ctx.matmul(part, known_rows))
        solved.append(rest if unitriangular else ctx.binary("real_div", rest, ctx.slice(row, -1, i, i + 1)))
    return ctx.concat(solved[::-1] if upper else solved, -2)
