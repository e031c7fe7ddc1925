"""Windows of an image, concatenated slice by slice, read where they lie: products without the columns in memory.

    pad -> slices -> concat (axis by axis) -> reshape -> matmul        is the convolution that it means

Shifted slices of one value, concatenated, are a view of it with more axes: one tensor axis (`positions`, `taps x C`)
is then several view axes. Slices, reshapes, transposes and further concatenations keep that form; a matrix product
reads it, in exact mode through tables of offsets, in fast mode as the machine's convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.movement import index_slices
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.kernels.contraction import as_tensor
from ane_trainer.ane.simulator.loops.compiled import in_turn, round_in_place
from ane_trainer.ane.simulator.mac.product import Gathered, mac_bind_gathered
from ane_trainer.ane.simulator.registry import EngineContext

Step = Callable[[], None]


@dataclass(frozen=True)
class Unfolded:
    """A float32 view; tensor axis i is its next `groups[i]` axes."""

    view: Array
    groups: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(math.prod(self.view.shape[part]) for part in self._parts())

    def _parts(self) -> list[slice]:
        ends = np.cumsum(self.groups).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.groups, strict=True)]

    def axis(self, number: int) -> tuple[list[int], list[int]]:
        """Extents and strides (bytes) of the view axes of one tensor axis."""
        part = self._parts()[number]
        return list(self.view.shape[part]), list(self.view.strides[part])

    def dense(self) -> Array:
        """The tensor itself, a copy."""
        return np.ascontiguousarray(self.view).reshape(self.shape)

    def transposed(self, order: Sequence[int]) -> Unfolded:
        """The tensor axes in another order."""
        parts = self._parts()
        axes = [a for i in order for a in range(parts[i].start, parts[i].stop)]
        return Unfolded(self.view.transpose(axes), tuple(self.groups[i] for i in order))

    def reshaped(self, shape: Sequence[int]) -> Unfolded | None:
        """The tensor in another shape, where every new axis is made of whole view axes or even parts of them."""
        left = list(zip(self.view.shape, self.view.strides, strict=True))
        extents: list[int] = []
        strides: list[int] = []
        groups: list[int] = []
        for wanted in reversed(shape):
            count = 0
            while wanted > 1 or not count:
                if not left or wanted == 1:
                    extents, strides, wanted = [1, *extents], [0, *strides], 1
                else:
                    extent, stride = left.pop()
                    if wanted % extent and extent % wanted:
                        return None
                    taken = min(extent, wanted)
                    extents, strides = [taken, *extents], [stride, *strides]
                    if taken < extent:
                        left.append((extent // taken, stride * taken))
                    wanted //= taken
                count += 1
            groups = [count, *groups]
        return Unfolded(as_strided(self.view, extents, strides), tuple(groups))

    def sliced(self, places: Sequence[slice]) -> Unfolded | None:
        """A part of the tensor; only axes that are one view axis may be cut."""
        cuts: list[slice] = []
        for place, extent, count in zip(places, self.shape, self.groups, strict=True):
            whole = place.indices(extent) == (0, extent, 1)
            if not whole and count > 1:
                return None
            cuts += [slice(None)] * count if whole else [place]
        return Unfolded(self.view[tuple(cuts)], self.groups)


def joined(parts: Sequence[Unfolded], axis: int) -> Unfolded | None:
    """Equally spaced slices of one value, concatenated along an axis; None where they are not that."""
    first = parts[0]
    places = [part.view.__array_interface__["data"][0] for part in parts]
    spacing = places[1] - places[0] if len(places) > 1 else 0
    alike = all((p.groups, p.view.shape, p.view.strides) == (first.groups, first.view.shape, first.view.strides)
                for p in parts)  # fmt: skip
    if spacing == 0 or not alike or any(b - a != spacing for a, b in pairwise(places)):
        return None
    at = sum(first.groups[:axis])
    shape, strides = list(first.view.shape), list(first.view.strides)
    shape.insert(at, len(parts))
    strides.insert(at, spacing)
    groups = tuple(n + (i == axis) for i, n in enumerate(first.groups))
    return Unfolded(as_strided(first.view, shape, strides), groups)


def plain(array: Array) -> Unfolded:
    """An array as it is."""
    return Unfolded(array, (1,) * array.ndim)


def moved(call: Call, x: Unfolded) -> Unfolded | None:
    """The result of a reshape, transpose or slice op, or None where it needs a copy."""
    kind = call.op.kind
    if kind == "transpose":
        return x.transposed(call.integers("perm"))
    (type_,) = call.op.infer(call)
    if kind in ("reshape", "expand_dims", "squeeze"):
        return x.reshaped(type_.shape)
    if kind == "slice_by_size":
        begin = call.integers("begin")
        return x.sliced([slice(b, b + n) for b, n in zip(begin, type_.shape, strict=True)])
    if kind == "slice_by_index":
        slices, squeezed = index_slices(call)
        return None if any(squeezed) else x.sliced(slices)
    return None


_FEW, _LARGE = 4, 1 << 20
"""Products of a batch that may be small; multiply-accumulates from which each is worth a call of its own."""

_FEW_COLUMNS = 1 << 16
"""Elements of columns that are copied rather than convolved: ResNet-18 at 8 x 64 x 64 takes 3.9 ms instead of 6.8."""


def product(ctx: EngineContext, a: Unfolded, b: Unfolded, out: Array) -> Step | None:
    """The step `out = a @ b`, or None where the operands must be in memory."""
    if a.view.dtype != np.float32 or b.view.dtype != np.float32 or len(a.groups) != out.ndim or out.ndim > 3:
        return None
    if len(b.groups) > out.ndim or any(x.groups[0] != 1 for x in (a, b) if len(x.groups) == 3):
        return None
    if out.ndim == 3 and len(out) > _FEW and math.prod(out.shape[1:]) * a.shape[-1] < _LARGE:
        # many small products: by channel, or one batched product of columns in memory
        return _by_channel(a, b, out, round_in_place(out, ctx.threads)) if ctx.fast else None
    pairs = [(a, b, out)]
    if out.ndim == 3:
        pairs = [(_entry(a, i, 3), _entry(b, i, 3), out[i]) for i in range(len(out))]
    make = _by_convolution if ctx.fast else _by_tables
    steps = [make(ctx, *pair) for pair in pairs]
    found = [step for step in steps if step is not None]
    return in_turn(*found) if len(found) == len(steps) else None


def _entry(x: Unfolded, i: int, rank: int) -> Unfolded:
    """One matrix of a batch; a single matrix is every one."""
    return Unfolded(x.view[i if len(x.view) > 1 else 0], x.groups[1:]) if len(x.groups) == rank else x


def _by_tables(ctx: EngineContext, a: Unfolded, b: Unfolded, out: Array) -> Step:
    """In exact mode: the multiply-accumulate kernel gathers as it packs."""
    return mac_bind_gathered(_operand(a), _operand(b), threads=ctx.threads, out=out)


def _operand(x: Unfolded) -> Gathered | Array:
    if x.groups == (1, 1):
        return x.view
    backwards = tuple(slice(None, None, -1) if stride < 0 else slice(None) for stride in x.view.strides)
    lowest = x.view[backwards]
    span = sum((n - 1) * stride for n, stride in zip(lowest.shape, lowest.strides, strict=True)) // 4 + 1
    memory = as_strided(lowest, (span,), (4,))
    return Gathered(memory, *(_offsets(*x.axis(i)) for i in range(2)))


def _offsets(extents: Sequence[int], strides: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Offsets of a tensor axis in elements, from the lowest address on."""
    total = np.zeros(1, np.int64)
    for extent, stride in zip(extents, strides, strict=True):
        steps = np.arange(extent, dtype=np.int64) if stride >= 0 else np.arange(extent, dtype=np.int64)[::-1]
        total = (total[:, None] + steps * (abs(stride) // 4)).reshape(-1)
    return total


def _by_convolution(ctx: EngineContext, a: Unfolded, b: Unfolded, out: Array) -> Step | None:
    """In fast mode: windows times a matrix is a convolution, their transpose times one the gradient of its weight."""
    if b.groups != (1, 1) or len(a.groups) != 2 or max(a.groups) < 2:
        return None
    backward = _ends_in_channels(a, 0) and not _ends_in_channels(a, 1)
    positions, taps = (1, 0) if backward else (0, 1)
    found = _image(a.axis(positions), a.axis(taps))
    if found is None:
        return None
    image, flips, strides, dilations, outputs, kernel = found
    if _as_columns(a, b, image):
        return None
    x, depth = as_tensor_at(a.view, image), math.prod(a.axis(taps)[0])
    channels = a.axis(taps)[0][-1]
    y, result = as_tensor(b.view), torch.from_numpy(out)
    finish = round_in_place(out, ctx.threads)
    spatial = len(kernel)
    dims = [2 + i for i in range(spatial) if flips[i]]
    count = x.shape[0]

    def forward() -> None:
        weight = y.reshape(*kernel, channels, -1).permute(spatial + 1, spatial, *range(spatial))
        weight = weight.flip(dims) if dims else weight
        raw = _CONVOLUTIONS[spatial](x, weight, None, strides, 0, dilations)
        result.copy_(raw.permute(0, *range(2, 2 + spatial), 1).reshape(result.shape))
        finish()

    def gradient() -> None:
        g = y.reshape(count, *outputs, -1).permute(0, spatial + 1, *range(1, spatial + 1))
        shape = (g.shape[1], channels, *kernel)
        raw = torch.ops.aten.convolution_backward(
            g, x, x.new_empty(shape), None, strides, [0] * spatial, dilations, False, [0] * spatial, 1,
            (False, True, False),
        )[1]  # fmt: skip
        raw = raw.flip(dims) if dims else raw
        result.copy_(raw.permute(*range(2, 2 + spatial), 1, 0).reshape(depth, -1))
        finish()

    return gradient if backward else forward


def _as_columns(a: Unfolded, b: Unfolded, image: _Layout) -> bool:
    """Whether columns in memory are faster than a convolution: few of them, for each call of one costs 60 to 100 us;
    and windows that do not overlap, which the library's backward convolution takes two hundred times as long for.
    """
    size, least = a.view.size, math.prod(image.shape)
    return size <= (_FEW_COLUMNS if b.shape[1] < 16 else 4 * _FEW_COLUMNS) or size <= least


_SMALL_CHANNELS = 1 << 17
"""Elements of all channels' columns that are copied rather than convolved."""


def _by_channel(a: Unfolded, b: Unfolded, out: Array, finish: Step) -> Step | None:
    """In fast mode: windows of one channel each times its weight are a depthwise convolution, see `_by_convolution`."""
    neighbours = a.groups[0] == 1 and a.view.strides[0] == a.view.itemsize
    if not neighbours or b.groups != (1, 1, 1) or len(b.view) != len(out):
        return None
    if out.shape[2] > 1 or len(a.view) != len(out) or a.view.size <= _SMALL_CHANNELS:
        return None
    backward = a.axis(1)[0][-1] == 1 != a.axis(2)[0][-1]
    positions, taps = (2, 1) if backward else (1, 2)
    found = _image(a.axis(positions), a.axis(taps)) if a.axis(taps)[0][-1] == 1 else None
    if found is None:
        return None
    image, flips, strides, dilations, outputs, kernel = found
    count, channels = image.shape[0], len(out)
    wide = _Layout(
        (count, channels, *image.shape[2:]), (image.strides[0], a.view.itemsize, *image.strides[2:])
    )
    x, y = as_tensor_at(a.view, wide), as_tensor(b.view)
    dims = [2 + i for i, flipped in enumerate(flips) if flipped]
    none, swapped = [0] * len(kernel), (1, 0, *range(2, 2 + len(kernel)))
    result = torch.from_numpy(out).view(channels, *((1, *kernel) if backward else (count, *outputs)))

    def forward() -> None:
        weight = y.reshape(channels, 1, *kernel)
        weight = weight.flip(dims) if dims else weight
        raw = _CONVOLUTIONS[len(kernel)](x, weight, None, strides, 0, dilations, channels)
        result.copy_(raw.permute(swapped))
        finish()

    def gradient() -> None:
        g = y.reshape(channels, count, *outputs).permute(swapped)
        raw = torch.ops.aten.convolution_backward(
            g, x, x.new_empty((channels, 1, *kernel)), None, strides, none, dilations, False, none, channels,
            (False, True, False),
        )[1]  # fmt: skip
        result.copy_(raw.flip(dims) if dims else raw)
        finish()

    return gradient if backward else forward


_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def _ends_in_channels(a: Unfolded, axis: int) -> bool:
    """Whether a tensor axis ends in the channels: neighbours in memory, or one. (Either axis can be taken for the taps:
    this only decides which convolution is asked for.)
    """
    extents, strides = a.axis(axis)
    return extents[-1] == 1 or strides[-1] == a.view.itemsize


@dataclass(frozen=True)
class _Layout:
    """Shape and strides (bytes) of an image `[N, C, *spatial]`, from the lowest address of the windows."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


_Found = tuple[_Layout, list[bool], list[int], list[int], list[int], list[int]]


def _image(positions: tuple[list[int], list[int]], taps: tuple[list[int], list[int]]) -> _Found | None:
    """The image whose windows have these view axes: layout, flipped axes, strides, dilations, outputs, kernel.

    Positions are `[N..., *outputs]`, taps `[*kernel, C]`.
    """
    spatial = len(taps[0]) - 1
    lead = len(positions[0]) - spatial
    if not 1 <= spatial <= 3 or lead < 0:
        return None
    samples, sample_stride = 1, 0
    for extent, stride in list(zip(*positions, strict=True))[:lead]:
        if extent > 1 and samples > 1 and sample_stride != extent * stride:
            return None
        if extent > 1:
            samples, sample_stride = samples * extent, stride
    outputs, kernel = positions[0][lead:], taps[0][:-1]
    extents, steps, strides, dilations, flips = [], [], [], [], []
    for n, move, k, step in zip(outputs, positions[1][lead:], kernel, taps[1][:-1], strict=True):
        unit = math.gcd(move if n > 1 else 0, abs(step) if k > 1 else 0) or 4
        strides.append(move // unit if n > 1 else 1)
        dilations.append(abs(step) // unit if k > 1 else 1)
        if move < 0 or strides[-1] < 1:
            return None
        flips.append(step < 0 and k > 1)
        extents.append((n - 1) * strides[-1] + (k - 1) * dilations[-1] + 1)
        steps.append(unit)
    layout = _Layout((samples, taps[0][-1], *extents), (sample_stride, taps[1][-1], *steps))
    return layout, flips, strides, dilations, outputs, kernel


def as_tensor_at(view: Array, layout: _Layout) -> torch.Tensor:
    """An image at the lowest address of a view."""
    lowest = view[tuple(slice(None, None, -1) if stride < 0 else slice(None) for stride in view.strides)]
    return as_tensor(as_strided(lowest, layout.shape, layout.strides))
