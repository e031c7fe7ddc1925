"""Time of each op on the simulator next to the same op in PyTorch fp32 eager, measured in turn in one process.

    python -m bench.ops [WORD ...] [--seconds 0.12] [--border]

One thread each, and that thread's processor time, which a busy machine disturbs little; the least of repeated
calls. `--border` counts the conversions of inputs and results between fp16 patterns and the simulator's memory
too. WORDs choose rows by their names.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ane_trainer.ane.mil import Function, TensorType, Value
from ane_trainer.ane.opset import Builder
from ane_trainer.ane.simulator import Plan, make_context, prepare

Shape = tuple[int, ...]
Eager = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One row: shapes of the inputs, the program on them, and the same in PyTorch."""

    name: str
    shapes: tuple[Shape, ...]
    program: Callable[..., Value | tuple[Value, ...]]
    eager: Eager


IMAGE, ROWS = (8, 32, 56, 56), (64, 128, 128)
CHANNELS = torch.linspace(0.5, 1.5, 32)


def _op(kind: str, **arguments: Any) -> Callable[..., Value]:
    """A program of one op; tensors are called x, y, ... unless the op calls them otherwise."""
    names = {
        "conv": ("x", "weight"), "conv_transpose": ("x", "weight"), "linear": ("x", "weight", "bias"),
        "scaled_dot_product_attention": ("query", "key", "value"), "select": ("cond", "a", "b"),
    }.get(kind, ("x", "y"))  # fmt: skip
    return lambda b, *values: b.op(kind, **dict(zip(names, values, strict=False)), **arguments)


def _conv(**arguments: Any) -> Callable[..., Value]:
    return _op("conv", pad_type="custom", pad=[1, 1, 1, 1], **arguments)


def _pool(kind: str, **arguments: Any) -> Callable[..., Value]:
    sizes = {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "valid"}
    return _op(kind, **sizes, **arguments)


def _block(b: Builder, x: Value, w: Value, v: Value) -> Value:
    """A transformer's feed-forward block with its norm and residual."""
    n = b.op("layer_norm", x=x, axes=[-1], epsilon=1e-5)
    h = b.op("gelu", x=b.op("matmul", x=n, y=w), mode="EXACT")
    return b.op("add", x=x, y=b.op("matmul", x=h, y=v))


def _block_eager(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return x + F.gelu(F.layer_norm(x, x.shape[-1:]) @ w) @ v


def _images(b: Builder, x: Value, w: Value) -> Value:
    """Convolution, batch norm, ReLU, pooling."""
    y = b.op("batch_norm", x=_conv()(b, x, w), mean=[0.0] * 32,
             variance=[1.0] * 32, epsilon=1e-5)  # fmt: skip
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


def _reductions() -> list[Case]:
    kinds: dict[str, Eager] = {
        "reduce_sum": torch.sum, "reduce_mean": torch.mean, "reduce_max": torch.amax,
        "reduce_sum_square": lambda x, d, k: (x * x).sum(d, k),
        "reduce_l2_norm": lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k),
        "reduce_log_sum_exp": torch.logsumexp,
    }  # fmt: skip
    rows = []
    for kind, function in kinds.items():
        for axes in ([-1], [0], [0, 1, 2]):
            name = f"{kind} {axes}"
            rows.append(
                Case(name, (ROWS,), _op(kind, axes=axes, keep_dims=True),
                     lambda x, f=function, d=axes: f(x, d, True))
            )  # fmt: skip
    return rows


def cases() -> list[Case]:
    """Every row of the table."""
    up = {"scale_factor_height": 2, "scale_factor_width": 2}
    gamma = CHANNELS.tolist()
    flat = {"mean": gamma, "variance": gamma, "gamma": gamma, "beta": gamma, "epsilon": 1e-5}
    rows = [
        Case("matmul 512x512x512", ((512, 512), (512, 512)), _op("matmul"), torch.matmul),
        Case("matmul 25088x576x16", ((25088, 576), (576, 16)), _op("matmul"), torch.matmul),
        Case("matmul 32x128x64x128", ((32, 128, 64), (32, 64, 128)), _op("matmul"), torch.matmul),
        Case("linear 128x784x256", ((128, 784), (256, 784)), _op("linear"), F.linear),
        Case("conv 3x3 32>32", (IMAGE, (32, 32, 3, 3)), _conv(), lambda x, w: F.conv2d(x, w, None, 1, 1)),
        Case("conv 1x1 32>64", (IMAGE, (64, 32, 1, 1)), _op("conv", pad_type="valid"), F.conv2d),
        Case("conv 3x3 stride 2", (IMAGE, (64, 32, 3, 3)), _conv(strides=[2, 2]),
             lambda x, w: F.conv2d(x, w, None, 2, 1)),
        Case("conv depthwise 3x3", (IMAGE, (32, 1, 3, 3)), _conv(groups=32),
             lambda x, w: F.conv2d(x, w, None, 1, 1, 1, 32)),
        Case("conv_transpose 4x4 / 2", ((8, 32, 28, 28), (32, 16, 4, 4)),
             _op("conv_transpose", strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]),
             lambda x, w: F.conv_transpose2d(x, w, None, 2, 1)),
        Case("attention 128x64", ((4, 8, 128, 64),) * 3, _op("scaled_dot_product_attention"),
             F.scaled_dot_product_attention),
        Case("add", (ROWS, ROWS), _op("add"), torch.add),
        Case("mul broadcast", (ROWS, (128,)), _op("mul"), torch.mul),
        Case("gelu", (ROWS,), _op("gelu", mode="EXACT"), F.gelu),
        Case("exp", (ROWS,), _op("exp"), torch.exp),
        Case("real_div", (ROWS, ROWS), _op("real_div"), torch.div),
        Case("softmax -1", (ROWS,), _op("softmax", axis=-1), lambda x: F.softmax(x, -1)),
        Case("softmax 1", (ROWS,), _op("softmax", axis=1), lambda x: F.softmax(x, 1)),
        Case("layer_norm", (ROWS,), _op("layer_norm", axes=[-1], epsilon=1e-5),
             lambda x: F.layer_norm(x, x.shape[-1:])),
        Case("instance_norm", (IMAGE,), _op("instance_norm", epsilon=1e-5), F.instance_norm),
        Case("batch_norm", (IMAGE,), _op("batch_norm", **flat),
             lambda x: F.batch_norm(x, CHANNELS, CHANNELS, CHANNELS, CHANNELS)),
        Case("l2_norm", (IMAGE,), _op("l2_norm", epsilon=1e-5),
             lambda x: x / torch.linalg.vector_norm(x, 2, (1, 2, 3), True)),
        *_reductions(),
        Case("max_pool 2x2", (IMAGE,), _pool("max_pool"), lambda x: F.max_pool2d(x, 2)),
        Case("avg_pool 2x2", (IMAGE,), _pool("avg_pool", exclude_padding_from_average=False),
             lambda x: F.avg_pool2d(x, 2)),
        Case("upsample_nearest x2", (IMAGE,), _op("upsample_nearest_neighbor", **up),
             lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
        Case("upsample_bilinear x2", (IMAGE,), _op("upsample_bilinear", align_corners=False, **up),
             lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
        Case("transpose", (ROWS,), lambda b, x: b.op("mul", x=b.op("transpose", x=x, perm=[0, 2, 1]), y=3.0),
             lambda x: x.mT.contiguous() * 3.0),
        Case("concat", (ROWS, ROWS), lambda b, x, y: b.op("concat", values=(x, y), axis=1, interleave=False),
             lambda x, y: torch.cat((x, y), 1)),
        Case("pad", (IMAGE,), _op("pad", pad=[1, 1, 1, 1], mode="constant", constant_val=0.0),
             lambda x: F.pad(x, (1, 1, 1, 1))),
        Case("program: Adam update", (ROWS,) * 4, _update, _update_eager),
        Case("program: norm, MLP, residual", ((1024, 128), (128, 512), (512, 128)), _block, _block_eager),
        Case("program: conv, norm, pool", (IMAGE, (32, 32, 3, 3)), _images, _images_eager),
    ]  # fmt: skip
    return rows


def function_of(case: Case) -> Function:
    """The row's program."""
    b = Builder()
    inputs = [b.input(f"x{i}", TensorType("fp16", shape)) for i, shape in enumerate(case.shapes)]
    found = case.program(b, *inputs)
    return b.finish(found if isinstance(found, tuple) else (found,))


def least_of(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The shortest call of each, called in turn until each has had its share of `seconds` (once at least)."""
    least = dict.fromkeys(runs, float("inf"))
    for name, run in runs.items():
        run()
        least[name] = float("inf")
    end, rounds = time.thread_time() + seconds * len(runs), 0
    while rounds < 2 or time.thread_time() < end:
        for name, run in runs.items():
            start = time.thread_time()
            run()
            least[name] = min(least[name], time.thread_time() - start)
        rounds += 1
    return least


def runs_of(case: Case, border: bool) -> dict[str, Callable[[], object]]:
    """The row as three calls: exact, fast, eager."""
    rng, function = np.random.default_rng(0), function_of(case)
    arrays = [(0.25 * rng.standard_normal(shape)).astype(np.float16) for shape in case.shapes]
    tensors = [torch.from_numpy(array.astype(np.float32)) for array in arrays]
    feeds = {value.name: array for value, array in zip(function.inputs, arrays, strict=True)}
    runs: dict[str, Callable[[], object]] = {}
    for fidelity in ("exact", "fast"):
        plan = prepare(function, make_context("m4", fidelity, threads=1))
        plan.run(feeds)
        runs[fidelity] = partial(plan.run, feeds) if border else partial(_steps, plan)
    runs["eager"] = lambda: case.eager(*tensors)
    return runs


def _steps(plan: Plan) -> None:
    for step in plan.steps:
        step()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--seconds", type=float, default=0.12)
    parser.add_argument("--border", action="store_true")
    options = parser.parse_args()
    table(options.words, options.seconds, options.border)


def table(words: list[str], seconds: float, border: bool = False) -> None:
    """Measure and print the rows whose names hold any of the words (none: every row)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"{'one thread, microseconds':32}{'exact':>10}{'fast':>10}{'eager':>10}   exact / fast to eager")
    with torch.no_grad():
        for case in cases():
            if words and not any(word in case.name for word in words):
                continue
            us = {name: 1e6 * t for name, t in least_of(runs_of(case, border), seconds).items()}
            ratios = f"{us['exact'] / us['eager']:8.2f} {us['fast'] / us['eager']:8.2f}"
            print(f"{case.name:32}{us['exact']:10.0f}{us['fast']:10.0f}{us['eager']:10.0f}   {ratios}")
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
