"""Matrix products, and triangular systems: known matrices are inverted beforehand, others solved row by row.

Transposed operands become matmul's flags in `passes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, as_tensor, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.mil.program import Value


@lowering("mm.default bmm.default")
def mm(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`mm(x, y) -> matmul(x, y)`"""
    return ctx.matmul(x, y)


@lowering("addmm.default")
def addmm(
    ctx: Context, bias: Operand, x: Operand, y: Operand, *, beta: float = 1, alpha: float = 1
) -> Operand:
    """`addmm(b, x, y) -> add(matmul(x, y), b)`, with alpha and beta as `mul`"""
    product = ctx.matmul(x, y)
    if alpha != 1:
        product = ctx.mul(product, alpha)
    if beta == 0:
        return product
    return ctx.add(product, bias if beta == 1 else ctx.mul(bias, beta))


@lowering("addmv.default")
def addmv(
    ctx: Context, bias: Operand, x: Operand, y: Operand, *, beta: float = 1, alpha: float = 1
) -> Operand:
    """`addmv(b, x, y) -> add(reshape(matmul(x, reshape(y, [K, 1])), [M]), b)`"""
    column = ctx.reshape(y, (*shape_of(y), 1))
    product = ctx.mul(ctx.reshape(ctx.matmul(x, column), shape_of(x)[:1]), alpha)
    return ctx.add(product, ctx.mul(bias, beta)) if beta else product


@lowering("_trilinear.default")
def trilinear(
    ctx: Context, a: Operand, b: Operand, c: Operand, expand_a: Sequence[int], expand_b: Sequence[int],
    expand_c: Sequence[int], sum_dims: Sequence[int], unroll_dim: int = 1,
) -> Operand:  # fmt: skip
    """`_trilinear(a, b, c) -> reduce_sum(mul(mul(a, b), c), axes)`, each with its missing axes of extent 1"""
    for_all = [_with_axes(ctx, x, axes) for x, axes in ((a, expand_a), (b, expand_b), (c, expand_c))]
    product = ctx.mul(ctx.mul(for_all[0], for_all[1]), for_all[2])
    return ctx.reshape(ctx.sum(product, list(sum_dims)) if sum_dims else product, ctx.shape)


def _with_axes(ctx: Context, x: Operand, axes: Sequence[int]) -> Operand:
    shape = list(shape_of(x))
    for axis in sorted(axes):
        shape.insert(axis, 1)
    return ctx.reshape(x, tuple(shape))


@lowering("addbmm.default")
def addbmm(
    ctx: Context, bias: Operand, x: Operand, y: Operand, *, beta: float = 1, alpha: float = 1
) -> Operand:
    """`addbmm(b, x, y) -> add(reduce_sum(matmul(x, y), axes=0), b)`, with alpha and beta as `mul`"""
    product = ctx.mul(ctx.sum(ctx.matmul(x, y), [0]), alpha)
    return ctx.add(product, ctx.mul(bias, beta)) if beta else product


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
