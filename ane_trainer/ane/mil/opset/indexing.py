"""Type rules of ops that pick by index or order: gather, scatter, one_hot, topk, sort, suppression."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.movement import index_slices
from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor
from ane_trainer.ane.mil.opset.shapes import axis, broadcast
from ane_trainer.ane.mil.program import Literal, TensorType

_VALIDATE = const("validate_indices", "bool", False)
SCATTER_MODES = ("add", "sub", "mul", "div", "max", "min", "update")


@rule(
    "gather",
    tensor("x"),
    tensor("indices", "int32"),
    const("axis", "int32", 0),
    const("batch_dims", "int32", 0),
    _VALIDATE,
    dtypes="x:FN indices:N",
    family="movement",
)
def gather(call: Call) -> tuple[TensorType, ...]:
    """x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis+1:]."""
    x, indices, batch = call.type("x"), call.type("indices"), call.integer("batch_dims")
    along = axis(call, call.integer("axis"), x.rank)
    if not 0 <= batch <= min(along, indices.rank) or x.shape[:batch] != indices.shape[:batch]:
        raise call.refuse(
            f"batch_dims needs leading axes that x and indices share; got {batch} for {x}, {indices}"
        )
    _check_indices(call, x.shape[along])
    return (TensorType(x.dtype, (*x.shape[:along], *indices.shape[batch:], *x.shape[along + 1 :])),)


@rule(
    "gather_along_axis",
    tensor("x"),
    tensor("indices", "int32"),
    const("axis", "int32", 0),
    _VALIDATE,
    dtypes="x:FN indices:N",
)
def gather_along_axis(call: Call) -> tuple[TensorType, ...]:
    """indices has x's shape but for the axis, and gives the result's shape."""
    x, indices = call.type("x"), call.type("indices")
    along = axis(call, call.integer("axis"), x.rank)
    _same_but(call, x, indices, along)
    _check_indices(call, x.shape[along])
    return (TensorType(x.dtype, indices.shape),)


@rule(
    "gather_nd",
    tensor("x"),
    tensor("indices", "int32"),
    const("batch_dims", "int32", 0),
    _VALIDATE,
    dtypes="x:FN indices:N",
)
def gather_nd(call: Call) -> tuple[TensorType, ...]:
    """indices `[..., K]` address the K axes after the batch axes."""
    x, indices, batch = call.type("x"), call.type("indices"), call.integer("batch_dims")
    if not indices.rank or not 0 <= batch < indices.rank or indices.shape[-1] > x.rank - batch:
        raise call.refuse(f"indices needs at most {x.rank - batch} numbers an entry; got {indices}")
    return (TensorType(x.dtype, (*indices.shape[:-1], *x.shape[batch + indices.shape[-1] :])),)


_SCATTER = (tensor("data"), tensor("indices", "int32"), tensor("updates"))


@rule(
    "scatter",
    *_SCATTER,
    const("axis", "int32", 0),
    const("mode", "string", "add"),
    _VALIDATE,
    dtypes="data:FI.T indices:int32 updates:FI.T",
)
def scatter(call: Call) -> tuple[TensorType, ...]:
    """updates has the shape that `gather` with these indices would give."""
    data, indices = call.type("data"), call.type("indices")
    along = axis(call, call.integer("axis"), data.rank)
    _check_updates(call, (*data.shape[:along], *indices.shape, *data.shape[along + 1 :]))
    _check_indices(call, data.shape[along])
    return (data,)


@rule(
    "scatter_along_axis",
    *_SCATTER,
    const("axis", "int32", 0),
    const("mode", "string", "add"),
    _VALIDATE,
    dtypes="data:FI.T indices:int32 updates:FI.T",
)
def scatter_along_axis(call: Call) -> tuple[TensorType, ...]:
    """indices and updates have data's shape but for the axis."""
    data, indices = call.type("data"), call.type("indices")
    along = axis(call, call.integer("axis"), data.rank)
    _same_but(call, data, indices, along)
    _check_updates(call, indices.shape)
    _check_indices(call, data.shape[along])
    return (data,)


@rule(
    "scatter_nd",
    *_SCATTER,
    const("mode", "string", "add"),
    _VALIDATE,
    dtypes="data:FI.T indices:int32 updates:FI.T",
)
def scatter_nd(call: Call) -> tuple[TensorType, ...]:
    """updates has the shape that `gather_nd` with these indices would give."""
    data, indices = call.type("data"), call.type("indices")
    if not indices.rank or indices.shape[-1] > data.rank:
        raise call.refuse(f"indices needs at most {data.rank} numbers an entry; got {indices}")
    _check_updates(call, (*indices.shape[:-1], *data.shape[indices.shape[-1] :]))
    return (data,)


def _same_but(call: Call, x: TensorType, indices: TensorType, along: int) -> None:
    if x.rank != indices.rank or any(
        a != b for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)) if i != along
    ):
        raise call.refuse(f"indices needs the shape of {x} but for axis {along}; got {indices}")


def _check_updates(call: Call, shape: tuple[int, ...]) -> None:
    if call.type("updates").shape != shape:
        raise call.refuse(f"updates needs the shape {shape}; got {call.type('updates')}")
    if call.text("mode") not in SCATTER_MODES:
        raise call.refuse(f"mode needs one of {', '.join(SCATTER_MODES)}; got {call.text('mode')!r}")


def _check_indices(call: Call, extent: int) -> None:
    """Constant indices are in range when `validate_indices` asks for it."""
    if call.flag("validate_indices") and isinstance(call.args["indices"], Literal):
        values = call.integers("indices")
        if values and not 0 <= min(values) <= max(values) < extent:
            raise call.refuse(f"indices needs numbers in [0, {extent}); got {min(values)} to {max(values)}")


@rule(
    "slice_update",
    tensor("x"),
    tensor("update"),
    const("begin"),
    const("end"),
    const("stride", "int32", None),
    const("begin_mask", "bool", None),
    const("end_mask", "bool", None),
    const("squeeze_mask", "bool", None),
    dtypes="x:ALL.T update:ALL.T begin:I.U end:I.U stride:I.U",
)
def slice_update(call: Call) -> tuple[TensorType, ...]:
    """x with the slice that `slice_by_index` would take replaced by `update`."""
    x, update = call.type("x"), call.type("update")
    rows = zip(*index_slices(call), x.shape, strict=True)
    shape = tuple(len(range(*cut.indices(extent))) for cut, squeezed, extent in rows if not squeezed)
    if update.shape != shape or not shape:
        raise call.refuse(f"update needs the shape {shape} of rank 1 or more; got {update}")
    return (x,)


@rule(
    "one_hot",
    tensor("indices", "int32"),
    const("one_hot_vector_size"),
    const("axis", "int32", -1),
    const("on_value", "int32", 1),
    const("off_value", "int32", 0),
    dtypes="indices:int32 on_value:FIB.T off_value:FIB.T",
)
def one_hot(call: Call) -> tuple[TensorType, ...]:
    """An axis of `one_hot_vector_size` is added; int32 unless on_value or off_value say otherwise."""
    indices, size = call.type("indices"), call.integer("one_hot_vector_size")
    at = axis(call, call.integer("axis"), indices.rank + 1)
    dtype = next((call.type(n).dtype for n in ("on_value", "off_value") if call.has(n)), "int32")
    return (TensorType(dtype, (*indices.shape[:at], size, *indices.shape[at:])),)


@rule("non_zero", tensor("x"), dtypes="x:FIB")
def non_zero(call: Call) -> tuple[TensorType, ...]:
    """`[number of non-zero elements, rank]`: known only for a constant."""
    if not isinstance(call.args["x"], Literal):
        raise call.refuse("x needs to be constant, its result's shape depends on the values")
    values = call.const("x")
    items = values if isinstance(values, tuple) else (values,)
    return (TensorType("int32", (sum(map(bool, items)), call.type("x").rank)),)


@rule("argsort", tensor("x"), const("axis", "int32", -1), const("ascending", "bool", False), dtypes="x:FI")
def argsort(call: Call) -> tuple[TensorType, ...]:
    """int32 positions in x's shape."""
    axis(call, call.integer("axis"), call.type("x").rank)
    return (TensorType("int32", call.type("x").shape),)


@rule(
    "topk",
    tensor("x"),
    const("k", "int32", 1),
    const("axis", "int32", -1),
    const("ascending", "bool", False),
    const("sort", "bool", True),
    const("return_indices", "bool", True),
    const("output_indices_dtype", "string", None),
    dtypes="x:FN k:I",
)
def topk(call: Call) -> tuple[TensorType, ...]:
    """The k largest (smallest when ascending) along an axis: values, and their indices unless switched off."""
    x, k = call.type("x"), call.integer("k")
    along = axis(call, call.integer("axis"), x.rank)
    if not 1 <= k <= x.shape[along]:
        raise call.refuse(f"k needs a number from 1 to {x.shape[along]}; got {k}")
    shape = (*x.shape[:along], k, *x.shape[along + 1 :])
    if not call.flag("return_indices"):
        if call.has("output_indices_dtype"):
            raise call.refuse("output_indices_dtype needs return_indices")
        return (TensorType(x.dtype, shape),)
    dtype = call.text("output_indices_dtype") if call.has("output_indices_dtype") else "int32"
    if dtype not in ("int32", "uint16"):
        raise call.refuse(f"output_indices_dtype needs int32 or uint16; got {dtype!r}")
    return (TensorType(x.dtype, shape), TensorType(dtype, shape))


@rule(
    "non_maximum_suppression",
    tensor("boxes"),
    tensor("scores"),
    const("iou_threshold", "fp16"),
    const("score_threshold", "fp16", None),
    const("max_boxes"),
    const("per_class_suppression", "bool", False),
    dtypes="boxes:F.T scores:F.T iou_threshold:F.T score_threshold:F.T",
)
def non_maximum_suppression(call: Call) -> tuple[TensorType, ...]:
    """boxes `[N, B, 4]`, scores `[N, B, K]` with score_threshold (iOS 15), else `[N, 4, B]`, `[N, K, B]`."""
    boxes, scores, count = call.type("boxes"), call.type("scores"), call.integer("max_boxes")
    if boxes.rank != 3 or scores.rank != 3:
        raise call.refuse(f"boxes and scores need rank 3; got {boxes} and {scores}")
    broadcast(call, boxes.shape[:1], scores.shape[:1])
    batch, indices = scores.shape[0], TensorType("int32", (scores.shape[0], count))
    if call.has("score_threshold"):
        found = (batch, count, 4), (batch, count, scores.shape[2])
        number = TensorType("int32", (batch,))
    else:
        found, number = ((batch, 4, count), (batch, scores.shape[1], count)), None
    types = (TensorType(boxes.dtype, found[0]), TensorType(scores.dtype, found[1]), indices)
    return (*types, number) if number is not None else types
