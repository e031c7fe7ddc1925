"""Each op against fp64 semantics: random shapes and parameters, PyTorch in double precision as the witness.

`OPS[kind]` draws one call and what it should give. Results are compared within `Bound`: so many units in the
last place of the largest value that enters a result, plus an absolute part for tables. Ops without arithmetic
must agree in every bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.mil import Program, TensorType
from ane_trainer.ane.opset import Builder, known_ops
from ane_trainer.ane.simulator import KERNELS, WITHOUT_KERNEL, simulate
from ane_trainer.ane.weights import from_array

Rng = np.random.Generator


@dataclass(frozen=True)
class Drawn:
    """One call: runtime inputs by parameter name, other parameters, and the results in double precision.

    A result may differ by `ulps` fp16 units of its own or of `scale` (absolute values that were summed), plus
    `absolute`. 0 of each means equal bits.
    """

    inputs: dict[str, np.ndarray]
    params: dict[str, object]
    want: tuple[np.ndarray, ...]
    ulps: float = 0.0
    absolute: float = 0.0
    scale: np.ndarray | float = 0.0


OPS: dict[str, Callable[[Rng], Drawn]] = {}


def op(kinds: str) -> Callable[[Callable[..., Drawn]], Callable[..., Drawn]]:
    def register(draw: Callable[..., Drawn]) -> Callable[..., Drawn]:
        for kind in kinds.split():
            OPS[kind] = (lambda rng, kind=kind: draw(rng, kind)) if draw.__code__.co_argcount == 2 else draw
        return draw

    return register


def normal(rng: Rng, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float16)


def sizes(rng: Rng, count: int, low: int = 1, high: int = 6) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(low, high + 1, count))


def wide(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x).astype(np.float64))


def spacing(x: np.ndarray) -> np.ndarray:
    """fp16 units in the last place at magnitudes x."""
    return 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-24))), -14) - 10)


def run(kind: str, drawn: Drawn, fidelity: str) -> tuple[np.ndarray, ...]:
    b = Builder()
    dtypes = {"float16": "fp16", "bool": "bool", "int32": "int32", "int8": "int8", "uint8": "uint8"}
    args: dict[str, object] = {}
    feeds = {}
    for name, array in drawn.inputs.items():
        items = array if isinstance(array, tuple) else (array,)
        values = []
        for i, item in enumerate(items):
            values.append(b.input(f"{name}{i}", TensorType(dtypes[item.dtype.name], item.shape)))
            feeds[values[-1].name] = item
        args[name] = tuple(values) if isinstance(array, tuple) else values[0]
    params = {k: from_array(v) if isinstance(v, np.ndarray) else v for k, v in drawn.params.items()}
    results = b.multi(kind, **args, **params)
    outputs = simulate(
        Program((b.finish(results),)), feeds, chip="m4", fidelity=fidelity, threads=1, path=None
    )
    return tuple(outputs[v.name] for v in results)


def check(kind: str, drawn: Drawn, fidelity: str) -> None:
    for got, want in zip(run(kind, drawn, fidelity), drawn.want, strict=True):
        assert got.shape == want.shape, (got.shape, want.shape)
        if not drawn.ulps and not drawn.absolute:
            assert np.array_equal(got.astype(np.float64), want.astype(np.float64)), kind
            continue
        error = np.abs(got.astype(np.float64) - want)
        allowed = drawn.ulps * spacing(np.maximum(np.abs(want), drawn.scale)) + drawn.absolute
        assert (error <= allowed).all(), (kind, float((error - allowed).max()), float(error.max()))


# --- multiply-accumulate ---


def products(x: np.ndarray, w: np.ndarray, magnitude: torch.Tensor, depth: int) -> tuple[float, np.ndarray]:
    """The accumulator's bound: half a unit of 2^-16 a product, two where the exponent rule drops one; and the scale."""
    return depth * 2.0**-15, magnitude.numpy()


@op("matmul")
def matmul(rng: Rng) -> Drawn:
    m, k, n = sizes(rng, 3, 1, 40)
    lead = [(), (2,), (3, 2)][rng.integers(3)]
    tx, ty = (bool(v) for v in rng.integers(0, 2, 2))
    x = normal(rng, *lead, *((k, m) if tx else (m, k)))
    y = normal(rng, *(lead if rng.integers(2) else (1,) * len(lead)), *((n, k) if ty else (k, n)))
    a, b = wide(x.swapaxes(-1, -2) if tx else x), wide(y.swapaxes(-1, -2) if ty else y)
    return Drawn(
        {"x": x, "y": y}, {"transpose_x": tx, "transpose_y": ty}, ((a @ b).numpy(),), 0.5, k * 2.0**-15
    )


@op("linear")
def linear(rng: Rng) -> Drawn:
    k, n = sizes(rng, 2, 1, 40)
    x, w, b = normal(rng, *sizes(rng, int(rng.integers(1, 3))), k), normal(rng, n, k), normal(rng, n)
    return Drawn(
        {"x": x}, {"weight": w, "bias": b}, (F.linear(wide(x), wide(w), wide(b)).numpy(),), 0.5, k * 2.0**-15
    )


@op("einsum")
def einsum(rng: Rng) -> Drawn:
    n, c, h, w, u = sizes(rng, 5)
    one = bool(rng.integers(2))
    x, y = normal(rng, n, c, h, w), normal(rng, n, w, 1 if one else h, u)
    want = torch.einsum("nchw,nwhu->nchu", wide(x), wide(np.broadcast_to(y, (n, w, h, u)))).numpy()
    return Drawn({"values": (x, y)}, {"equation": "nchw,nwhu->nchu"}, (want,), 0.5, w * 2.0**-15)


def conv_params(rng: Rng, spatial: int, transposed: bool = False) -> dict[str, object]:
    strides, dilations = (sizes(rng, spatial, 1, 3), sizes(rng, spatial, 1, 2))
    params: dict[str, object] = {"strides": list(strides), "dilations": list(dilations)}
    kinds = ["valid", "custom", "same"] if transposed else ["valid", "custom", "same", "same_lower"]
    params["pad_type"] = kinds[rng.integers(len(kinds))]
    if params["pad_type"] == "custom":
        params["pad"] = list(sizes(rng, 2 * spatial, 0, 2))
    return params


def explicit_padding(params: dict, size: tuple[int, ...], kernel: tuple[int, ...]) -> list[tuple[int, int]]:
    """(before, after) as the pad types are defined: `same` gives ceil(size / stride) results."""
    strides = params.get("strides", [1] * len(size))
    dilations = params.get("dilations", [1] * len(size))
    if params["pad_type"] == "valid":
        return [(0, 0)] * len(size)
    if params["pad_type"] == "custom":
        return [(params["pad"][2 * i], params["pad"][2 * i + 1]) for i in range(len(size))]
    pairs = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        halves = (total // 2, total - total // 2)
        pairs.append(halves if params["pad_type"] == "same" else halves[::-1])
    return pairs


def padded(x: torch.Tensor, pairs: list[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)


@op("conv")
def conv(rng: Rng) -> Drawn:
    spatial, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    params = conv_params(rng, spatial)
    cin, cout = groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 4))
    kernel = sizes(rng, spatial, 1, 3)
    x, w = (
        normal(rng, int(rng.integers(1, 4)), cin, *sizes(rng, spatial, 5, 9)),
        normal(rng, cout, cin // groups, *kernel),
    )
    bias = normal(rng, cout) if rng.integers(2) else None
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    image = padded(wide(x), explicit_padding(params, x.shape[2:], kernel))
    start = None if bias is None else wide(bias)
    want = function(image, wide(w), start, params["strides"], 0, params["dilations"], groups).numpy()
    params |= {"groups": groups} | ({} if bias is None else {"bias": bias})
    runtime = {"x": x, "weight": w} if rng.integers(2) else {"x": x}
    params |= {} if "weight" in runtime else {"weight": w}
    return Drawn(runtime, params, (want,), 0.5, (w[0].size + 1) * 2.0**-15)


@op("conv_transpose")
def conv_transpose(rng: Rng) -> Drawn:
    spatial, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    params = conv_params(rng, spatial, transposed=True)
    cin, cout, kernel = groups * int(rng.integers(1, 4)), int(rng.integers(1, 4)), sizes(rng, spatial, 1, 3)
    x, w = normal(rng, 2, cin, *sizes(rng, spatial, 4, 6)), normal(rng, cin, cout, *kernel)
    bias = normal(rng, cout * groups)
    strides, dilations = params["strides"], params["dilations"]
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    full = function(wide(x), wide(w), wide(bias), strides, 0, [s - 1 for s in strides] if min(strides) > 0 else 0, groups, dilations) if all(
        max(s, d) > s - 1 for s, d in zip(strides, dilations, strict=True)
    ) else None  # fmt: skip
    assert full is not None
    extents, begins = [], []
    for i, (n, k, s, d) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
        reach = (k - 1) * d + 1
        if params["pad_type"] == "same":
            begin, extent = max(reach - s, 0) // 2, s * n
        else:
            before, after = (params["pad"][2 * i : 2 * i + 2]) if params["pad_type"] == "custom" else (0, 0)
            begin, extent = before, s * (n - 1) + reach - before - after
        if params["pad_type"] != "same" and rng.integers(2) and s > 1:
            extent += 1  # an output_shape that asks for more, as PyTorch's output_padding does
        extents.append(extent)
        begins.append(begin)
    if min(extents) < 1:
        return conv_transpose(rng)
    if rng.integers(2) or any(
        e != s * (n - 1) + (k - 1) * d + 1
        for e, n, k, s, d in zip(extents, x.shape[2:], kernel, strides, dilations, strict=True)
    ):
        params["output_shape"] = [2, cout * groups, *extents]
    want = full
    for axis, (begin, extent) in enumerate(zip(begins, extents, strict=True), start=2):
        missing = begin + extent - want.shape[axis]
        if missing > 0:
            pads = [0, 0] * (want.dim() - axis)
            pads[2 * (want.dim() - axis) - 1] = missing
            extra = F.pad(want - wide(bias).reshape(1, -1, *(1,) * spatial), pads)
            want = extra + wide(bias).reshape(1, -1, *(1,) * spatial)
        want = want.narrow(axis, begin, extent)
    params |= {"groups": groups, "bias": bias, "weight": w}
    return Drawn({"x": x}, params, (want.numpy(),), 0.5, (cin * math.prod(kernel) + 1) * 2.0**-15)


@op("scaled_dot_product_attention")
def attention(rng: Rng) -> Drawn:
    batch, length, keys, depth, values = sizes(rng, 5, 1, 12)
    q, k, v = (
        normal(rng, batch, length, depth),
        normal(rng, batch, keys, depth),
        normal(rng, batch, keys, values),
    )
    inputs = {"query": q, "key": k, "value": v}
    mask = None
    if rng.integers(2):
        mask = rng.random((length, keys)) < 0.7
        mask[:, 0] = True
        inputs["attn_mask"] = mask
    want = F.scaled_dot_product_attention(
        wide(q), wide(k), wide(v), None if mask is None else torch.from_numpy(mask)
    )
    return Drawn(inputs, {}, (want.numpy(),), 16, 0.01, np.abs(v.astype(np.float64)).max())


# --- pooling and reductions ---


@op("max_pool avg_pool l2_pool")
def pool(rng: Rng, kind: str) -> Drawn:
    spatial = int(rng.integers(1, 4))
    kernel = sizes(rng, spatial, 1, 3)
    strides = tuple(int(rng.integers(1, k + 1)) for k in kernel)
    params: dict = {"kernel_sizes": list(kernel), "strides": list(strides)}
    ceil = bool(rng.integers(2)) and spatial < 3
    params["pad_type"] = (
        ["valid", "custom"][rng.integers(2)]
        if ceil
        else ["valid", "custom", "same", "same_lower"][rng.integers(4)]
    )
    if params["pad_type"] == "custom":
        pads = [int(rng.integers(0, k // 2 + 1)) for k in kernel]
        params["pad"] = [p for p in pads for _ in range(2)]
    params["ceil_mode"] = ceil
    x = normal(rng, 2, 3, *sizes(rng, spatial, 4, 8))
    pairs = explicit_padding(params, x.shape[2:], kernel)
    symmetric = all(a == b and a <= k // 2 for (a, b), k in zip(pairs, kernel, strict=True))
    if not symmetric:
        image, pads = padded(wide(x), pairs, -math.inf if kind == "max_pool" else 0.0), [0] * spatial
    else:
        image, pads = wide(x), [a for a, _ in pairs]
    if kind == "max_pool":
        function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[spatial - 1]
        return Drawn({"x": x}, params, (function(image, kernel, strides, pads, ceil_mode=ceil).numpy(),))
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1]
    if kind == "l2_pool":
        means = function(image.square(), kernel, strides, pads, ceil, True)
        reach = _window_counts(image.shape[2:], kernel, strides, pads, means.shape[2:])
        return Drawn({"x": x}, params, ((means * reach).sqrt().numpy(),), 3, 2.0**-10)
    exclude = bool(rng.integers(2)) and symmetric
    params["exclude_padding_from_average"] = exclude
    mean = function(image, kernel, strides, pads, ceil, not exclude)
    if (
        not exclude
    ):  # PyTorch divides a window that sticks out of the padding by what is inside; MIL by its size
        mean = (
            mean * _window_counts(image.shape[2:], kernel, strides, pads, mean.shape[2:]) / math.prod(kernel)
        )
    return Drawn({"x": x}, params, (mean.numpy(),), 1.01, 0.0, np.abs(x.astype(np.float64)).max())


def _window_counts(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: list[int],
    counts: tuple[int, ...],
) -> torch.Tensor:
    """How many positions of each window lie inside the padded image (what PyTorch divides by)."""
    total = torch.ones((), dtype=torch.float64)
    for n, k, s, p, count in zip(size, kernel, strides, pads, counts, strict=True):
        starts = torch.arange(count) * s - p
        inside = torch.minimum(starts + k, torch.tensor(n + p)) - starts
        total = total[..., None] * inside.double()
    return total


_REDUCTIONS: dict[str, Callable[[torch.Tensor, tuple[int, ...], bool], torch.Tensor]] = {
    "reduce_sum": lambda x, a, k: x.sum(a, k),
    "reduce_mean": lambda x, a, k: x.mean(a, k),
    "reduce_max": lambda x, a, k: x.amax(a, k),
    "reduce_min": lambda x, a, k: x.amin(a, k),
    "reduce_l1_norm": lambda x, a, k: x.abs().sum(a, k),
    "reduce_l2_norm": lambda x, a, k: x.square().sum(a, k).sqrt(),
    "reduce_sum_square": lambda x, a, k: x.square().sum(a, k),
    "reduce_log_sum": lambda x, a, k: x.sum(a, k).log(),
    "reduce_log_sum_exp": lambda x, a, k: torch.logsumexp(x, a, k),
}


@op(" ".join(_REDUCTIONS))
def reduction(rng: Rng, kind: str) -> Drawn:
    rank = int(rng.integers(1, 5))
    x = normal(rng, *sizes(rng, rank))
    if kind == "reduce_log_sum":
        x = np.abs(x) + np.float16(0.25)
    axes = sorted(int(a) for a in rng.choice(rank, int(rng.integers(1, rank + 1)), replace=False))
    keep = bool(rng.integers(2))
    want = _REDUCTIONS[kind](wide(x), tuple(axes), keep).numpy()
    loose = (1.5, 0.01) if "log" in kind else (2.5, 0.0) if "l2" in kind else (0.51, 0.0)
    exact = kind in ("reduce_max", "reduce_min")
    params = {"axes": [a - rank if rng.integers(2) else a for a in axes], "keep_dims": keep}
    return Drawn({"x": x}, params, (want,), *((0.0, 0.0) if exact else loose))


@op("reduce_prod")
def reduce_prod(rng: Rng) -> Drawn:
    x = normal(rng, 3, *sizes(rng, 1))
    return Drawn({"x": x}, {"axes": [1]}, (wide(x).prod(1).numpy(),), 0.51)


@op("reduce_argmax reduce_argmin")
def reduce_arg(rng: Rng, kind: str) -> Drawn:
    x, axis, keep = normal(rng, *sizes(rng, 3)), int(rng.integers(-3, 3)), bool(rng.integers(2))
    pick = torch.argmax if kind == "reduce_argmax" else torch.argmin
    return Drawn({"x": x}, {"axis": axis, "keep_dims": keep}, (pick(wide(x), axis, keep).numpy(),))


@op("softmax")
def softmax(rng: Rng) -> Drawn:
    x, axis = normal(rng, *sizes(rng, 3), scale=4), int(rng.integers(-3, 3))
    return Drawn({"x": x}, {"axis": axis}, (torch.softmax(wide(x), axis).numpy(),), 24, 1e-3)


# --- normalisation ---


@op("layer_norm")
def layer_norm(rng: Rng) -> Drawn:
    x = normal(rng, *sizes(rng, 3, 2, 8))
    count = int(rng.integers(1, 4))
    shape = x.shape[3 - count :]
    if math.prod(shape) < 4:
        return layer_norm(rng)
    gamma, beta = normal(rng, *shape), normal(rng, *shape)
    want = F.layer_norm(wide(x), shape, wide(gamma), wide(beta), 1e-3).numpy()
    params = {"axes": list(range(3 - count, 3)), "gamma": gamma, "beta": beta, "epsilon": 1e-3}
    return Drawn({"x": x}, params, (want,), 12, 0.01, 8.0)


@op("instance_norm")
def instance_norm(rng: Rng) -> Drawn:
    x = normal(rng, 2, 3, *sizes(rng, int(rng.integers(1, 4)), 3, 5))
    gamma, beta = normal(rng, 3), normal(rng, 3)
    want = F.instance_norm(wide(x), weight=wide(gamma), bias=wide(beta), eps=1e-3).numpy()
    return Drawn({"x": x}, {"gamma": gamma, "beta": beta, "epsilon": 1e-3}, (want,), 12, 0.01, 8.0)


@op("batch_norm")
def batch_norm(rng: Rng) -> Drawn:
    x = normal(rng, 2, 3, *sizes(rng, int(rng.integers(1, 4)), 2, 4))
    mean, gamma, beta = (normal(rng, 3) for _ in range(3))
    variance = np.abs(normal(rng, 3)) + np.float16(0.1)
    want = F.batch_norm(wide(x), wide(mean), wide(variance), wide(gamma), wide(beta), eps=1e-3).numpy()
    params = {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta, "epsilon": 1e-3}
    return Drawn({"x": x}, params, (want,), 4, 0.0, 16.0)


@op("l2_norm")
def l2_norm(rng: Rng) -> Drawn:
    x = normal(rng, 2, *sizes(rng, 3, 1, 4))
    want = wide(x) / (wide(x).square().sum((1, 2, 3), keepdim=True) + 1e-3).sqrt()
    return Drawn({"x": x}, {"epsilon": 1e-3}, (want.numpy(),), 6, 2.0**-12)


@op("local_response_norm")
def local_response_norm(rng: Rng) -> Drawn:
    x, size = normal(rng, 2, int(rng.integers(1, 8)), 3, 3), int(rng.integers(1, 6))
    want = F.local_response_norm(wide(x), size, 0.25, 0.75, 1.0).numpy()
    return Drawn({"x": x}, {"size": size, "alpha": 0.25, "beta": 0.75, "k": 1.0}, (want,), 16, 2.0**-9)


# --- moves ---


def moved(rng: Rng, *shape: int) -> np.ndarray:
    """Any fp16 patterns but inf and NaN: a move keeps every bit."""
    return normal(rng, *shape, scale=100)


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
    """Result channel c at (h b + i, w b + j) is input channel (i b + j) C + c at (h, w): TensorFlow's order."""
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


# --- images ---


def image(rng: Rng) -> np.ndarray:
    return normal(rng, 2, 3, *sizes(rng, 2, 2, 6))


@op("upsample_nearest_neighbor")
def upsample_nearest(rng: Rng) -> Drawn:
    x, (fh, fw) = image(rng), sizes(rng, 2, 1, 3)
    want = F.interpolate(wide(x), scale_factor=(fh, fw), mode="nearest").numpy()
    return Drawn({"x": x}, {"scale_factor_height": fh, "scale_factor_width": fw}, (want,))


@op("resize_nearest_neighbor")
def resize_nearest(rng: Rng) -> Drawn:
    x, target = image(rng), sizes(rng, 2, 1, 9)
    want = F.interpolate(wide(x), size=target, mode="nearest").numpy()
    return Drawn({"x": x}, {"target_size_height": target[0], "target_size_width": target[1]}, (want,))


@op("upsample_bilinear")
def upsample_bilinear(rng: Rng) -> Drawn:
    x, (fh, fw), aligned = image(rng), sizes(rng, 2, 1, 3), bool(rng.integers(2))
    target = (fh * x.shape[2], fw * x.shape[3])
    want = F.interpolate(wide(x), size=target, mode="bilinear", align_corners=aligned).numpy()
    params = {"scale_factor_height": fh, "scale_factor_width": fw, "align_corners": aligned}
    return Drawn({"x": x}, params, (want,), 0.51, 2.0**-24, 0.0)


@op("resize_bilinear")
def resize_bilinear(rng: Rng) -> Drawn:
    x, target = image(rng), sizes(rng, 2, 2, 9)
    mode, aligned = [("STRICT_ALIGN_CORNERS", True), ("ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)][
        rng.integers(3)
    ]
    want = F.interpolate(wide(x), size=target, mode="bilinear", align_corners=aligned).numpy()
    params = {"target_size_height": target[0], "target_size_width": target[1], "sampling_mode": mode}
    return Drawn({"x": x}, params, (want,), 0.51, 2.0**-24)


@op("resize")
def resize(rng: Rng) -> Drawn:
    x, target = image(rng), sizes(rng, 2, 2, 9)
    if rng.integers(2):
        want = F.interpolate(wide(x), size=target, mode="nearest").numpy()
        params = {"interpolation_mode": "NEAREST_NEIGHBOR", "sampling_mode": "DEFAULT"}
        if any(
            new > 1 and (np.arange(new) * (old - old / new) / (new - 1) % 1 > 1 - 1e-9).any()
            for old, new in zip(x.shape[2:], target, strict=True)
        ):
            return resize(rng)  # a position on the edge of two elements
    else:
        want = F.interpolate(wide(x), size=target, mode="bilinear", align_corners=False).numpy()
        params = {"interpolation_mode": "LINEAR", "sampling_mode": "UNALIGN_CORNERS"}
    return Drawn({"x": x}, {"shape": list(target), "resized_dims": 2, **params}, (want,), 0.51, 2.0**-24)


@op("affine")
def affine(rng: Rng) -> Drawn:
    x, matrix, target = image(rng), normal(rng, 2, 6, scale=0.5), sizes(rng, 2, 2, 5)
    grid = F.affine_grid(wide(matrix).reshape(2, 2, 3), [2, 3, *target], align_corners=True)
    want = F.grid_sample(wide(x), grid, padding_mode="zeros", align_corners=True).numpy()
    params = {"output_height": target[0], "output_width": target[1], "sampling_mode": "bilinear", "padding_mode": "constant",
              "padding_value": 0.0, "coordinates_mode": "normalized_minus_one_to_one", "align_corners": True}  # fmt: skip
    return Drawn({"x": x, "transform_matrix": matrix}, params, (want,), 0.51, 1e-7)


@op("resample")
def resample(rng: Rng) -> Drawn:
    x, grid = image(rng), (rng.uniform(-1.5, 1.5, (2, 3, 4, 2))).astype(np.float16)
    mode, theirs = [("constant", "zeros"), ("border", "border"), ("reflection", "reflection")][
        rng.integers(3)
    ]
    aligned = mode != "constant" or bool(rng.integers(2))
    want = F.grid_sample(wide(x), wide(grid), padding_mode=theirs, align_corners=aligned).numpy()
    params = {"sampling_mode": "bilinear", "padding_mode": mode, "padding_value": 0.0,
              "coordinates_mode": "normalized_minus_one_to_one", "align_corners": aligned}  # fmt: skip
    return Drawn({"x": x, "coordinates": grid}, params, (want,), 0.51, 1e-6)


@op("crop_resize")
def crop_resize(rng: Rng) -> Drawn:
    """Corners on corners: a box's sub-image is interpolated with align_corners, as PyTorch does on whole pixels."""
    x = normal(rng, 2, 3, 7, 8)
    top, left = sizes(rng, 2, 0, 3)
    bottom, right = top + int(rng.integers(1, 4)), left + int(rng.integers(1, 4))
    target = sizes(rng, 2, 2, 5)
    part = wide(x)[:1, :, top : bottom + 1, left : right + 1]
    want = F.interpolate(part, size=target, mode="bilinear", align_corners=True).numpy()
    boxes = np.array([[top, left, bottom, right]], np.float16)
    params = {"target_height": target[0], "target_width": target[1], "sampling_mode": "STRICT_ALIGN_CORNERS"}
    return Drawn(
        {"x": x, "boxes": boxes, "box_indices": np.zeros(1, np.int32)}, params, (want,), 0.51, 2.0**-24
    )


# --- quantisation, constants ---


@op("quantize")
def quantize(rng: Rng) -> Drawn:
    x, scale, zero = (
        normal(rng, 4, 5, scale=3),
        np.float16(2.0 ** -int(rng.integers(0, 6))),
        np.int8(rng.integers(-20, 20)),
    )
    exact = wide(x).numpy() / float(scale)
    want = np.clip(np.sign(exact) * np.floor(np.abs(exact) + 0.5) + zero, -128, 127)
    params = {"scale": np.asarray(scale), "zero_point": np.asarray(zero), "output_dtype": "int8"}
    return Drawn({"input": x}, params, (want,))


@op("dequantize")
def dequantize(rng: Rng) -> Drawn:
    x = rng.integers(-128, 128, (4, 3)).astype(np.int8)
    scale, zero = np.abs(normal(rng, 3)) + np.float16(0.01), rng.integers(-9, 9, 3).astype(np.int8)
    want = (x.astype(np.float64) - zero) * scale.astype(np.float64)
    return Drawn({"input": x}, {"scale": scale, "zero_point": zero, "axis": 1}, (want,), 0.5)


@op("cast")
def cast(rng: Rng) -> Drawn:
    x = normal(rng, 5, scale=100)
    return Drawn({"x": x}, {"dtype": "int32"}, (np.trunc(x.astype(np.float64)),))


@op("identity")
def identity(rng: Rng) -> Drawn:
    x = moved(rng, 3)
    return Drawn({"x": x}, {}, (x.astype(np.float64),))


@op("fill_like")
def fill_like(rng: Rng) -> Drawn:
    return Drawn(
        {"ref_tensor": moved(rng, 2, 3)}, {"value": np.array(1.25, np.float16)}, (np.full((2, 3), 1.25),)
    )


@op("shape")
def shape(rng: Rng) -> Drawn:
    x = moved(rng, *sizes(rng, 3))
    return Drawn({"x": x}, {}, (np.array(x.shape),))


# --- pointwise: one range where the function is smooth, one bound a table ---

_UNARY: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float, float, float, float]] = {
    # function, low, high, units in the last place, absolute
    "abs": (torch.abs, -99, 99, 0, 0), "relu": (torch.relu, -99, 99, 0, 0), "relu6": (F.relu6, -9, 9, 0, 0),
    "sign": (torch.sign, -9, 9, 0, 0), "square": (torch.square, -99, 99, 0.5, 0), "floor": (torch.floor, -99, 99, 0, 0),
    "ceil": (torch.ceil, -99, 99, 0, 0), "sqrt": (torch.sqrt, 0.01, 999, 1.3, 0), "exp": (torch.exp, -9, 9, 10, 0),
    "exp2": (torch.exp2, -9, 9, 2, 0), "tanh": (torch.tanh, -6, 6, 0, 2e-3), "sigmoid": (torch.sigmoid, -12, 12, 0, 4e-3),
    "erf": (torch.erf, -4, 4, 0, 1e-3), "silu": (F.silu, -12, 12, 0, 1.6e-2), "sin": (torch.sin, -3, 3, 0, 2e-3),
    "cos": (torch.cos, -3, 3, 0, 2e-3), "atan": (torch.atan, -9, 9, 0.51, 0), "softplus": (F.softplus, -5, 10, 4, 1.2e-2),
    "softsign": (F.softsign, -9, 9, 20, 0), "acos": (torch.acos, -1, 1, 0.51, 0), "asin": (torch.asin, -1, 1, 0.51, 0),
    "atanh": (torch.atanh, -0.9, 0.9, 0.51, 0), "cosh": (torch.cosh, -5, 5, 0.51, 0), "sinh": (torch.sinh, -5, 5, 0.51, 0),
    "tan": (torch.tan, -1.5, 1.5, 0.51, 0), "round": (lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5), -99, 99, 0, 0),
}  # fmt: skip


@op(" ".join(_UNARY))
def unary(rng: Rng, kind: str) -> Drawn:
    function, low, high, ulps, absolute = _UNARY[kind]
    x = rng.uniform(low, high, sizes(rng, 3)).astype(np.float16)
    return Drawn({"x": x}, {}, (function(wide(x)).numpy(),), ulps, absolute)


@op("rsqrt inverse log")
def with_epsilon(rng: Rng, kind: str) -> Drawn:
    x = rng.uniform(0.05, 99, 17).astype(np.float16)
    function = {"rsqrt": torch.rsqrt, "inverse": torch.reciprocal, "log": torch.log}[kind]
    bound = {"rsqrt": (3.0, 0.0), "inverse": (14.0, 0.0), "log": (1.5, 7e-3)}[kind]
    return Drawn({"x": x}, {"epsilon": 0.0}, (function(wide(x)).numpy(),), *bound)


@op("add sub mul real_div floor_div maximum minimum mod pow")
def binary(rng: Rng, kind: str) -> Drawn:
    x, y = rng.uniform(0.5, 9, (3, 1, 4)).astype(np.float16), rng.uniform(0.5, 3, (2, 4)).astype(np.float16)
    a, b = wide(x), wide(y)
    want = {"add": a + b, "sub": a - b, "mul": a * b, "real_div": a / b, "maximum": torch.maximum(a, b), "mod": a % b,
            "minimum": torch.minimum(a, b), "pow": a**b, "floor_div": torch.floor(a / b)}[kind].numpy()  # fmt: skip
    ulps = {"real_div": 16.0, "pow": 40.0, "maximum": 0.0, "minimum": 0.0}.get(kind, 0.5)
    if kind == "floor_div":  # near a whole quotient the inverse table may fall on the other side
        return Drawn({"x": x, "y": y}, {}, (want,), 0.0, 1.0)
    return Drawn({"x": x, "y": y}, {}, (want,), ulps, 0.01 if kind == "pow" else 0.0)


@op("equal not_equal less less_equal greater greater_equal")
def comparison(rng: Rng, kind: str) -> Drawn:
    x, y = (rng.integers(0, 3, (3, 4)).astype(np.float16) for _ in range(2))
    function = {"equal": np.equal, "not_equal": np.not_equal, "less": np.less, "less_equal": np.less_equal,
                "greater": np.greater, "greater_equal": np.greater_equal}[kind]  # fmt: skip
    return Drawn({"x": x, "y": y}, {}, (function(x, y),))


@op("logical_and logical_or logical_xor")
def logical(rng: Rng, kind: str) -> Drawn:
    x, y = (rng.integers(0, 2, (3, 4)).astype(bool) for _ in range(2))
    want = {"logical_and": x & y, "logical_or": x | y, "logical_xor": x ^ y}[kind]
    return Drawn({"x": x, "y": y}, {}, (want,))


@op("logical_not")
def logical_not(rng: Rng) -> Drawn:
    x = rng.integers(0, 2, (3, 4)).astype(bool)
    return Drawn({"x": x}, {}, (~x,))


@op("select")
def select(rng: Rng) -> Drawn:
    cond, a, b = rng.integers(0, 2, (3, 4)).astype(bool), moved(rng, 3, 4), moved(rng, 3, 4)
    return Drawn({"cond": cond, "a": a, "b": b}, {}, (np.where(cond, a, b).astype(np.float64),))


_PARAMETRIC: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, object], float, float]] = {
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.25), {"alpha": 0.25}, 0.5, 0.0),
    "elu": (lambda x: F.elu(x, 0.5), {"alpha": 0.5}, 1.0, 6e-3),
    "thresholded_relu": (lambda x: torch.where(x >= 0.5, x, 0.0), {"alpha": 0.5}, 0.0, 0.0),
    "threshold": (lambda x: torch.clamp(x, min=0.5), {"alpha": 0.5}, 0.0, 0.0),
    "clip": (lambda x: x.clamp(-0.5, 1.5), {"alpha": -0.5, "beta": 1.5}, 0.0, 0.0),
    "clamped_relu": (
        lambda x: torch.clamp(torch.where(x >= 0, x, 0.25 * x), max=2.0),
        {"alpha": 0.25, "beta": 2.0},
        0.5,
        0.0,
    ),
    "linear_activation": (lambda x: 1.5 * x + 0.25, {"alpha": 1.5, "beta": 0.25}, 2.0, 0.01),
    "scaled_tanh": (lambda x: 1.5 * torch.tanh(0.5 * x), {"alpha": 1.5, "beta": 0.5}, 1.0, 3e-3),
    "sigmoid_hard": (lambda x: (0.25 * x + 0.5).clamp(0, 1), {"alpha": 0.25, "beta": 0.5}, 1.0, 2.0**-11),
    "gelu": (F.gelu, {"mode": "EXACT"}, 0.0, 7e-3),
}


@op(" ".join(_PARAMETRIC))
def parametric(rng: Rng, kind: str) -> Drawn:
    function, params, ulps, absolute = _PARAMETRIC[kind]
    x = rng.uniform(-5, 5, (3, 7)).astype(np.float16)
    return Drawn({"x": x}, dict(params), (function(wide(x)).numpy(),), ulps, absolute)


@op("prelu")
def prelu(rng: Rng) -> Drawn:
    x, alpha = normal(rng, 2, 3, 4, 2), normal(rng, 3)
    return Drawn({"x": x}, {"alpha": alpha}, (F.prelu(wide(x), wide(alpha)).numpy(),), 0.5)


@op("softplus_parametric")
def softplus_parametric(rng: Rng) -> Drawn:
    x, alpha, beta = normal(rng, 2, 3, 4), np.abs(normal(rng, 3)), np.abs(normal(rng, 3))
    a, b = (wide(v).reshape(1, 3, 1) for v in (alpha, beta))
    return Drawn({"x": x}, {"alpha": alpha, "beta": beta}, ((a * F.softplus(b * wide(x))).numpy(),), 8, 0.03)


#: Kernels held against something else: where.
ELSEWHERE = {
    **dict.fromkeys(["constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_cast", "constexpr_lut_to_dense", "constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale", "constexpr_sparse_to_dense"],
                    "test_constexpr.py: coremltools' own decompression"),
    "const": "test_constants.py", "fill": "test_constants.py", "range_1d": "test_constants.py",
    "non_zero": "test_constants.py: its operand is a constant", "reshape_like": "test_constants.py: its parameters are constants",
    "non_maximum_suppression": "test_suppression.py",
}  # fmt: skip


def test_every_kernel_has_a_witness_and_evidence() -> None:
    assert set(KERNELS) == set(OPS) | set(ELSEWHERE)
    assert all(k.evidence for k in KERNELS.values())
    assert all(k.bound for k in KERNELS.values() if k.fidelity == "bounded")


def test_every_op_with_a_type_rule_has_a_kernel_or_a_reason() -> None:
    assert set(known_ops()) == set(KERNELS) | set(WITHOUT_KERNEL)
    assert not set(KERNELS) & set(WITHOUT_KERNEL)


@pytest.mark.parametrize("kind", sorted(OPS))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_within_bound_of_fp64(kind: str, seed: int) -> None:
    check(kind, OPS[kind](np.random.default_rng(seed)), "exact")


@pytest.mark.parametrize("kind", ["matmul", "linear", "einsum", "conv", "conv_transpose", "avg_pool", "max_pool"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_fast_within_bound_of_fp64(kind: str, seed: int) -> None:
    check(kind, OPS[kind](np.random.default_rng(seed)), "fast")
