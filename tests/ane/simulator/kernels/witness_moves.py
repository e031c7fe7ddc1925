"""Ops that move or pick elements: every bit is kept."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from tests.ane.simulator.kernels.witness import Drawn, Rng, moved, normal, op, sizes, wide

# --- moves ---


@op("split")
def split(rng: Rng) -> Drawn:
    shape = list(sizes(rng, 3))
    axis, parts = int(rng.integers(3)), sizes(rng, 3, 1, 4)
    shape[axis] = sum(parts)
    x = moved(rng, *shape)
    want = tuple(t.numpy() for t in torch.split(wide(x), parts, axis))
    return Drawn({"x": x}, {"split_sizes": list(parts), "axis": axis - 3}, want)


@op("stack")
def stack(rng: Rng) -> Drawn:
    shape, axis = sizes(rng, 2), int(rng.integers(-3, 3))
    values = tuple(moved(rng, *shape) for _ in range(3))
    return Drawn({"values": values}, {"axis": axis}, (torch.stack([wide(v) for v in values], axis).numpy(),))


@op("concat")
def concat(rng: Rng) -> Drawn:
    shape, axis = sizes(rng, 3), int(rng.integers(-3, 3))
    values = tuple(moved(rng, *shape) for _ in range(3))
    interleave = bool(rng.integers(2))
    joined = torch.cat([wide(v) for v in values], axis)
    if interleave:
        joined = torch.stack([wide(v) for v in values], axis % 3 + 1).flatten(axis % 3, axis % 3 + 1)
    return Drawn({"values": values}, {"axis": axis, "interleave": interleave}, (joined.numpy(),))


@op("tile")
def tile(rng: Rng) -> Drawn:
    x, reps = moved(rng, *sizes(rng, 3, 1, 3)), sizes(rng, 3, 1, 3)
    return Drawn({"x": x}, {"reps": list(reps)}, (wide(x).repeat(reps).numpy(),))


@op("reverse")
def reverse(rng: Rng) -> Drawn:
    x, axes = (
        moved(rng, *sizes(rng, 3)),
        [int(a) for a in rng.choice(3, int(rng.integers(1, 4)), replace=False)],
    )
    return Drawn({"x": x}, {"axes": axes}, (wide(x).flip(axes).numpy(),))


@op("pad")
def pad(rng: Rng) -> Drawn:
    mode = ["constant", "reflect", "replicate"][rng.integers(3)]
    x = moved(rng, 1, 2, *sizes(rng, 2, 3, 5))
    amounts = sizes(rng, 4, 0, 2)
    value = {"value": 1.5} if mode == "constant" else {}
    want = F.pad(wide(x), (amounts[2], amounts[3], amounts[0], amounts[1]), mode, **value).numpy()
    return Drawn({"x": x}, {"pad": list(amounts), "mode": mode, "constant_val": 1.5}, (want,))


@op("slice_by_index")
def slice_by_index(rng: Rng) -> Drawn:
    x = moved(rng, *sizes(rng, 2, 4, 8))
    begin, end, stride = [], [], []
    for n in x.shape:
        step = int(rng.choice([1, 2, 3, -1, -2]))
        first, last = sorted(int(v) for v in rng.choice(n, 2, replace=False))
        begin.append(last if step < 0 else first)
        end.append(first if step < 0 else last)
        stride.append(step)
    masks = {
        "begin_mask": [bool(v) for v in rng.integers(0, 2, 2)],
        "end_mask": [bool(v) for v in rng.integers(0, 2, 2)],
    }
    cuts = tuple(
        slice(None if m else b, None if e else f, s)
        for b, f, s, m, e in zip(begin, end, stride, masks["begin_mask"], masks["end_mask"], strict=True)
    )
    want = x[cuts].astype(np.float64)
    return Drawn({"x": x}, {"begin": begin, "end": end, "stride": stride, **masks}, (want,))


@op("slice_by_size")
def slice_by_size(rng: Rng) -> Drawn:
    x = moved(rng, *sizes(rng, 3, 2, 6))
    begin = [int(rng.integers(n)) for n in x.shape]
    size = [int(rng.integers(1, n - b + 1)) for n, b in zip(x.shape, begin, strict=True)]
    want = wide(x)
    for axis, (b, s) in enumerate(zip(begin, size, strict=True)):
        want = want.narrow(axis, b, s)
    return Drawn({"x": x}, {"begin": begin, "size": size}, (want.numpy(),))


@op("slice_update")
def slice_update(rng: Rng) -> Drawn:
    x = moved(rng, 5, 6)
    update = moved(rng, 2, 3)
    want = wide(x).clone()
    want[1:5:2, 0:6:2] = wide(update)
    return Drawn(
        {"x": x, "update": update}, {"begin": [1, 0], "end": [5, 6], "stride": [2, 2]}, (want.numpy(),)
    )


@op("transpose")
def transpose(rng: Rng) -> Drawn:
    x, perm = moved(rng, *sizes(rng, 4)), [int(p) for p in rng.permutation(4)]
    return Drawn({"x": x}, {"perm": perm}, (wide(x).permute(perm).numpy(),))


@op("reshape")
def reshape(rng: Rng) -> Drawn:
    x = moved(rng, *sizes(rng, 3))
    return Drawn({"x": x}, {"shape": [-1, x.shape[2]]}, (x.reshape(-1, x.shape[2]).astype(np.float64),))


@op("expand_dims")
def expand_dims(rng: Rng) -> Drawn:
    x = moved(rng, 2, 3)
    return Drawn({"x": x}, {"axes": [0, -1]}, (x.reshape(1, 2, 3, 1).astype(np.float64),))


@op("squeeze")
def squeeze(rng: Rng) -> Drawn:
    x = moved(rng, 1, 3, 1)
    return Drawn({"x": x}, {"axes": [0]}, (x.reshape(3, 1).astype(np.float64),))


@op("flatten2d")
def flatten2d(rng: Rng) -> Drawn:
    x, axis = moved(rng, *sizes(rng, 3)), int(rng.integers(1, 3))
    return Drawn({"x": x}, {"axis": axis}, (x.reshape(math.prod(x.shape[:axis]), -1).astype(np.float64),))


@op("crop")
def crop(rng: Rng) -> Drawn:
    x = moved(rng, 1, 2, 6, 7)
    (top, bottom), (left, right) = sizes(rng, 2, 0, 2), sizes(rng, 2, 0, 2)
    want = F.pad(wide(x), (-left, -right, -top, -bottom)).numpy()
    return Drawn({"x": x}, {"crop_height": [top, bottom], "crop_width": [left, right]}, (want,))


@op("pixel_shuffle pixel_unshuffle")
def pixels(rng: Rng, kind: str) -> Drawn:
    n, c, h, w = sizes(rng, 4, 1, 3)
    b = int(rng.integers(1, 4))
    if kind == "pixel_shuffle":
        x = moved(rng, n, c * b * b, h, w)
        return Drawn({"x": x}, {"upscale_factor": b}, (F.pixel_shuffle(wide(x), b).numpy(),))
    x = moved(rng, n, c, h * b, w * b)
    return Drawn({"x": x}, {"downscale_factor": b}, (F.pixel_unshuffle(wide(x), b).numpy(),))


@op("depth_to_space space_to_depth")
def depth(rng: Rng, kind: str) -> Drawn:
    """Result channel c at (h b + i, w b + j) is input channel (i b + j) C + c at (h, w): TensorFlow's
    order.
    """
    n, c, h, w = sizes(rng, 4, 1, 3)
    b = int(rng.integers(1, 4))
    deep, spread = moved(rng, n, c * b * b, h, w), np.zeros((n, c, h * b, w * b))
    for i in range(b):
        for j in range(b):
            first = (i * b + j) * c
            spread[:, :, i::b, j::b] = deep[:, first : first + c]
    if kind == "depth_to_space":
        return Drawn({"x": deep}, {"block_size": b}, (spread,))
    return Drawn({"x": spread.astype(np.float16)}, {"block_size": b}, (deep.astype(np.float64),))


@op("space_to_batch batch_to_space")
def batch(rng: Rng, kind: str) -> Drawn:
    """Batch entry (i bw + j) N + n holds rows i, i + bh, ... and columns j, j + bw, ... of image n."""
    n, c, h, w = sizes(rng, 4, 1, 3)
    bh, bw = sizes(rng, 2, 1, 3)
    whole = moved(rng, n, c, h * bh, w * bw)
    blocks = np.concatenate([whole[:, :, i::bh, j::bw] for i in range(bh) for j in range(bw)]).astype(
        np.float64
    )
    block = {"block_shape": np.array([bh, bw], np.int32)}
    if kind == "space_to_batch":
        cut = (min(1, h * bh - 1), min(1, w * bw - 1))  # the padding puts back zeros that are not in x
        whole[:, :, : cut[0]] = 0
        whole[:, :, :, : cut[1]] = 0
        blocks = np.concatenate([whole[:, :, i::bh, j::bw] for i in range(bh) for j in range(bw)]).astype(
            np.float64
        )
        pads = np.array([[cut[0], 0], [cut[1], 0]], np.int32)
        return Drawn({"x": whole[:, :, cut[0] :, cut[1] :]}, block | {"paddings": pads}, (blocks,))
    crops = np.array([[0, min(1, h * bh - 1)], [min(1, w * bw - 1), 0]], np.int32)
    want = whole[:, :, : h * bh - crops[0, 1], crops[1, 0] :].astype(np.float64)
    return Drawn({"x": blocks.astype(np.float16)}, block | {"crops": crops}, (want,))


@op("sliding_windows")
def sliding_windows(rng: Rng) -> Drawn:
    x, size, stride = moved(rng, 3, 8, 2), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    want = wide(x).unfold(1, size, stride).permute(0, 1, 3, 2).numpy()
    return Drawn({"x": x}, {"axis": 1, "size": size, "stride": stride}, (want,))


@op("band_part")
def band_part(rng: Rng) -> Drawn:
    x = moved(rng, *sizes(rng, 3, 2, 6))
    lower, upper = (int(v) for v in rng.integers(-1, 4, 2))
    want = wide(x)
    want = want if lower < 0 else want.triu(-lower)
    want = want if upper < 0 else want.tril(upper)
    return Drawn({"x": x}, {"lower": lower, "upper": upper}, (want.numpy(),))


@op("reverse_sequence")
def reverse_sequence(rng: Rng) -> Drawn:
    x, lengths = moved(rng, 4, 5, 2), rng.integers(0, 6, 4).astype(np.int32)
    want = x.astype(np.float64)
    for row, length in zip(want, lengths, strict=True):
        row[:length] = row[:length][::-1].copy()
    return Drawn({"x": x, "lengths": lengths}, {"seq_axis": 1, "batch_axis": 0}, (want,))


@op("cumsum")
def cumsum(rng: Rng) -> Drawn:
    x, axis = normal(rng, *sizes(rng, 3)), int(rng.integers(0, 3))
    exclusive, backward = (bool(v) for v in rng.integers(0, 2, 2))
    source = wide(x).flip([axis]) if backward else wide(x)
    total = source.cumsum(axis) - (source if exclusive else 0)
    want = (total.flip([axis]) if backward else total).numpy()
    return Drawn({"x": x}, {"axis": axis, "exclusive": exclusive, "reverse": backward}, (want,), 0.51, 0.0)


# --- selection ---


@op("gather")
def gather(rng: Rng) -> Drawn:
    x, axis = moved(rng, *sizes(rng, 3, 2, 5)), int(rng.integers(-3, 3))
    indices = rng.integers(-x.shape[axis], x.shape[axis], 4).astype(np.int32)
    want = torch.index_select(wide(x), axis, torch.from_numpy(indices % x.shape[axis])).numpy()
    return Drawn({"x": x, "indices": indices}, {"axis": axis}, (want,))


@op("gather_along_axis")
def gather_along_axis(rng: Rng) -> Drawn:
    x, axis = moved(rng, *sizes(rng, 3, 2, 5)), int(rng.integers(-3, 3))
    indices = rng.integers(0, x.shape[axis], x.shape).astype(np.int32)
    want = torch.gather(wide(x), axis, torch.from_numpy(indices).long()).numpy()
    return Drawn({"x": x, "indices": indices}, {"axis": axis}, (want,))


@op("gather_nd")
def gather_nd(rng: Rng) -> Drawn:
    x = moved(rng, 4, 5, 3)
    indices = np.stack([rng.integers(0, 4, 6), rng.integers(0, 5, 6)], -1).astype(np.int32)
    return Drawn({"x": x, "indices": indices}, {}, (wide(x)[indices[:, 0], indices[:, 1]].numpy(),))


@op("scatter_along_axis")
def scatter_along_axis(rng: Rng) -> Drawn:
    data = moved(rng, 4, 5)
    indices = np.stack([rng.permutation(4)[:2] for _ in range(5)], 1).astype(np.int32)
    updates = moved(rng, 2, 5)
    want = wide(data).scatter(0, torch.from_numpy(indices).long(), wide(updates)).numpy()
    return Drawn(
        {"data": data, "indices": indices, "updates": updates}, {"axis": 0, "mode": "update"}, (want,)
    )


@op("scatter")
def scatter(rng: Rng) -> Drawn:
    data, indices, updates = moved(rng, 3, 4), rng.integers(0, 4, 2).astype(np.int32), moved(rng, 3, 2)
    want = wide(data).index_add(1, torch.from_numpy(indices), wide(updates)).numpy()
    inputs = {"data": data, "indices": indices, "updates": updates}
    return Drawn(inputs, {"axis": 1, "mode": "add"}, (want,), 1.01, 0.0, 1000.0)


@op("scatter_nd")
def scatter_nd(rng: Rng) -> Drawn:
    data, indices, updates = moved(rng, 4, 3), rng.permutation(4)[:2, None].astype(np.int32), moved(rng, 2, 3)
    want = wide(data)
    want[indices[:, 0]] = torch.maximum(want[indices[:, 0]], wide(updates))
    return Drawn({"data": data, "indices": indices, "updates": updates}, {"mode": "max"}, (want.numpy(),))


@op("one_hot")
def one_hot(rng: Rng) -> Drawn:
    indices = rng.integers(0, 5, (2, 3)).astype(np.int32)
    want = F.one_hot(torch.from_numpy(indices).long(), 5).double()
    axis = int(rng.integers(0, 3))
    return Drawn(
        {"indices": indices},
        {
            "one_hot_vector_size": 5,
            "axis": axis,
            "on_value": np.array(2, np.float16),
            "off_value": np.array(0, np.float16),
        },
        (torch.moveaxis(want * 2, -1, axis).numpy(),),
    )


@op("topk")
def topk(rng: Rng) -> Drawn:
    x, axis = normal(rng, 3, 7, 2), 1
    x = rng.permutation(np.arange(x.size)).reshape(x.shape).astype(np.float16)  # no ties
    k, ascending = int(rng.integers(1, 8)), bool(rng.integers(2))
    values, indices = torch.topk(wide(x), k, axis, largest=not ascending)
    return Drawn({"x": x}, {"k": k, "axis": axis, "ascending": ascending}, (values.numpy(), indices.numpy()))


@op("argsort")
def argsort(rng: Rng) -> Drawn:
    x = rng.permutation(24).reshape(3, 8).astype(np.float16)
    ascending = bool(rng.integers(2))
    want = torch.argsort(wide(x), 1, descending=not ascending).numpy()
    return Drawn({"x": x}, {"axis": -1, "ascending": ascending}, (want,))
