"""`x[i, None, j]`: picks by index tensors on any axes, constant masks among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, broadcast_shape, is_bool, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.indexing import flat_one_hot
from ane_trainer.ane.compiler.lower.rules.slicing import take
from ane_trainer.ane.mil.program import Value


@dataclass(frozen=True)
class Picks:
    """`x` with the indexed axes next to each other, from axis `first` on.

    `given` are the indices broadcast to the shape `where`; axis k of `x` is axis `order[k]` of the tensor.
    """

    x: Operand
    first: int
    given: tuple[Operand, ...]
    where: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extents of the indexed axes."""
        return shape_of(self.x)[self.first : self.first + len(self.given)]


def picks(ctx: Context, x: Operand, indices: Sequence[Operand | None]) -> Picks:
    """What the indices mean; axes that are no neighbours come to the front, as torch puts them in the result."""
    indices = _without_masks(ctx, indices)
    axes = [d for d, i in enumerate(indices) if i is not None]
    rank, first = len(shape_of(x)), axes[0]
    order = list(range(rank))
    if axes != list(range(first, first + len(axes))):
        order, first = axes + [d for d in range(rank) if d not in axes], 0
    given: list[Operand] = [i for i in indices if i is not None]
    where = broadcast_shape(*(shape_of(i) for i in given))
    for k, (d, i) in enumerate(zip(axes, given, strict=True)):
        positive = i % shape_of(x)[d] if isinstance(i, torch.Tensor) else i
        given[k] = ctx.broadcast(positive, where)
    return Picks(ctx.transpose(x, order), first, tuple(given), where, tuple(order))


def _without_masks(ctx: Context, indices: Sequence[Operand | None]) -> list[Operand | None]:
    """Each constant mask replaced by the indices of its true elements."""
    result: list[Operand | None] = []
    for index in indices:
        if index is None or not is_bool(index):
            result.append(index)
        elif isinstance(index, Value):
            raise ctx.refuse(
                "needs indices; a computed mask gives a shape that depends on data.",
                "Keep the shape: torch.where, masked_fill, or a product with the mask.",
            )
        else:
            result += torch.as_tensor(index).nonzero(as_tuple=True)
    return result


@lowering("index.Tensor _unsafe_index.Tensor", accepts="encoded")
def index_(ctx: Context, x: Operand, indices: Sequence[Operand | None]) -> Operand:
    """`index(x, [None, i]) -> ` as `index_select`, the index's shape in its place

    Several indices: `y = matmul(onehot(i), x)`, then
    `matmul(reshape(onehot(j), [M, 1, n]), reshape(y, [M, n, rest]))`; all constant, masks too `-> ` slices and
    `concat`. Indexed axes that are no neighbours `-> transpose` first.
    """
    p = picks(ctx, x, indices)
    if not any(isinstance(i, Value) for i in p.given):
        return _index_constant(ctx, p)
    shape, several = shape_of(p.x), len(p.given) > 1
    lead, count = math.prod(shape[: p.first]), math.prod(p.where)
    inner = math.prod(p.sizes)
    y = ctx.reshape(p.x, (lead, inner, -1))
    if several and lead != 1:
        y = ctx.transpose(y, (1, 0, 2))
    batch = 1 if several else lead
    y = ctx.matmul(
        flat_one_hot(ctx, ctx.reshape(p.given[0], (count,)), p.sizes[0]),
        ctx.reshape(y, (batch, p.sizes[0], -1)),
    )
    for index, size in zip(p.given[1:], p.sizes[1:], strict=True):
        row = ctx.reshape(flat_one_hot(ctx, ctx.reshape(index, (count,)), size), (count, 1, size))
        y = ctx.matmul(row, ctx.reshape(y, (count, size, -1)))
    if several and lead != 1:
        y = ctx.transpose(ctx.reshape(y, (count, lead, -1)), (1, 0, 2))
    return ctx.reshape(y, ctx.shape)


def _index_constant(ctx: Context, p: Picks) -> Operand:
    """Constant indices: the indexed axes are flattened and taken from by one index."""
    shape, inner = shape_of(p.x), math.prod(p.sizes)
    parts = tuple(torch.as_tensor(i) for i in p.given)
    flat_index = torch.arange(inner).reshape(p.sizes)[parts].reshape(-1)
    flat = ctx.reshape(p.x, (*shape[: p.first], inner, *shape[p.first + len(p.given) :]))
    return ctx.reshape(take(ctx, flat, p.first, flat_index), ctx.shape)
