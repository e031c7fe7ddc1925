"""Ops that reorder whole tensors: blocks between depth, space and batch, reversals, windows, bands, joins.

No arithmetic but `cumsum`'s; bit patterns pass through. Parts of `split` and `crop` that start inside the
last axis go through the crop unit like slices (`movement.through_crop_unit`).
"""

from __future__ import annotations

import numpy as np
import torch

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import axes
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.kernels.contraction import as_tensor
from ane_trainer.ane.simulator.kernels.movement import (
    MOVES,
    copy_into,
    crop_into,
    split_slices,
    through_crop_unit,
)
from ane_trainer.ane.simulator.loops.compiled import Pass, Step, copies, in_turn
from ane_trainer.ane.simulator.loops.convert import rounded
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away
from ane_trainer.ane.simulator.registry import EngineContext, kernel, writes

_CORE_ML = "refused on the e5rt path (ANEForge sweep, M5), runs on the host in Core ML; moves bit patterns"


@kernel("split", "exact", MOVES + "; parts inside the last axis as width-offset slices (assumed)")
def split(ctx: EngineContext, call: Call, x: Array) -> tuple[Array, ...]:
    """Parts along an axis; each but the first starts inside it."""
    along = call.integer("axis") % x.ndim
    parts = []
    for where in split_slices(call):
        offset = along == x.ndim - 1 and where[along].start != 0
        parts.append(through_crop_unit(ctx, x[where]) if offset else x[where])
    return tuple(parts)


@writes("split")
def split_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `split`."""
    along, steps = call.integer("axis") % x.ndim, []
    for where, out in zip(split_slices(call), outputs, strict=True):
        offset = along == x.ndim - 1 and where[along].start != 0
        steps.append((crop_into if offset else copy_into)(ctx, x[where], out))
    return in_turn(*steps)


@kernel("stack", "exact", MOVES)
def stack(ctx: EngineContext, call: Call, values: tuple[Array, ...]) -> Array:
    """The values along a new axis."""
    return np.stack(values, axis=call.integer("axis"))


@writes("stack")
def stack_into(ctx: EngineContext, call: Call, outputs: list[Array], values: tuple[Array, ...]) -> Step:
    """See `stack`."""
    return copies(
        list(zip(np.moveaxis(outputs[0], call.integer("axis"), 0), values, strict=True)), ctx.threads
    )


@kernel("reverse", "exact", MOVES)
def reverse(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x backwards along `axes` (all when absent)."""
    return np.flip(x, axes(call, "axes", x.ndim))


@writes("reverse")
def reverse_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `reverse`."""
    return copy_into(ctx, reverse(ctx, call, x), outputs[0])


@kernel("flatten2d", "exact", MOVES)
def flatten2d(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x as a matrix, cut before `axis`."""
    return x.reshape(call.op.infer(call)[0].shape)


@kernel("reshape_like", "exact", _CORE_ML)
def reshape_like(ctx: EngineContext, call: Call, x: Array, *_references: tuple[Array, ...]) -> Array:
    """x in a shape made of the extents of other tensors."""
    return x.reshape(call.op.infer(call)[0].shape)


@kernel("crop", "exact", MOVES + "; a cut on the left as a width-offset slice (assumed)")
def crop(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x `[*, H, W]` without the (top, bottom) rows and (left, right) columns."""
    (top, bottom), (left, right) = call.integers("crop_height"), call.integers("crop_width")
    kept = x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
    return through_crop_unit(ctx, kept) if left else kept


@writes("crop")
def crop_op_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `crop`."""
    (top, bottom), (left, right) = call.integers("crop_height"), call.integers("crop_width")
    kept = x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
    return (crop_into if left else copy_into)(ctx, kept, outputs[0])


@kernel("depth_to_space space_to_depth pixel_shuffle pixel_unshuffle", "exact", MOVES)
def shuffled(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Blocks of b x b moved between depth and space, see `_blocks`."""
    return _blocks(call, x).reshape(call.op.infer(call)[0].shape)


@writes("depth_to_space space_to_depth pixel_shuffle pixel_unshuffle")
def shuffled_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `shuffled`."""
    blocks = _blocks(call, x)
    return copy_into(ctx, blocks, outputs[0].reshape(blocks.shape))


def _blocks(call: Call, x: Array) -> Array:
    """x `[N, C, H, W]` cut into blocks, in the order of the result: a view of six axes.

    depth_to_space: `[N, b*b*C', H, W]`, the block's row and column slowest, to `[N, C', H*b, W*b]`;
    pixel_shuffle (PyTorch's order): the channel slowest; space_to_depth and pixel_unshuffle: their inverses.
    """
    n, c, h, w = x.shape
    match call.op.kind:
        case "depth_to_space":
            b = call.integer("block_size")
            return x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
        case "pixel_shuffle":
            b = call.integer("upscale_factor")
            return x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
        case "space_to_depth":
            b = call.integer("block_size")
            return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
        case _:
            b = call.integer("downscale_factor")
            return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 1, 3, 5, 2, 4)


@kernel("space_to_batch", "exact", MOVES)
def space_to_batch(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Padded space cut into blocks; the block's row and column become the slowest part of the batch."""
    (bh, bw), pairs = call.integers("block_shape"), call.integers("paddings")
    padded = np.pad(x, ((0, 0), (0, 0), pairs[:2], pairs[2:]))
    n, c, h, w = padded.shape
    blocks = padded.reshape(n, c, h // bh, bh, w // bw, bw).transpose(3, 5, 0, 1, 2, 4)
    return blocks.reshape(bh * bw * n, c, h // bh, w // bw)


@kernel("batch_to_space", "exact", MOVES)
def batch_to_space(ctx: EngineContext, call: Call, x: Array) -> Array:
    """The inverse of `space_to_batch`, with crops for paddings."""
    (bh, bw), cuts = call.integers("block_shape"), call.integers("crops")
    n, c, h, w = x.shape
    blocks = x.reshape(bh, bw, n // (bh * bw), c, h, w).transpose(2, 3, 4, 0, 5, 1)
    whole = blocks.reshape(n // (bh * bw), c, h * bh, w * bw)
    return whole[:, :, cuts[0] : h * bh - cuts[1], cuts[2] : w * bw - cuts[3]]


@kernel("reverse_sequence", "exact", _CORE_ML)
def reverse_sequence(ctx: EngineContext, call: Call, x: Array, lengths: Array) -> Array:
    """The first lengths[i] entries along `seq_axis` reversed, for each entry i of `batch_axis`."""
    moved = np.moveaxis(x, (call.integer("batch_axis"), call.integer("seq_axis")), (0, 1))
    out = moved.copy()
    for i, length in enumerate(lengths):
        out[i, :length] = moved[i, :length][::-1]
    return np.moveaxis(out, (0, 1), (call.integer("batch_axis"), call.integer("seq_axis")))


@kernel("sliding_windows", "exact", _CORE_ML)
def sliding_windows(ctx: EngineContext, call: Call, x: Array) -> Array:
    """`axis` becomes two: the windows, one every `stride` entries, and the `size` entries of each."""
    along, size = call.integer("axis") % x.ndim, call.integer("size")
    every = np.lib.stride_tricks.sliding_window_view(x, size, axis=along)
    chosen = every[(slice(None),) * along + (slice(None, None, call.integer("stride")),)]
    return np.moveaxis(chosen, -1, along + 1)


@kernel("band_part", "exact", _CORE_ML)
def band_part(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Zero off the band of `lower` diagonals below and `upper` above the main one; negative keeps all."""
    row, column = np.indices(x.shape[-2:])
    lower, upper = call.integer("lower"), call.integer("upper")
    band = ((lower < 0) | (row - column <= lower)) & ((upper < 0) | (column - row <= upper))
    return np.where(band, x, np.zeros((), x.dtype))


@kernel(
    "cumsum",
    "assumed",
    "refused on the e5rt path (ANEForge sweep, M5); summed wide, each result rounded once",
)
def cumsum(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Running sum along `axis`; `exclusive` starts at 0, `reverse` runs from the end."""
    axis = call.integer("axis")
    ordered = np.flip(x, axis) if call.flag("reverse") else x
    wide: Array = ordered.astype(np.float64 if x.dtype == np.float32 else np.int64)
    total: Array = np.cumsum(wide, axis)
    if call.flag("exclusive"):
        total = total - wide
    total = np.flip(total, axis) if call.flag("reverse") else total
    return round_half_away(total) if x.dtype == np.float32 else total


@writes("cumsum")
def cumsum_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `cumsum`; in fast mode the running sum is handed out as fp32."""
    out, axis = outputs[0], call.integer("axis")
    if x.dtype != np.float32 or call.flag("reverse") or call.flag("exclusive"):
        return lambda: np.copyto(out, cumsum(ctx, call, x))
    source, target = as_tensor(x), torch.from_numpy(out)
    if ctx.fast:
        work = Pass(ctx)
        finish = work.store(work.add("round", work.load(out)), out)

        def run() -> None:
            torch.cumsum(source, axis, out=target)
            finish()

        return run
    return lambda: np.copyto(out, rounded(torch.cumsum(source, axis, dtype=torch.float64).numpy()))
