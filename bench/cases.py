"""The rows of `bench/ops.py`: programs of about a million operations and more, each with the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Value

Shape = tuple[int, ...]
Eager = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One row: shapes of the inputs, the program on them, and the same in PyTorch."""

    name: str
    shapes: tuple[Shape, ...]
    program: Callable[..., Value | tuple[Value, ...]]
    eager: Eager


IMAGE, ROWS, HEADS = (8, 32, 56, 56), (64, 128, 128), (4, 8, 128, 64)
CHANNELS = torch.linspace(0.5, 1.5, 32)
_NAMES = {
    "conv": ("x", "weight", "bias"), "conv_transpose": ("x", "weight"), "linear": ("x", "weight", "bias"),
    "scaled_dot_product_attention": ("query", "key", "value"), "select": ("cond", "a", "b"),
}  # fmt: skip


def cases() -> list[Case]:
    """Every row of the table."""
    families = (
        _products,
        _convolutions,
        _arithmetic,
        _activations,
        _norms,
        _reductions,
        _pools,
        _samples,
        _moves,
    )
    return [*(case for family in families for case in family()), *_programs()]


def op(kind: str, **arguments: Any) -> Callable[..., Value]:
    """A program of one op; tensors are called x, y, ... unless the op calls them otherwise."""
    names = _NAMES.get(kind, ("x", "y"))
    return lambda b, *values: b.op(kind, **dict(zip(names, values, strict=False)), **arguments)


def _products() -> list[Case]:
    return [
        Case("matmul 512x512x512", ((512, 512), (512, 512)), op("matmul"), torch.matmul),
        Case("matmul 25088x576x16", ((25088, 576), (576, 16)), op("matmul"), torch.matmul),
        Case("matmul 64x128x64", ((64, 128), (128, 64)), op("matmul"), torch.matmul),
        Case("matmul 32x128x64x128", ((32, 128, 64), (32, 64, 128)), op("matmul"), torch.matmul),
        Case("matmul q k^T of heads", (HEADS, HEADS), op("matmul", transpose_y=True), lambda x, y: x @ y.mT),
        Case("matmul weights v of heads", ((4, 8, 128, 128), HEADS), op("matmul"), torch.matmul),
        Case("linear 128x784x256", ((128, 784), (256, 784), (256,)), op("linear"), F.linear),
        Case("linear 1024x512x10", ((1024, 512), (10, 512), (10,)), op("linear"), F.linear),
        Case("attention 128x64", (HEADS,) * 3, op("scaled_dot_product_attention"), F.scaled_dot_product_attention),
    ]  # fmt: skip


def _conv(**arguments: Any) -> Callable[..., Value]:
    return op("conv", pad_type="custom", pad=[1, 1, 1, 1], **arguments)


def _convolutions() -> list[Case]:
    small = {"strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}
    return [
        Case("conv 3x3 32>32", (IMAGE, (32, 32, 3, 3)), _conv(), lambda x, w: F.conv2d(x, w, None, 1, 1)),
        Case("conv 3x3 and bias", (IMAGE, (32, 32, 3, 3), (32,)), _conv(), lambda *t: F.conv2d(*t, 1, 1)),
        Case("conv 1x1 32>64", (IMAGE, (64, 32, 1, 1)), op("conv", pad_type="valid"), F.conv2d),
        Case("conv 3x3 stride 2", (IMAGE, (64, 32, 3, 3)), _conv(strides=[2, 2]),
             lambda x, w: F.conv2d(x, w, None, 2, 1)),
        Case("conv 5x5 1>16", ((128, 1, 28, 28), (16, 1, 5, 5)), op("conv", pad_type="valid"), F.conv2d),
        Case("conv 3x3 dilated", (IMAGE, (32, 32, 3, 3)),
             op("conv", pad_type="custom", pad=[2, 2, 2, 2], dilations=[2, 2]),
             lambda x, w: F.conv2d(x, w, None, 1, 2, 2)),
        Case("conv 3x3 in 4 groups", (IMAGE, (32, 8, 3, 3)), _conv(groups=4),
             lambda x, w: F.conv2d(x, w, None, 1, 1, 1, 4)),
        Case("conv depthwise 3x3", (IMAGE, (32, 1, 3, 3)), _conv(groups=32),
             lambda x, w: F.conv2d(x, w, None, 1, 1, 1, 32)),
        Case("conv depthwise stride 2", (IMAGE, (32, 1, 3, 3)), _conv(groups=32, strides=[2, 2]),
             lambda x, w: F.conv2d(x, w, None, 2, 1, 1, 32)),
        Case("conv 1-D of 5", ((16, 64, 512), (64, 64, 5)), op("conv", pad_type="custom", pad=[2, 2]),
             lambda x, w: F.conv1d(x, w, None, 1, 2)),
        Case("conv_transpose 4x4 / 2", ((8, 32, 28, 28), (32, 16, 4, 4)), op("conv_transpose", **small),
             lambda x, w: F.conv_transpose2d(x, w, None, 2, 1)),
        Case("conv_transpose 2x2 / 2", ((8, 32, 28, 28), (32, 16, 2, 2)),
             op("conv_transpose", strides=[2, 2], pad_type="valid"), lambda x, w: F.conv_transpose2d(x, w, None, 2)),
    ]  # fmt: skip


def _arithmetic() -> list[Case]:
    two = {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "real_div": torch.div,
        "maximum": torch.maximum,
    }
    where = Case("less, select", (ROWS, ROWS), lambda b, x, y: b.op("select", cond=b.op("less", x=x, y=y), a=x, b=y),
                 lambda x, y: torch.where(x < y, x, y))  # fmt: skip
    return [
        *(Case(kind, (ROWS, ROWS), op(kind), eager) for kind, eager in two.items()),
        Case("mul by a number", (ROWS,), op("mul", y=0.7), lambda x: x * 0.7),
        Case("mul broadcast", (ROWS, (128,)), op("mul"), torch.mul),
        Case("add of columns", (ROWS, (64, 128, 1)), op("add"), torch.add),
        Case("real_div by columns", (ROWS, (64, 128, 1)), op("real_div"), torch.div),
        Case("pow", (ROWS, ROWS), lambda b, x, y: b.op("pow", x=b.op("abs", x=x), y=y), lambda x, y: x.abs() ** y),
        where,
        Case("greater", (ROWS, ROWS), op("greater"), torch.gt),
        Case("floor_div", (ROWS, ROWS), op("floor_div"), torch.floor_divide),
    ]  # fmt: skip


def _activations() -> list[Case]:
    kinds: dict[str, Eager] = {
        "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "exp": torch.exp,
        "erf": torch.erf, "abs": torch.abs, "square": torch.square, "sign": torch.sign, "floor": torch.floor,
        "softplus": F.softplus, "sin": torch.sin, "relu6": F.relu6, "ceil": torch.ceil, "round": torch.round,
    }  # fmt: skip
    return [
        *(Case(kind, (ROWS,), op(kind), eager) for kind, eager in kinds.items()),
        Case("gelu", (ROWS,), op("gelu", mode="EXACT"), F.gelu),
        Case("gelu tanh", (ROWS,), op("gelu", mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh")),
        Case("leaky_relu", (ROWS,), op("leaky_relu", alpha=0.01), F.leaky_relu),
        Case("inverse", (ROWS,), op("inverse", epsilon=1e-4), torch.reciprocal),
        Case("elu", (ROWS,), op("elu", alpha=1.0), F.elu),
        Case("clip", (ROWS,), op("clip", alpha=-0.1, beta=0.1), lambda x: x.clamp(-0.1, 0.1)),
        Case("sqrt", (ROWS,), lambda b, x: b.op("sqrt", x=b.op("abs", x=x)), lambda x: x.abs().sqrt()),
        Case("rsqrt", (ROWS,), lambda b, x: b.op("rsqrt", x=b.op("abs", x=x)), lambda x: x.abs().rsqrt()),
        Case("log", (ROWS,), lambda b, x: b.op("log", x=b.op("abs", x=x)), lambda x: x.abs().log()),
        Case("sigmoid_hard", (ROWS,), op("sigmoid_hard", alpha=0.2, beta=0.5), F.hardsigmoid),
        Case("prelu", (IMAGE,), op("prelu", alpha=[0.1] * 32), lambda x: F.prelu(x, CHANNELS)),
    ]  # fmt: skip


def _norms() -> list[Case]:
    gamma = CHANNELS.tolist()
    flat = {"mean": gamma, "variance": gamma, "gamma": gamma, "beta": gamma, "epsilon": 1e-5}
    rows, line = [0.5] * 128, torch.full((128,), 0.5)
    return [
        Case("softmax -1", (ROWS,), op("softmax", axis=-1), lambda x: F.softmax(x, -1)),
        Case("softmax 1", (ROWS,), op("softmax", axis=1), lambda x: F.softmax(x, 1)),
        Case("softmax of 1000", ((256, 1000),), op("softmax", axis=-1), lambda x: F.softmax(x, -1)),
        Case("layer_norm", (ROWS,), op("layer_norm", axes=[-1], epsilon=1e-5), lambda x: F.layer_norm(x, (128,))),
        Case("layer_norm, gamma, beta", (ROWS,), op("layer_norm", axes=[-1], epsilon=1e-5, gamma=rows, beta=rows),
             lambda x: F.layer_norm(x, (128,), line, line)),
        Case("layer_norm of 1024", ((512, 1024),), op("layer_norm", axes=[-1], epsilon=1e-5),
             lambda x: F.layer_norm(x, (1024,))),
        Case("instance_norm", (IMAGE,), op("instance_norm", epsilon=1e-5), F.instance_norm),
        Case("batch_norm", (IMAGE,), op("batch_norm", **flat),
             lambda x: F.batch_norm(x, CHANNELS, CHANNELS, CHANNELS, CHANNELS)),
        Case("l2_norm", (IMAGE,), op("l2_norm", epsilon=1e-5),
             lambda x: x / torch.linalg.vector_norm(x, 2, (1, 2, 3), True)),
        Case("local_response_norm", (IMAGE,), op("local_response_norm", size=5), lambda x: F.local_response_norm(x, 5)),
    ]  # fmt: skip


def _reductions() -> list[Case]:
    kinds: dict[str, Eager] = {
        "reduce_sum": torch.sum, "reduce_mean": torch.mean, "reduce_max": torch.amax, "reduce_min": torch.amin,
        "reduce_sum_square": lambda x, d, k: (x * x).sum(d, k),
        "reduce_l1_norm": lambda x, d, k: torch.linalg.vector_norm(x, 1, d, k),
        "reduce_l2_norm": lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k),
        "reduce_log_sum_exp": torch.logsumexp,
    }  # fmt: skip
    rows = [
        Case(f"{kind} {axes}", (ROWS,), op(kind, axes=axes, keep_dims=True),
             lambda x, f=function, d=axes: f(x, d, True))
        for kind, function in kinds.items() for axes in ([-1], [1], [0], [0, 1, 2])
    ]  # fmt: skip
    plane = {"axes": [2, 3], "keep_dims": False}
    return [
        *rows,
        Case("reduce_mean of images", (IMAGE,), op("reduce_mean", **plane), lambda x: x.mean((2, 3))),
        Case(
            "reduce_sum of channels", (IMAGE,), op("reduce_sum", axes=[0, 2, 3]), lambda x: x.sum((0, 2, 3))
        ),
        Case("reduce_argmax -1", (ROWS,), op("reduce_argmax", axis=-1), lambda x: x.argmax(-1)),
        Case("reduce_argmax 1", (ROWS,), op("reduce_argmax", axis=1), lambda x: x.argmax(1)),
        Case("cumsum", (ROWS,), op("cumsum", axis=-1), lambda x: x.cumsum(-1)),
        Case("argsort", (ROWS,), op("argsort", axis=-1), lambda x: x.argsort(-1, True)),
        Case("topk 8", (ROWS,), lambda b, x: b.multi("topk", x=x, k=8, axis=-1), lambda x: x.topk(8)),
    ]


def _pool(kind: str, size: int = 2, stride: int = 2, pad: int = 0, **arguments: Any) -> Callable[..., Value]:
    sizes = {"kernel_sizes": [size] * 2, "strides": [stride] * 2, "pad_type": "custom", "pad": [pad] * 4}
    return op(kind, **sizes, **arguments)


def _pools() -> list[Case]:
    flag = {"exclude_padding_from_average": False}
    return [
        Case("max_pool 2x2", (IMAGE,), _pool("max_pool"), lambda x: F.max_pool2d(x, 2)),
        Case("max_pool 3x3 / 2", (IMAGE,), _pool("max_pool", 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1)),
        Case("max_pool 3x3 / 1", (IMAGE,), _pool("max_pool", 3, 1, 1), lambda x: F.max_pool2d(x, 3, 1, 1)),
        Case("avg_pool 2x2", (IMAGE,), _pool("avg_pool", **flag), lambda x: F.avg_pool2d(x, 2)),
        Case("avg_pool 3x3 / 2", (IMAGE,), _pool("avg_pool", 3, 2, 1, **flag), lambda x: F.avg_pool2d(x, 3, 2, 1)),
        Case("avg_pool 3x3 inside", (IMAGE,), _pool("avg_pool", 3, 1, 1, exclude_padding_from_average=True),
             lambda x: F.avg_pool2d(x, 3, 1, 1, False, False)),
        Case("avg_pool of images", (IMAGE,), _pool("avg_pool", 56, 56, **flag), lambda x: F.avg_pool2d(x, 56)),
        Case("l2_pool 2x2", (IMAGE,), _pool("l2_pool"), lambda x: F.lp_pool2d(x, 2, 2)),
    ]  # fmt: skip


def _samples() -> list[Case]:
    up, size = (
        {"scale_factor_height": 2, "scale_factor_width": 2},
        {"target_size_height": 84, "target_size_width": 84},
    )
    return [
        Case("upsample_nearest x2", (IMAGE,), op("upsample_nearest_neighbor", **up),
             lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
        Case("resize_nearest 84", (IMAGE,), op("resize_nearest_neighbor", **size),
             lambda x: F.interpolate(x, (84, 84), mode="nearest")),
        Case("upsample_bilinear x2", (IMAGE,), op("upsample_bilinear", align_corners=False, **up),
             lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
        Case("upsample_bilinear corners", (IMAGE,), op("upsample_bilinear", align_corners=True, **up),
             lambda x: F.interpolate(x, None, 2, "bilinear", True)),
        Case("resize_bilinear 84", (IMAGE,), op("resize_bilinear", sampling_mode="UNALIGN_CORNERS", **size),
             lambda x: F.interpolate(x, (84, 84), mode="bilinear")),
        Case("pixel_shuffle", (IMAGE,), op("pixel_shuffle", upscale_factor=2), lambda x: F.pixel_shuffle(x, 2)),
        Case("pixel_unshuffle", (IMAGE,), op("pixel_unshuffle", downscale_factor=2), lambda x: F.pixel_unshuffle(x, 2)),
    ]  # fmt: skip


def _tripled(kind: str, **arguments: Any) -> Callable[..., Value]:
    """A view, which costs nothing by itself, and what reads it."""
    return lambda b, x: b.op("mul", x=b.op(kind, x=x, **arguments), y=3.0)


def _moves() -> list[Case]:
    return [
        Case("transpose", (ROWS,), _tripled("transpose", perm=[0, 2, 1]), lambda x: x.mT.contiguous() * 3.0),
        Case("transpose 2-D", ((1024, 1024),), _tripled("transpose", perm=[1, 0]), lambda x: x.T.contiguous() * 3.0),
        Case("transpose NCHW > NHWC", (IMAGE,), _tripled("transpose", perm=[0, 2, 3, 1]),
             lambda x: x.permute(0, 2, 3, 1).contiguous() * 3.0),
        Case("transpose NHWC > NCHW", ((8, 56, 56, 32),), _tripled("transpose", perm=[0, 3, 1, 2]),
             lambda x: x.permute(0, 3, 1, 2).contiguous() * 3.0),
        Case("transpose of heads", ((4, 128, 8, 64),), _tripled("transpose", perm=[0, 2, 1, 3]),
             lambda x: x.permute(0, 2, 1, 3).contiguous() * 3.0),
        Case("reshape of a transpose", ((64, 128, 128),),
             lambda b, x: b.op("reshape", x=b.op("transpose", x=x, perm=[0, 2, 1]), shape=[64, -1]),
             lambda x: x.mT.reshape(64, -1)),
        Case("slice", (ROWS,), _tripled("slice_by_index", begin=[0, 16, 0], end=[64, 112, 128]),
             lambda x: x[:, 16:112] * 3.0),
        Case("concat", (ROWS, ROWS), lambda b, x, y: b.op("concat", values=(x, y), axis=1, interleave=False),
             lambda x, y: torch.cat((x, y), 1)),
        Case("concat of the last axis", (ROWS, ROWS),
             lambda b, x, y: b.op("concat", values=(x, y), axis=-1, interleave=False),
             lambda x, y: torch.cat((x, y), -1)),
        Case("stack", (ROWS, ROWS), lambda b, x, y: b.op("stack", values=(x, y), axis=0),
             lambda x, y: torch.stack((x, y))),
        Case("pad", (IMAGE,), op("pad", pad=[1, 1, 1, 1], mode="constant", constant_val=0.0),
             lambda x: F.pad(x, (1, 1, 1, 1))),
        Case("pad reflect", (IMAGE,), op("pad", pad=[1, 1, 1, 1], mode="reflect"),
             lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
        Case("tile", ((64, 64, 128),), op("tile", reps=[1, 2, 2]), lambda x: x.repeat(1, 2, 2)),
        Case("reverse", (ROWS,), op("reverse", axes=[1]), lambda x: x.flip(1)),
        Case("gather", (ROWS,), lambda b, x: b.op("gather", x=x, indices=list(range(0, 128, 2)), axis=1),
             lambda x: x.index_select(1, torch.arange(0, 128, 2))),
    ]  # fmt: skip


def _block(b: Builder, x: Value, w: Value, v: Value) -> Value:
    """A transformer's feed-forward block with its norm and residual."""
    n = b.op("layer_norm", x=x, axes=[-1], epsilon=1e-5)
    h = b.op("gelu", x=b.op("matmul", x=n, y=w), mode="EXACT")
    return b.op("add", x=x, y=b.op("matmul", x=h, y=v))


def _block_eager(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return x + F.gelu(F.layer_norm(x, x.shape[-1:]) @ w) @ v


def _images(b: Builder, x: Value, w: Value) -> Value:
    """Convolution, batch norm, ReLU, pooling."""
    y = b.op("batch_norm", x=_conv()(b, x, w), mean=[0.0] * 32, variance=[1.0] * 32, epsilon=1e-5)
    return _pool("max_pool")(b, b.op("relu", x=y))


def _images_eager(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = F.batch_norm(F.conv2d(x, w, None, 1, 1), torch.zeros(32), torch.ones(32))
    return F.max_pool2d(F.relu(y), 2)


def _update(b: Builder, p: Value, g: Value, m: Value, v: Value) -> tuple[Value, ...]:
    """Adam's arithmetic."""
    m = b.op("add", x=b.op("mul", x=m, y=0.9), y=b.op("mul", x=g, y=0.1))
    v = b.op("add", x=b.op("mul", x=v, y=0.99), y=b.op("mul", x=b.op("mul", x=g, y=g), y=0.01))
    ratio = b.op("real_div", x=m, y=b.op("add", x=b.op("sqrt", x=b.op("abs", x=v)), y=1e-3))
    return b.op("sub", x=p, y=b.op("mul", x=ratio, y=0.01)), m, v


def _update_eager(p: Any, g: Any, m: Any, v: Any) -> Any:
    m, v = m * 0.9 + g * 0.1, v * 0.99 + g * g * 0.01
    return p - m / (v.abs().sqrt() + 1e-3) * 0.01, m, v


def _programs() -> list[Case]:
    return [
        Case("program: Adam update", (ROWS,) * 4, _update, _update_eager),
        Case("program: norm, MLP, residual", ((1024, 128), (128, 512), (512, 128)), _block, _block_eager),
        Case("program: conv, norm, pool", (IMAGE, (32, 32, 3, 3)), _images, _images_eager),
    ]
