"""Shape, movement and reduction ops of ANEForge's graph interface."""

from __future__ import annotations

import aneforge as af
import numpy as np
from scipy import special

from tests.interop.harness import Array, Case, values

X = values(3, 4, 6)
IMAGE = values(1, 8, 4, 6)
POSITIVE = values(3, 4, 6, low=0.05, high=2)


def _slice(x: Array) -> Array:
    return x[1:3, 2:4, 1:6]


MOVES = [
    Case("reshape", lambda x: x.reshape(12, 6) * 1.0, (X,), lambda x: x.reshape(12, 6), 0, 0),
    Case("reshape tuple", lambda x: x.reshape((2, 36)), (X,), lambda x: x.reshape(2, 36), 0, 0),
    Case("transpose", lambda x: x.transpose([2, 0, 1]), (X,), lambda x: x.transpose(2, 0, 1), 0, 0),
    Case("transpose negative", lambda x: x.transpose([0, -1, 1]), (X,), lambda x: x.transpose(0, 2, 1), 0, 0),
    Case("squeeze", lambda x: x.squeeze(0), (IMAGE,), lambda x: x[0], 0, 0),
    Case("expand_dims", lambda x: x.expand_dims([0, 2]), (X,), lambda x: x[None, :, None], 0, 0),
    Case("flatten2d", lambda x: x.flatten2d(), (X,), lambda x: x.reshape(3, 24), 0, 0),
    Case("flatten2d axis 0", lambda x: x.flatten2d(0), (X,), lambda x: x.reshape(1, 72), 0, 0),
    Case("flatten2d axis 2", lambda x: x.flatten2d(2), (X,), lambda x: x.reshape(12, 6), 0, 0),
    Case("slice_by_size", lambda x: x.slice_by_size([1, 2, 1], [2, 2, 5]), (X,), _slice, 0, 0),
    Case(
        "concat",
        lambda x, y: af.concat([x, y], 1),
        (X, values(3, 2, 6)),
        lambda x, y: np.concatenate([x, y], 1),
        0,
        0,
    ),
    Case(
        "concat last",
        lambda x, y: af.concat([x, y, x], -1),
        (X, X),
        lambda x, y: np.concatenate([x, y, x], -1),
        0,
        0,
    ),
    Case(
        "concat slices",
        lambda x: af.concat(
            [x.slice_by_size([0, 0, 3], [3, 4, 2]), x.slice_by_size([0, 0, 1], [3, 4, 1])], 2
        ),
        (X,),
        lambda x: x[..., [3, 4, 1]],
        0,
        0,
    ),
    Case(
        "stack",
        lambda x, y: af.stack([x, y], 1),
        (X, values(3, 4, 6, seed=1)),
        lambda x, y: np.stack([x, y], 1),
        0,
        0,
    ),
    Case("split", lambda x: af.split(x, 3, 2)[1] + 0.5, (X,), lambda x: x[..., 2:4] + 0.5, 1e-3),
    Case(
        "split two parts",
        lambda x: af.split(x, 2, 1)[0] - af.split(x, 2, 1)[1],
        (X,),
        lambda x: x[:, :2] - x[:, 2:],
        1e-3,
    ),
    Case("gather", lambda x: af.gather(x, [2, 0, 2]), (X,), lambda x: x[[2, 0, 2]], 0, 0),
    Case("gather last", lambda x: af.gather(x, [5, 0, 3], -1), (X,), lambda x: x[..., [5, 0, 3]], 0, 0),
    Case("gather rank 1", lambda x: af.gather(x, [1, 1, 0]), (values(5),), lambda x: x[[1, 1, 0]], 0, 0),
    Case("reverse", lambda x: x.reverse(1), (X,), lambda x: x[:, ::-1], 0, 0),
    Case("reverse axes", lambda x: x.reverse([0, -1]), (X,), lambda x: x[::-1, :, ::-1], 0, 0),
    Case("tile", lambda x: x.tile([2, 1, 3]), (X,), lambda x: np.tile(x, (2, 1, 3)), 0, 0),
    Case("crop", lambda x: af.crop(x, 1, 0, 2, 1), (IMAGE,), lambda x: x[:, :, 1:, 2:-1], 0, 0),
    Case("identity", lambda x: x, (X,), lambda x: x, 0, 0),
]


def _depth_to_space(x: Array, r: int, depth_first: bool) -> Array:
    n, c, h, w = x.shape
    if depth_first:
        blocks = x.reshape(n, c // r**2, r, r, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        blocks = x.reshape(n, r, r, c // r**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // r**2, h * r, w * r)


def _space_to_depth(x: Array, r: int, depth_first: bool) -> Array:
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // r, r, w // r, r)
    order = (0, 1, 3, 5, 2, 4) if depth_first else (0, 3, 5, 1, 2, 4)
    return blocks.transpose(order).reshape(n, c * r**2, h // r, w // r)


BLOCKS = [
    Case(
        "pixel_shuffle",
        lambda x: af.pixel_shuffle(x, 2),
        (IMAGE,),
        lambda x: _depth_to_space(x, 2, True),
        0,
        0,
    ),
    Case(
        "pixel_unshuffle",
        lambda x: af.pixel_unshuffle(x, 2),
        (IMAGE,),
        lambda x: _space_to_depth(x, 2, True),
        0,
        0,
    ),
    Case(
        "depth_to_space",
        lambda x: af.depth_to_space(x, 2),
        (IMAGE,),
        lambda x: _depth_to_space(x, 2, False),
        0,
        0,
    ),
    Case(
        "space_to_depth",
        lambda x: af.space_to_depth(x, 2),
        (IMAGE,),
        lambda x: _space_to_depth(x, 2, False),
        0,
        0,
    ),
]


def _keep(function: object, axis: int | tuple[int, ...]) -> object:
    return lambda x: function(x, axis=axis, keepdims=True)  # type: ignore[operator]


REDUCTIONS = [
    Case("mean", lambda x: x.mean(1), (X,), _keep(np.mean, 1)),
    Case("mean axes", lambda x: x.mean((0, 2)), (X,), _keep(np.mean, (0, 2))),
    Case("sum", lambda x: x.sum(-1), (X,), _keep(np.sum, -1), 2e-3, 4e-3),
    Case("sum axes", lambda x: x.sum((0, 1, 2)), (X,), _keep(np.sum, (0, 1, 2)), 2e-3, 1e-2),
    Case("amax", lambda x: x.amax(2), (X,), _keep(np.max, 2), 0, 0),
    Case("amin", lambda x: x.amin((1, 2)), (X,), _keep(np.min, (1, 2)), 0, 0),
    Case("l1_norm", lambda x: x.l1_norm(2), (X,), lambda x: np.abs(x).sum(2, keepdims=True)),
    Case(
        "log_sum", lambda x: x.log_sum(2), (POSITIVE,), lambda x: np.log(x.sum(2, keepdims=True)), 8e-3, 1e-2
    ),
    Case("sum_square", lambda x: x.sum_square(2), (X,), lambda x: (x**2).sum(2, keepdims=True)),
    Case(
        "log_sum_exp",
        lambda x: x.reduce_log_sum_exp(2),
        (X,),
        lambda x: special.logsumexp(x, 2, keepdims=True),
        8e-3,
        1e-2,
    ),
    Case("cumsum", lambda x: x.cumsum(), (values(4, 16),), lambda x: np.cumsum(x, -1), 2e-3, 4e-3),
    Case("sum over 300", lambda x: x.sum(1), (values(2, 300, low=0, high=1),), _keep(np.sum, 1)),
]

CASES = [*MOVES, *BLOCKS, *REDUCTIONS]
