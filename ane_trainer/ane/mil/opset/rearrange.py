"""Type rules of ops that reorder whole tensors: split, stack, reverse, blocks, windows, running sums."""

from __future__ import annotations

import math

from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor, tensors
from ane_trainer.ane.mil.opset.shapes import axes, axis
from ane_trainer.ane.mil.program import Literal, TensorType

#: Most results of one `split`; no engine has longer axes, and a number in a text must not ask for memory.
MAX_PARTS = 65536


@rule(
    "split",
    tensor("x"),
    const("num_splits", "int32", None),
    const("split_sizes", "int32", None),
    const("axis"),
    dtypes="x:FIB",
    family="movement",
)
def split(call: Call) -> tuple[TensorType, ...]:
    """Equal parts by `num_splits`, or the extents `split_sizes`; one result each."""
    x = call.type("x")
    along = axis(call, call.integer("axis"), x.rank)
    extent = x.shape[along]
    if call.has("split_sizes"):
        sizes = call.integers("split_sizes")
        if call.has("num_splits") and call.integer("num_splits") != len(sizes):
            raise call.refuse(f"num_splits needs {len(sizes)}, the number of split_sizes")
    elif call.has("num_splits"):
        count = call.integer("num_splits")
        if not 1 <= count <= min(extent, MAX_PARTS) or extent % count:
            raise call.refuse(f"num_splits needs a divisor of {extent}, at most {MAX_PARTS}; got {count}")
        sizes = (extent // count,) * count
    else:
        raise call.refuse("needs num_splits or split_sizes; got neither")
    if sum(sizes) != extent or min(sizes) < 1:
        raise call.refuse(f"split_sizes needs positive numbers that sum to {extent}; got {sizes}")
    return tuple(TensorType(x.dtype, (*x.shape[:along], n, *x.shape[along + 1 :])) for n in sizes)


@rule("stack", tensors("values"), const("axis"), family="movement")
def stack(call: Call) -> tuple[TensorType, ...]:
    """Joins tensors of one type along a new axis."""
    types = call.types("values")
    if not types or len(set(types)) != 1:
        raise call.refuse(f"values needs tensors of one type; got {', '.join(map(str, types)) or 'none'}")
    first = types[0]
    along = axis(call, call.integer("axis"), first.rank + 1)
    return (TensorType(first.dtype, (*first.shape[:along], len(types), *first.shape[along:])),)


@rule("reverse", tensor("x"), const("axes", "int32", None), dtypes="x:ALL", family="movement")
def reverse(call: Call) -> tuple[TensorType, ...]:
    """Reverses the given axes, all when absent."""
    axes(call, "axes", call.type("x").rank)
    return (call.type("x"),)


@rule(
    "reverse_sequence",
    tensor("x"),
    tensor("lengths"),
    const("seq_axis", "int32", 0),
    const("batch_axis", "int32", 0),
    dtypes="x:ALL lengths:I",
)
def reverse_sequence(call: Call) -> tuple[TensorType, ...]:
    """Reverses the first lengths[i] entries of each sequence."""
    x, lengths = call.type("x"), call.type("lengths")
    axis(call, call.integer("seq_axis"), x.rank)
    batch = axis(call, call.integer("batch_axis"), x.rank)
    if lengths.shape != (x.shape[batch],):
        raise call.refuse(f"lengths needs the shape [{x.shape[batch]}]; got {lengths}")
    return (x,)


@rule("depth_to_space", tensor("x"), const("block_size"), dtypes="x:F", family="movement")
@rule("pixel_shuffle", tensor("x"), const("upscale_factor"), dtypes="x:F", family="movement")
def depth_to_space(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C*b*b, H, W]` -> `[N, C, H*b, W*b]`."""
    n, c, h, w = _rank_4(call).shape
    b = call.integer("block_size" if call.op.kind == "depth_to_space" else "upscale_factor")
    if b < 1 or c % (b * b):
        raise call.refuse(f"needs channels that {b} * {b} divides; got {c}")
    return (TensorType(call.type("x").dtype, (n, c // (b * b), h * b, w * b)),)


@rule("space_to_depth", tensor("x"), const("block_size"), dtypes="x:F", family="movement")
@rule("pixel_unshuffle", tensor("x"), const("downscale_factor", "uint32"), dtypes="x:F", family="movement")
def space_to_depth(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C, H*b, W*b]` -> `[N, C*b*b, H, W]`."""
    n, c, h, w = _rank_4(call).shape
    b = call.integer("block_size" if call.op.kind == "space_to_depth" else "downscale_factor")
    if b < 1 or h % b or w % b:
        raise call.refuse(f"needs height and width that {b} divides; got {h} and {w}")
    return (TensorType(call.type("x").dtype, (n, c * b * b, h // b, w // b)),)


@rule("space_to_batch", tensor("x"), const("block_shape"), const("paddings"), dtypes="x:F", family="movement")
def space_to_batch(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C, H, W]`, block_shape `[2]`, paddings `[2, 2]` (before, after)."""
    x, block, paddings = _rank_4(call), *_block_and_pairs(call, "paddings")
    extents = [n + paddings[2 * i] + paddings[2 * i + 1] for i, n in enumerate(x.shape[2:])]
    if any(e % b for e, b in zip(extents, block, strict=True)):
        raise call.refuse(f"needs padded extents that block_shape divides; got {extents} and {block}")
    spatial = (e // b for e, b in zip(extents, block, strict=True))
    return (TensorType(x.dtype, (x.shape[0] * math.prod(block), x.shape[1], *spatial)),)


@rule("batch_to_space", tensor("x"), const("block_shape"), const("crops"), dtypes="x:F", family="movement")
def batch_to_space(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C, H, W]`, block_shape `[2]`, crops `[2, 2]` (before, after)."""
    x, block, crops = _rank_4(call), *_block_and_pairs(call, "crops")
    if x.shape[0] % math.prod(block):
        raise call.refuse(f"needs a batch that {math.prod(block)} divides; got {x.shape[0]}")
    spatial = (n * block[i] - crops[2 * i] - crops[2 * i + 1] for i, n in enumerate(x.shape[2:]))
    return (TensorType(x.dtype, (x.shape[0] // math.prod(block), x.shape[1], *spatial)),)


def _rank_4(call: Call) -> TensorType:
    if call.type("x").rank != 4:
        raise call.refuse(f"x needs rank 4; got {call.type('x')}")
    return call.type("x")


def _block_and_pairs(call: Call, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if call.type("block_shape").shape != (2,) or call.type(name).shape != (2, 2):
        raise call.refuse(
            f"needs block_shape [2] and {name} [2, 2]; got {call.type('block_shape')}, {call.type(name)}"
        )
    block, pairs = call.integers("block_shape"), call.integers(name)
    if min(block) < 1 or min(pairs) < 0:
        raise call.refuse(
            f"needs block_shape of at least 1 and {name} of at least 0; got {block} and {pairs}"
        )
    return block, pairs


@rule("flatten2d", tensor("x"), const("axis", "int32", 1), dtypes="x:FIB", family="view")
def flatten2d(call: Call) -> tuple[TensorType, ...]:
    """`[prod(shape[:axis]), prod(shape[axis:])]`."""
    x, at = call.type("x"), call.integer("axis")
    if not -x.rank <= at <= x.rank:
        raise call.refuse(f"axis needs a number in [{-x.rank}, {x.rank}]; got {at}")
    return (TensorType(x.dtype, (math.prod(x.shape[:at]), math.prod(x.shape[at:]))),)


@rule(
    "sliding_windows", tensor("x"), const("axis"), const("size"), const("stride", "int32", 1), dtypes="x:ALL"
)
def sliding_windows(call: Call) -> tuple[TensorType, ...]:
    """The axis becomes two: how many windows, and `size`."""
    x, size, stride = call.type("x"), call.integer("size"), call.integer("stride")
    along = axis(call, call.integer("axis"), x.rank)
    if stride < 1 or not 1 <= size <= x.shape[along]:
        raise call.refuse(
            f"needs 1 <= size <= {x.shape[along]} and a positive stride; got {size} and {stride}"
        )
    count = (x.shape[along] - size) // stride + 1
    return (TensorType(x.dtype, (*x.shape[:along], count, size, *x.shape[along + 1 :])),)


@rule("band_part", tensor("x"), const("lower", "int32", -1), const("upper", "int32", -1), dtypes="x:FIB")
def band_part(call: Call) -> tuple[TensorType, ...]:
    """Keeps a band around the diagonal of the last two axes."""
    if call.type("x").rank < 2:
        raise call.refuse(f"x needs rank 2 or more; got {call.type('x')}")
    return (call.type("x"),)


@rule(
    "cumsum",
    tensor("x"),
    const("axis", "int32", 0),
    const("exclusive", "bool", False),
    const("reverse", "bool", False),
    dtypes="x:FI",
)
def cumsum(call: Call) -> tuple[TensorType, ...]:
    """Running sum along an axis (from -1)."""
    if not -1 <= call.integer("axis") < call.type("x").rank:
        raise call.refuse(f"axis needs a number in [-1, {call.type('x').rank}); got {call.integer('axis')}")
    return (call.type("x"),)


@rule(
    "reshape_like",
    tensor("x"),
    tensors("ref_tensors"),
    tensors("begins"),
    tensors("ends"),
    tensors("end_masks"),
    dtypes="x:ALL",
)
def reshape_like(call: Call) -> tuple[TensorType, ...]:
    """The extents [begin, end) of each reference, one after the other; `end_masks` means to the last."""
    x, references = call.type("x"), call.types("ref_tensors")
    limits = [_scalars(call, name) for name in ("begins", "ends", "end_masks")]
    if any(len(given) != len(references) for given in limits):
        raise call.refuse(f"begins, ends and end_masks need {len(references)} entries")
    shape: tuple[int, ...] = ()
    for reference, begin, end, masked in zip(references, *limits, strict=True):
        shape += reference.shape[begin:] if masked else reference.shape[begin:end]
    if math.prod(shape) != x.size:
        raise call.refuse(f"needs {x.size} elements; got {shape}")
    return (TensorType(x.dtype, shape),)


def _scalars(call: Call, name: str) -> tuple[int, ...]:
    items = call.args[name]
    if not isinstance(items, tuple) or any(not isinstance(i, Literal) or i.type.rank for i in items):
        raise call.refuse(f"{name} needs constant scalars")
    values = [i.to_python() for i in items if isinstance(i, Literal)]
    if any(isinstance(v, (str, tuple)) for v in values):
        raise call.refuse(f"{name} needs numbers; got {values}")
    return tuple(int(v) for v in values)  # type: ignore[arg-type]
