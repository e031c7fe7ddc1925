"""Type rules of ops that move or repeat elements without arithmetic."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor, tensors
from ane_trainer.ane.mil.opset.shapes import axes, axis
from ane_trainer.ane.mil.program import TensorType


@rule("reshape", tensor("x"), const("shape"), dtypes="x:ALL shape:I", family="view")
def reshape(call: Call) -> tuple[TensorType, ...]:
    """A 0 in `shape` keeps x's extent, counted from the last axis (iOS 17; iOS 15 counted from the first)."""
    x, shape = call.type("x"), list(call.integers("shape"))
    for i in range(-len(shape), 0):
        if shape[i] == 0:
            shape[i] = x.shape[i] if -i <= x.rank else 1
    if any(n < -1 for n in shape) or shape.count(-1) > 1:
        raise call.refuse(f"shape needs extents, at most one of them -1; got {tuple(shape)}")
    known = 1
    for extent in shape:
        known *= extent if extent != -1 else 1
    if shape.count(-1) == 1 and known and x.size % known == 0:
        shape[shape.index(-1)] = x.size // known
    result = TensorType(x.dtype, tuple(shape))
    if -1 in shape or result.size != x.size:
        raise call.refuse(f"shape needs {x.size} elements; got {tuple(shape)} for {x}")
    return (result,)


@rule("transpose", tensor("x"), const("perm"), dtypes="x:ALL", family="movement")
def transpose(call: Call) -> tuple[TensorType, ...]:
    """Result axis i is input axis perm[i]."""
    x = call.type("x")
    perm = tuple(axis(call, p, x.rank) for p in call.integers("perm"))
    if sorted(perm) != list(range(x.rank)):
        raise call.refuse(f"perm needs each of {x.rank} axes once; got {perm}")
    return (TensorType(x.dtype, tuple(x.shape[p] for p in perm)),)


@rule("expand_dims", tensor("x"), const("axes"), dtypes="x:ALL", family="view")
def expand_dims(call: Call) -> tuple[TensorType, ...]:
    """Adds axes of extent 1 at the places `axes` of the result."""
    x, given = call.type("x"), call.integers("axes")
    rank = x.rank + len(given)
    new = {axis(call, a, rank) for a in given}
    if len(new) != len(given):
        raise call.refuse(f"axes needs distinct axes; got {given}")
    old = iter(x.shape)
    return (TensorType(x.dtype, tuple(1 if i in new else next(old) for i in range(rank))),)


@rule("squeeze", tensor("x"), const("axes", "int32", None), dtypes="x:ALL", family="view")
def squeeze(call: Call) -> tuple[TensorType, ...]:
    """Drops axes of extent 1; all of them when `axes` is absent."""
    x = call.type("x")
    gone = (
        axes(call, "axes", x.rank) if call.has("axes") else tuple(i for i, n in enumerate(x.shape) if n == 1)
    )
    if any(x.shape[i] != 1 for i in gone):
        raise call.refuse(f"axes needs axes of extent 1; got {gone} for {x}")
    return (TensorType(x.dtype, tuple(n for i, n in enumerate(x.shape) if i not in gone)),)


@rule(
    "slice_by_size",
    tensor("x"),
    const("begin"),
    const("size"),
    dtypes="x:ALL begin:I.U size:I.U",
    family="movement",
)
def slice_by_size(call: Call) -> tuple[TensorType, ...]:
    """x[begin : begin + size]; size -1 means to the end."""
    x, begin, size = call.type("x"), call.integers("begin"), call.integers("size")
    if not len(begin) == len(size) == x.rank:
        raise call.refuse(f"begin and size need {x.rank} numbers; got {begin} and {size}")
    size = tuple(n - b if s == -1 else s for n, b, s in zip(x.shape, begin, size, strict=True))
    if any(b < 0 or s < 1 or b + s > n for n, b, s in zip(x.shape, begin, size, strict=True)):
        raise call.refuse(f"needs a slice inside {x}; got begin {begin} size {size}")
    return (TensorType(x.dtype, size),)


@rule(
    "slice_by_index",
    tensor("x"),
    const("begin"),
    const("end"),
    const("stride", "int32", None),
    const("begin_mask", "bool", None),
    const("end_mask", "bool", None),
    const("squeeze_mask", "bool", None),
    dtypes="x:ALL begin:I.U end:I.U stride:I.U",
    family="movement",
)
def slice_by_index(call: Call) -> tuple[TensorType, ...]:
    """x[begin : end : stride]; a mask means the whole side, squeeze_mask drops the axis."""
    x = call.type("x")
    shape = []
    for axis_slice, squeezed, extent in zip(*index_slices(call), x.shape, strict=True):
        if squeezed:
            continue
        shape.append(len(range(*axis_slice.indices(extent))))
    if 0 in shape:
        raise call.refuse(f"needs a slice that is not empty; got {tuple(shape)} from {x}")
    return (TensorType(x.dtype, tuple(shape)),)


def index_slices(call: Call) -> tuple[tuple[slice, ...], tuple[bool, ...]]:
    """`slice_by_index`'s parameters as Python slices, and which axes it drops."""
    rank = call.type("x").rank
    begin, end = call.integers("begin"), call.integers("end")
    stride = call.integers("stride") if call.has("stride") else (1,) * rank
    masks = []
    for name in ("begin_mask", "end_mask", "squeeze_mask"):
        masks.append(tuple(map(bool, call.integers(name))) if call.has(name) else (False,) * rank)
    if not len(begin) == len(end) == len(stride) == rank or any(len(m) != rank for m in masks):
        raise call.refuse(f"begin, end, stride and masks need {rank} entries")
    if 0 in stride:
        raise call.refuse("stride needs numbers other than 0")
    slices = []
    for i in range(rank):
        if masks[2][i]:
            stop = begin[i] + 1
            slices.append(slice(begin[i], stop if stop != 0 else None, 1))
            continue
        whole_start, whole_end = masks[0][i], masks[1][i]
        slices.append(slice(None if whole_start else begin[i], None if whole_end else end[i], stride[i]))
    return tuple(slices), masks[2]


@rule("concat", tensors("values"), const("axis"), const("interleave", "bool", False), family="movement")
def concat(call: Call) -> tuple[TensorType, ...]:
    """Joins along an axis; interleave takes one index of each in turn."""
    types = call.types("values")
    if not types:
        raise call.refuse("values needs at least one tensor; got none")
    first = types[0]
    along = axis(call, call.integer("axis"), first.rank)
    for other in types[1:]:
        agree = other.rank == first.rank and other.dtype == first.dtype
        pairs = enumerate(zip(first.shape, other.shape, strict=False))
        if not agree or any(a != b for i, (a, b) in pairs if i != along):
            raise call.refuse(
                f"values need shapes that agree off axis {along}; got {', '.join(map(str, types))}"
            )
    if call.flag("interleave") and len({t.shape for t in types}) != 1:
        raise call.refuse("values need equal shapes to be interleaved")
    total = sum(t.shape[along] for t in types)
    return (TensorType(first.dtype, (*first.shape[:along], total, *first.shape[along + 1 :])),)


@rule("tile", tensor("x"), const("reps"), dtypes="x:FIB", family="movement")
def tile(call: Call) -> tuple[TensorType, ...]:
    """Repeats each axis reps times."""
    x, reps = call.type("x"), call.integers("reps")
    if len(reps) != x.rank or any(r < 1 for r in reps):
        raise call.refuse(f"reps needs {x.rank} positive numbers; got {reps}")
    return (TensorType(x.dtype, tuple(n * r for n, r in zip(x.shape, reps, strict=True))),)


@rule(
    "pad",
    tensor("x"),
    const("pad"),
    const("mode", "string", "constant"),
    const("constant_val", "fp16", 0.0),
    dtypes="x:F.T constant_val:F.T",
    family="movement",
)
def pad(call: Call) -> tuple[TensorType, ...]:
    """`pad` lists (before, after) for the last `len(pad) / 2` axes."""
    x, amounts = call.type("x"), call.integers("pad")
    if len(amounts) % 2 or len(amounts) > 2 * x.rank or any(a < 0 for a in amounts):
        raise call.refuse(f"pad needs pairs of non-negative numbers for at most {x.rank} axes; got {amounts}")
    if call.text("mode") not in ("constant", "reflect", "replicate"):
        raise call.refuse(f"mode needs constant, reflect or replicate; got {call.text('mode')!r}")
    first = x.rank - len(amounts) // 2
    shape = list(x.shape)
    for i in range(first, x.rank):
        shape[i] += amounts[2 * (i - first)] + amounts[2 * (i - first) + 1]
    return (TensorType(x.dtype, tuple(shape)),)


@rule("const", const("val", "fp16"), family="view")
def constant(call: Call) -> tuple[TensorType, ...]:
    """A constant that is itself a result (a function output); other constants are literals of their users."""
    return (call.type("val"),)
