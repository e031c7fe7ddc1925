"""Matrix products, convolutions, attention in double precision."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from tests.ane.simulator.kernels.witness import Drawn, Rng, explicit_padding, normal, op, padded, sizes, wide


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
    extra = [s - 1 if s <= max(s, d) else 0 for s, d in zip(strides, dilations, strict=True)]
    full = function(wide(x), wide(w), wide(bias), strides, 0, extra, groups, dilations)
    extents, begins, longer = [], [], False
    for i, (n, k, s, d) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
        reach = (k - 1) * d + 1
        if params["pad_type"] == "same":
            begin, extent = max(reach - s, 0) // 2, s * n
        else:
            before, after = (params["pad"][2 * i : 2 * i + 2]) if params["pad_type"] == "custom" else (0, 0)
            begin, extent = before, s * (n - 1) + reach - before - after
        if params["pad_type"] != "same" and rng.integers(2) and s > 1:
            extent, longer = extent + 1, True  # more is asked for, as by PyTorch's output_padding
        extents.append(extent)
        begins.append(begin)
    if min(extents) < 1:
        return conv_transpose(rng)
    if longer or rng.integers(2):
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
