"""The inverses of views: a base tensor's new value after one of its views was written to.

before: `v = x[:, 2]; v.copy_(w)`      after: `x1 = select_scatter(x, w, 1, 2)`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ane_trainer.ane.errors import Finding, UnsupportedModel

aten = torch.ops.aten
Emit = Callable[[Any, tuple[Any, ...], Node], Node]


def in_memory_order(tensor: torch.Tensor, place: str | None) -> torch.Tensor:
    """A view with the axes in the order of memory, which strides and offsets are about."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    ordered = tensor.permute(order)
    if not ordered.is_contiguous():
        reason = f"shows memory between the elements of its tensor, whose strides are {list(strides)}."
        finding = Finding(
            place or "aten.as_strided", "aten.as_strided.default", reason, "Call clone() first."
        )
        raise UnsupportedModel("The step reads memory in a way that cannot be captured:", [finding])
    return ordered


def undo(emit: Emit, func: Any, args: tuple[Any, ...], index: int | None, base: Node, value: Node) -> Node:
    """`base` with the part that `func(base, *args[1:])[index]` shows replaced by `value`."""
    inverse = _INVERSES.get(func)
    if inverse is None:
        finding = Finding(str(func), str(func), "shows a tensor in a way that cannot be written through.", "Write to the tensor itself.")  # fmt: skip  # noqa: E501
        raise UnsupportedModel("The step writes through a view that cannot be captured:", [finding])
    return inverse(emit, base, value, args[1:], index)


def _reshape(emit: Emit, base: Node, value: Node, args: tuple[Any, ...], index: int | None) -> Node:
    return emit(aten.view.default, (value, list(base.meta["val"].shape)), base)


def _permute(emit: Emit, base: Node, value: Node, args: tuple[Any, ...], index: int | None) -> Node:
    dims = [d % len(args[0]) for d in args[0]]
    return emit(aten.permute.default, (value, [dims.index(i) for i in range(len(dims))]), base)


def _transpose(emit: Emit, base: Node, value: Node, args: tuple[Any, ...], index: int | None) -> Node:
    rank = base.meta["val"].dim()
    first, second = (d % rank for d in (args or (0, rank - 1)))
    dims = list(range(rank))
    dims[first], dims[second] = second, first
    return emit(aten.permute.default, (value, dims), base)


def _scatter(scatter: Any) -> Callable[..., Node]:
    def inverse(emit: Emit, base: Node, value: Node, args: tuple[Any, ...], index: int | None) -> Node:
        return emit(scatter, (base, value, *args), base)

    return inverse


def _unbind(emit: Emit, base: Node, value: Node, args: tuple[Any, ...], index: int | None) -> Node:
    return emit(aten.select_scatter.default, (base, value, args[0] if args else 0, index), base)


def _split(emit: Emit, base: Node, value: Node, args: tuple[Any, ...], index: int | None) -> Node:
    assert index is not None
    size, dim = args[0], args[1] if len(args) > 1 else 0
    sizes = list(size) if isinstance(size, (list, tuple)) else [size] * (index + 1)
    start = sum(sizes[:index])
    stop = start + value.meta["val"].shape[dim]
    return emit(aten.slice_scatter.default, (base, value, dim, start, stop), base)


_INVERSES: dict[Any, Callable[..., Node]] = {
    **dict.fromkeys(
        (
            aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
            aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default,
            aten.lift_fresh.default, aten._reshape_alias.default,
        ),
        _reshape,
    ),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.select.int: _scatter(aten.select_scatter.default),
    aten.slice.Tensor: _scatter(aten.slice_scatter.default),
    aten.diagonal.default: _scatter(aten.diagonal_scatter.default),
    aten.as_strided.default: _scatter(aten.as_strided_scatter.default),
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
}  # fmt: skip
