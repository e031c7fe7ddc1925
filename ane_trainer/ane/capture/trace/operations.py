"""Effects of ATen operations on tensors: writes, views and their inverses, and reads of values that no program can do.

A view's inverse is its base tensor's new value after the view was written to:

before: `v = x[:, 2]; v.copy_(w)`      after: `x1 = select_scatter(x, w, 1, 2)`

What a step must not do with data (decide by values, make shapes of them) is found while it is recorded, which goes on
with the example's values, so that all such places are reported together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ane_trainer.ane.capture.trace.torch_private import OpOverload, schema
from ane_trainer.ane.errors import Finding, UnsupportedModel


@functools.cache
def written_argument(func: OpOverload) -> int | None:
    """The index of the argument that the overload changes in place; None if it changes none."""
    written = (a.alias_info is not None and a.alias_info.is_write for a in schema(func).arguments)
    return next((i for i, is_written in enumerate(written) if is_written), None)


@functools.cache
def out_argument(func: OpOverload) -> str | None:
    """The name of the only `out` argument (`div.out`); None if the overload has none or several."""
    outs = [a.name for a in schema(func).arguments if a.is_out]
    return outs[0] if len(outs) == 1 else None


@functools.cache
def is_view(func: OpOverload) -> bool:
    """Whether the result shows the first argument's numbers."""
    arguments = schema(func).arguments
    return bool(arguments) and arguments[0].alias_info is not None and written_argument(func) is None


def pure_form(func: OpOverload, place: str | None) -> Any:
    """The operation that computes what the writing one writes: `aten.add_.Tensor` -> `aten.add`."""
    namespace, name = schema(func).name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if name == "zero_":
        return lambda x: torch.zeros_like(x)
    if name == "fill_":
        return lambda x, value: torch.zeros_like(x) + value
    if packet is None or (not name.endswith("_") and out_argument(func) is None):
        reason, fix = "changes tensors in place in a way without a pure form.", "Use its out-of-place form."
        raise UnsupportedModel(
            "The step changes tensors in a way that cannot be captured:",
            [Finding(place or str(func), str(func), reason, fix)],
        )
    return packet  # it finds the overload by itself: `pow_.Scalar` is `pow.Tensor_Scalar`, not `pow.Scalar`


aten = torch.ops.aten
Emit = Callable[[OpOverload, tuple[object, ...], Node], Node]


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


def undo(
    emit: Emit, func: OpOverload, args: tuple[object, ...], index: int | None, base: Node, value: Node
) -> Node:
    """`base` with the part that `func(base, *args[1:])[index]` shows replaced by `value`."""
    inverse = _INVERSES.get(func)
    if inverse is None:
        finding = Finding(str(func), str(func), "shows a tensor in a way that cannot be written through.", "Write to the tensor itself.")  # fmt: skip  # noqa: E501
        raise UnsupportedModel("The step writes through a view that cannot be captured:", [finding])
    return inverse(emit, base, value, args[1:], index)


def _reshape(emit: Emit, base: Node, value: Node, args: tuple[object, ...], index: int | None) -> Node:
    return emit(aten.view.default, (value, list(base.meta["val"].shape)), base)


def _permute(emit: Emit, base: Node, value: Node, args: tuple[Any, ...], index: int | None) -> Node:
    dims = [d % len(args[0]) for d in args[0]]
    return emit(aten.permute.default, (value, [dims.index(i) for i in range(len(dims))]), base)


def _transpose(emit: Emit, base: Node, value: Node, args: tuple[object, ...], index: int | None) -> Node:
    rank = base.meta["val"].dim()
    first, second = (d % rank for d in (args or (0, rank - 1)))
    dims = list(range(rank))
    dims[first], dims[second] = second, first
    return emit(aten.permute.default, (value, dims), base)


def _scatter(scatter: OpOverload) -> Callable[..., Node]:
    def inverse(emit: Emit, base: Node, value: Node, args: tuple[object, ...], index: int | None) -> Node:
        return emit(scatter, (base, value, *args), base)

    return inverse


def _unbind(emit: Emit, base: Node, value: Node, args: tuple[object, ...], index: int | None) -> Node:
    return emit(aten.select_scatter.default, (base, value, args[0] if args else 0, index), base)


def _split(emit: Emit, base: Node, value: Node, args: tuple[Any, ...], index: int | None) -> Node:
    assert index is not None
    size, dim = args[0], args[1] if len(args) > 1 else 0
    sizes = list(size) if isinstance(size, (list, tuple)) else [size] * (index + 1)
    start = sum(sizes[:index])
    stop = start + value.meta["val"].shape[dim]
    return emit(aten.slice_scatter.default, (base, value, dim, start, stop), base)


_INVERSES: dict[OpOverload, Callable[..., Node]] = {
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


_VALUE_READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
#: Ports of random numbers begin with this.
_MASK = "mask_"


def finding(func: OpOverload, nodes: list[Node], place: str | None) -> Finding | None:
    """Why `func` cannot be part of a step, on arguments that are not all known; None if it can."""
    place = place or str(func)
    # `index` keeps its shape but for masks, which its rule refuses
    if torch.Tag.dynamic_output_shape in func.tags and func is not aten.index.Tensor:
        return Finding(
            place, str(func), "gives a shape that depends on data.",
            "Keep the shape: torch.where, masked_fill, or a product with the mask.",
        )  # fmt: skip
    if func not in _VALUE_READS:
        return None
    if _only_random(nodes):
        return Finding(
            place, str(func), "decides by a random number what to run (as LayerDrop does).",
            'Set that probability to 0, or use torch.compile(model, backend="ane"), where the host decides.',
        )  # fmt: skip
    return Finding(
        place, str(func), "reads a tensor's value during the step, to decide what to do next.",
        "Use torch.where or arithmetic instead of if, float() or item() on tensors of the step. "
        "Run the model once before if only its first call does this.",
    )  # fmt: skip


def memory_read(name: str, place: str | None) -> Finding:
    """The refusal of a tensor of the step whose numbers leave PyTorch."""
    return Finding(
        place or name, name, "takes a tensor's numbers out of PyTorch: the program would go on with this batch's.",
        "Stay in PyTorch, or do it before the step, on the host.",
    )  # fmt: skip


def refusal(findings: list[Finding]) -> UnsupportedModel:
    """All places at once, each a single time."""
    distinct = list(dict.fromkeys(findings))
    return UnsupportedModel("The step depends on values that are not known beforehand:", distinct)


def _only_random(nodes: list[Node]) -> bool:
    """Whether the nodes follow from random numbers and constants alone."""
    pending, seen, inputs = list(nodes), set(nodes), []
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            inputs.append(node.name)
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return bool(inputs) and all(name.startswith(_MASK) for name in inputs)
