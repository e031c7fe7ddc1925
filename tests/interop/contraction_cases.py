"""Products and normalisations of ANEForge's graph interface, with plain and compressed weights."""

from __future__ import annotations

import aneforge as af
import numpy as np
from aneforge._blob import palettize_lut4
from scipy import special

from tests.interop.harness import Array, Case, values

X = values(6, 32)
W = values(32, 10, seed=1, low=-0.5, high=0.5)
B = values(10, seed=2)
GAMMA, BETA = values(32, seed=3, low=0.5, high=1.5), values(32, seed=4)
SPARSE = W * (np.abs(W) > 0.35)


def _palettized(w: Array) -> Array:
    """What 16 fp16 centroids leave of a `[K, N]` weight (ANEForge stores `[N, K]`, two indices a byte)."""
    packed, table = (
        np.frombuffer(part, dtype)
        for part, dtype in zip(palettize_lut4(w.T), (np.uint8, np.float16), strict=True)
    )
    indices = np.stack([packed & 15, packed >> 4], 1).reshape(w.T.shape)
    return table[indices].T.astype(np.float32)


COARSE = _palettized(W)

PRODUCTS = [
    Case("matmul", lambda x: x @ W, (X,), lambda x: x @ W, 4e-3, 4e-3),
    Case("matmul rank 3", lambda x: x @ W, (values(2, 6, 32),), lambda x: x @ W, 4e-3, 4e-3),
    Case("linear", lambda x: x.linear(W.T), (X,), lambda x: x @ W, 4e-3, 4e-3),
    Case("linear with bias", lambda x: x.linear(W.T, B), (X,), lambda x: x @ W + B, 4e-3, 4e-3),
    Case("bmm", lambda x, y: x @ y, (values(3, 5, 16), values(3, 16, 7)), np.matmul, 4e-3, 4e-3),
    Case("bmm rank 2", lambda x, y: x @ y, (X, W), np.matmul, 4e-3, 4e-3),
    Case("bmm broadcast", lambda x, y: x @ y, (values(3, 5, 16), values(1, 16, 7)), np.matmul, 4e-3, 4e-3),
    Case("bmm rank 4", lambda x, y: x @ y, (values(1, 2, 5, 16), values(1, 2, 16, 7)), np.matmul, 4e-3, 4e-3),
    Case(
        "bmm_w",
        lambda x: x.bmm_weight(values(3, 16, 7, seed=9)),
        (values(3, 5, 16),),
        lambda x: x @ values(3, 16, 7, seed=9),
        4e-3,
        4e-3,
    ),
    Case(
        "einsum native",
        lambda x: af.einsum_native("nchw,nwhu->nchu", x, values(1, 6, 4, 5)),
        (values(1, 3, 4, 6),),
        lambda x: np.einsum("nchw,nwhu->nchu", x, values(1, 6, 4, 5)),
        4e-3,
        4e-3,
    ),
    Case(
        "einsum transposed",
        lambda x, y: af.einsum("ij,kj->ik", x, y),
        (X, W.T.copy()),
        lambda x, y: x @ y.T,
        4e-3,
        4e-3,
    ),
    Case(
        "einsum batched",
        lambda x, y: af.einsum("bij,bjk->bik", x, y),
        (values(3, 5, 16), values(3, 16, 7)),
        np.matmul,
        4e-3,
        4e-3,
    ),
    Case("einsum sum", lambda x: af.einsum("ij->i", x), (X,), lambda x: x.sum(1), 4e-3, 1e-2),
]

COMPRESSED = [
    Case(
        f"{name} weights",
        lambda x, w=w: x @ w,
        (X,),
        lambda x, w=w: x @ w,
        1e-2,
        tolerance,
        {"compress": name},
    )
    for name, w, tolerance in (
        ("int8", W, 5e-2),
        ("sparse", SPARSE, 1e-2),
        ("blockwise", W, 5e-2),
        ("auto", SPARSE, 1e-2),
    )
] + [
    Case(
        "int4 weights",
        lambda x: x @ W,
        (X,),
        lambda x: x @ COARSE,
        4e-3,
        4e-3,
        {"compress": "int4", "compress_atol": 0.2},
    ),
    Case("int8 flag", lambda x: x.linear(W.T, B), (X,), lambda x: x @ W + B, 1e-2, 5e-2, {"int8": True}),
    Case(
        "int8 bmm_w",
        lambda x: x.bmm_weight(values(3, 16, 7, seed=9)),
        (values(3, 5, 16),),
        lambda x: x @ values(3, 16, 7, seed=9),
        2e-2,
        0.15,
        {"compress": "int8"},
    ),
]


def _layer_norm(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    centred = x - x.mean(axis, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis, keepdims=True) + 1e-5)


IMAGE = values(1, 8, 5, 6)
G8, B8 = values(8, seed=6, low=0.5, high=1.5), values(8, seed=7)
MEAN8, VAR8 = values(8, seed=8), values(8, seed=9, low=0.25, high=2)


def _channel(v: Array) -> Array:
    return v[:, None, None]


def _group_norm(x: Array) -> Array:
    return _layer_norm(x.reshape(1, 2, -1)).reshape(x.shape) * _channel(G8) + _channel(B8)


def _batch_norm(x: Array) -> Array:
    return (x - _channel(MEAN8)) / np.sqrt(_channel(VAR8) + 1e-5) * _channel(G8) + _channel(B8)


def _local_response(x: Array) -> Array:
    """Window 5 over channels: x / (k + alpha * mean of squares)^beta (PyTorch's definition)."""
    padded = np.pad(x**2, ((0, 0), (2, 2), (0, 0), (0, 0)))
    window = sum(padded[:, i : i + x.shape[1]] for i in range(5))
    return x / (1 + 0.5 * window / 5) ** 0.75


NORMS = [
    Case("softmax", lambda x: x.softmax(), (X,), lambda x: special.softmax(x, -1), 3e-2, 1e-3),
    Case(
        "softmax axis",
        lambda x: x.softmax(1),
        (values(2, 7, 5),),
        lambda x: special.softmax(x, 1),
        3e-2,
        1e-3,
    ),
    Case(
        "l2_norm", lambda x: x.l2_norm(), (X,), lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True), 1e-2
    ),
    Case(
        "l2_norm axis",
        lambda x: x.l2_norm(0, 1e-6),
        (X,),
        lambda x: x / np.linalg.norm(x, axis=0, keepdims=True),
        1e-2,
    ),
    Case(
        "rms_norm",
        lambda x: x.rms_norm(GAMMA),
        (X,),
        lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True)) * GAMMA,
        1.5e-2,
    ),
    Case(
        "layer_norm",
        lambda x: x.layer_norm(GAMMA, BETA),
        (X,),
        lambda x: _layer_norm(x) * GAMMA + BETA,
        1e-2,
        1e-2,
    ),
    Case(
        "channel_layer_norm",
        lambda x: x.channel_layer_norm(GAMMA, BETA),
        (values(1, 32, 1, 6),),
        lambda x: _layer_norm(x, 1) * _channel(GAMMA) + _channel(BETA),
        1e-2,
        1e-2,
    ),
    Case("group_norm", lambda x: x.group_norm(G8, B8, 2), (IMAGE,), _group_norm, 1e-2, 1e-2),
    Case("batch_norm", lambda x: af.batch_norm(x, G8, B8, MEAN8, VAR8), (IMAGE,), _batch_norm, 1e-2, 1e-2),
    Case(
        "batch_norm rank 3",
        lambda x: af.batch_norm(x, G8, B8, MEAN8, VAR8),
        (values(1, 8, 5),),
        lambda x: _batch_norm(x[..., None])[..., 0],
        1e-2,
        1e-2,
    ),
    Case(
        "instance_norm",
        lambda x: af.instance_norm(x, G8, B8),
        (values(2, 8, 5, 6),),
        lambda x: _layer_norm(x, (2, 3)) * _channel(G8) + _channel(B8),
        1e-2,
        1e-2,
    ),
    Case(
        "local_response_norm",
        lambda x: af.local_response_norm(x, 5, 0.5),
        (IMAGE,),
        _local_response,
        2e-2,
        1e-2,
    ),
]

CASES = [*PRODUCTS, *COMPRESSED, *NORMS]
