"""Pooling, reductions and normalisations in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from tests.ane.simulator.kernels.witness import Drawn, Rng, explicit_padding, normal, op, padded, sizes, wide

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
    if kind in (
        "reduce_sum",
        "reduce_mean",
    ):  # three roundings of partial sums, each half a unit of at most |x| summed
        size = np.abs(wide(x).numpy())
        worst = size.sum(tuple(axes)).max() if kind == "reduce_sum" else size.mean(tuple(axes)).max()
        loose = (0.51, float(3 * 2.0**-11 * worst))
    if kind == "reduce_l2_norm":  # each square is a multiple of 2^-24, which counts where all are small
        terms = wide(x).numel() / want.size
        least = float(np.abs(want).min())
        loose = (2.5, min(terms * 2.0**-26 / least if least else 1.0, float(np.sqrt(terms * 2.0**-25))))
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
