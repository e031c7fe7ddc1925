"""Training runs that were published from an M4 with their own optimizer formulas, as MIL programs for the simulator.

onnxsim's `scripts/apple/train_mlp_step_coreml.py`, its `--qat-int8` form and `train_block_step_coreml.py` (September
2026): seeded data and weights, a loss seed of 256, and Adam written out op by op, all in fp16 as Core ML computes it.
`python -m docs._generate.silicon_runs` runs them on the exact simulator of M4 and writes `silicon_runs.csv`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer import compile_step
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, TensorType, Value
from ane_trainer.ane.simulator import make_context, prepare

F32 = NDArray[np.float32]
TABLE = Path(__file__).with_name("silicon_runs.csv")
CHIP, RATE, SEED, EPSILON = "m4", 1e-3, 256.0, 1e-3
BETA, BETA_SQ = 0.9, 0.999


@dataclass(frozen=True)
class Problem:
    """Data and starting weights, in the order that the published scripts draw them."""

    x: F32
    y: F32
    weights: dict[str, F32]


def mlp_problem() -> Problem:
    """1024-2048-1024, batch 256: fit a ReLU teacher."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 1024), dtype=np.float32)
    teacher = (rng.standard_normal((1024, 1024)) / np.sqrt(1024)).astype(np.float32)
    shapes = {"w1": (1024, 2048), "b1": (2048,), "w2": (2048, 1024), "b2": (1024,)}
    return Problem(x, np.maximum(x @ teacher, 0).astype(np.float32), _drawn(shapes, 0))


def block_problem() -> Problem:
    """A transformer block of width 512, 8 heads, 32 sequences of 64: fit noise."""
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((32, 64, 512), dtype=np.float32) for _ in range(2))
    shapes = {f"{kind}{name}": (512, 512) if kind == "w" else (512,) for name in "qkvo" for kind in "wb"}
    shapes |= {"wu": (512, 2048), "bu": (2048,), "wd": (2048, 512), "bd": (512,)}
    return Problem(x, y, _drawn(shapes, 1))


def _drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32)
        if len(s) > 1
        else np.zeros(s, np.float32)
        for name, s in shapes.items()
    }


class Step(Builder):
    """A step while it is built: forward, backward by hand, then Adam as `qat_graph.adam_update` has it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.x = self.input("x", TensorType("fp16", problem.x.shape))
        self.y = self.input("y", TensorType("fp16", problem.y.shape))
        self.lr, self.m_correction, self.v_correction = (
            self.input(name, TensorType("fp16", (1,))) for name in ("lr", "m_correction", "v_correction")
        )
        self.state = {
            name: self.input(name, TensorType("fp16", w.shape))
            for key, w in problem.weights.items()
            for name in (key, f"m_{key}", f"v_{key}")
        }

    def add(self, a: Value, b: Value | float) -> Value:
        return self.op("add", x=a, y=b)

    def mul(self, a: Value, b: Value | float) -> Value:
        return self.op("mul", x=a, y=b)

    def matmul(self, a: Value, b: Value, *, ta: bool = False, tb: bool = False) -> Value:
        return self.op("matmul", x=a, y=b, transpose_x=ta, transpose_y=tb)

    def summed(self, a: Value, axes: tuple[int, ...]) -> Value:
        return self.op("reduce_sum", x=a, axes=axes, keep_dims=False)

    def loss(self, y_hat: Value) -> tuple[Value, Value]:
        """The mean squared error, and the gradient of `y_hat` times SEED."""
        diff = self.op("sub", x=y_hat, y=self.y)
        square = self.mul(diff, diff)
        axes = tuple(range(len(square.type.shape)))
        loss = self.op("reduce_mean", x=square, axes=axes, keep_dims=False)
        half = self.mul(diff, SEED / diff.type.size)
        return loss, self.add(half, half)

    def sigmoid_gradient(self, h: Value, g: Value) -> Value:
        return self.mul(g, self.mul(h, self.op("sub", x=1.0, y=h)))

    def adam(self, loss: Value, gradients: Mapping[str, Value]) -> Function:
        """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g g; w -= lr m' / (sqrt(v') + eps)."""
        results = [self.op("reshape", x=loss, shape=(1,), name="loss")]
        for name, scaled in gradients.items():
            g = self.mul(scaled, 1.0 / SEED)
            m = self.add(self.mul(self.state[f"m_{name}"], BETA), self.mul(g, 1.0 - BETA))
            v = self.add(self.mul(self.state[f"v_{name}"], BETA_SQ), self.mul(self.mul(g, g), 1.0 - BETA_SQ))
            below = self.add(self.op("sqrt", x=self.mul(v, self.v_correction)), EPSILON)
            change = self.op("real_div", x=self.mul(self.mul(m, self.m_correction), self.lr), y=below)
            results += [self.op("sub", x=self.state[name], y=change), m, v]
        return self.finish(tuple(results))


def mlp_step(problem: Problem, *, quantized: bool = False) -> Function:
    """Sigmoid MLP; `quantized`: both weights through int8 with scales of the first weights, straight through."""
    b = Step(problem)
    w1, w2 = (_int8(b, name, problem.weights[name]) if quantized else b.state[name] for name in ("w1", "w2"))
    h = b.op("sigmoid", x=b.add(b.matmul(b.x, w1), b.state["b1"]))
    loss, g = b.loss(b.add(b.matmul(h, w2), b.state["b2"]))
    back = b.sigmoid_gradient(h, b.matmul(g, w2, tb=True))
    return b.adam(loss, {
        "w1": b.matmul(b.x, back, ta=True), "b1": b.summed(back, (0,)), "w2": b.matmul(h, g, ta=True),
        "b2": b.summed(g, (0,)),
    })  # fmt: skip


def _int8(b: Step, name: str, first: F32) -> Value:
    scale = float(max(np.abs(first).max(), 1e-6)) / 127.0
    codes = b.op("quantize", input=b.state[name], scale=scale, output_dtype="int8")
    return b.op("dequantize", input=codes, scale=scale)


def block_step(problem: Problem) -> Function:
    """Attention with a residual, then a SiLU feed-forward with a residual; no norms."""
    b = Step(problem)
    batch, seq, dim = problem.x.shape
    s, rows, heads = b.state, (batch * seq, dim), 8

    def linear(x: Value, name: str) -> Value:
        return b.add(b.matmul(x, s[f"w{name}"]), s[f"b{name}"])

    def split(x: Value) -> Value:
        wide = b.op("reshape", x=x, shape=(batch, seq, heads, dim // heads))
        return b.op("transpose", x=wide, perm=(0, 2, 1, 3))

    def merge(x: Value) -> Value:
        return b.op("reshape", x=b.op("transpose", x=x, perm=(0, 2, 1, 3)), shape=rows)

    x = b.op("reshape", x=b.x, shape=rows)
    q, k, v = (split(linear(x, name)) for name in "qkv")
    p = b.op("softmax", x=b.mul(b.matmul(q, k, tb=True), 1.0 / 8.0), axis=-1)
    merged = merge(b.matmul(p, v))
    a = b.add(x, linear(merged, "o"))
    u = linear(a, "u")
    sigmoid = b.op("sigmoid", x=u)
    gated = b.mul(u, sigmoid)
    y_hat = b.op("reshape", x=b.add(a, linear(gated, "d")), shape=(batch, seq, dim))
    loss, whole = b.loss(y_hat)
    g = b.op("reshape", x=whole, shape=rows)

    gradients: dict[str, Value] = {}

    def back(name: str, into: Value, x: Value) -> Value:
        gradients[f"w{name}"], gradients[f"b{name}"] = b.matmul(x, into, ta=True), b.summed(into, (0,))
        return b.matmul(into, s[f"w{name}"], tb=True)

    g_gated = back("d", g, gated)
    through = b.add(b.mul(g_gated, sigmoid), b.sigmoid_gradient(sigmoid, b.mul(g_gated, u)))
    g_a = b.add(g, back("u", through, a))
    g_heads = split(back("o", g_a, merged))
    g_v, g_p = b.matmul(p, g_heads, ta=True), b.matmul(g_heads, v, tb=True)
    inner = b.op("reduce_sum", x=b.mul(g_p, p), axes=(-1,), keep_dims=True)
    g_scores = b.mul(b.mul(b.op("sub", x=g_p, y=inner), p), 1.0 / 8.0)
    for name, into in (("q", b.matmul(g_scores, k)), ("k", b.matmul(g_scores, q, ta=True)), ("v", g_v)):
        back(name, merge(into), x)
    return b.adam(loss, {name: gradients[name] for name in problem.weights})


def losses(function: Function, problem: Problem, steps: int, fidelity: str = "exact") -> Iterator[float]:
    """The loss of each step on the simulator, state fed back in fp16."""
    plan = prepare(function, make_context(CHIP, fidelity))
    names = [
        v.name for v in function.inputs if v.name not in ("x", "y", "lr", "m_correction", "v_correction")
    ]
    state = {name: np.zeros(problem.weights[name[2:]].shape, np.float16) for name in names if name[1] == "_"}
    state |= {name: w.astype(np.float16) for name, w in problem.weights.items()}
    data = {"x": problem.x.astype(np.float16), "y": problem.y.astype(np.float16)}
    for t in range(1, steps + 1):
        scalars = {"lr": RATE, "m_correction": 1 / (1 - BETA**t), "v_correction": 1 / (1 - BETA_SQ**t)}
        fed = {name: np.array([value], np.float16) for name, value in scalars.items()}
        results = list(plan.run({**data, **state, **fed}).values())
        state = dict(zip(names, results[1:], strict=True))
        yield float(results[0][0])


def torch_losses(problem: Problem, steps: int) -> Iterator[float]:
    """The MLP with the same formulas in fp32 by PyTorch."""
    model, optimizer, x, y = _torch_mlp(problem)
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def front_door_losses(problem: Problem, steps: int) -> Iterator[float]:
    """The MLP with `compile_step` and torch's Adam: our own update, which keeps second moments in a unit."""
    model, optimizer, x, y = _torch_mlp(problem)
    step = compile_step(model, "mse", optimizer, (x, y), chip=CHIP, device="sim")
    for _ in range(steps):
        yield float(step(x, y))
    step.close()


def _torch_mlp(problem: Problem) -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Sigmoid(), torch.nn.Linear(2048, 1024))
    with torch.no_grad():
        for parameter, name in zip(model.parameters(), ("w1", "b1", "w2", "b2"), strict=True):
            parameter.copy_(torch.from_numpy(problem.weights[name].T.copy()))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=EPSILON)
    return model, optimizer, torch.from_numpy(problem.x), torch.from_numpy(problem.y)


#: Name in the table -> (steps, losses of so many steps).
RUNS: dict[str, tuple[int, Callable[[int], Iterator[float]]]] = {
    "mlp": (15, lambda n: losses(mlp_step(p := mlp_problem()), p, n)),
    "mlp int8": (15, lambda n: losses(mlp_step(p := mlp_problem(), quantized=True), p, n)),
    "mlp fp32": (15, lambda n: torch_losses(mlp_problem(), n)),
    "mlp compile_step": (15, lambda n: front_door_losses(mlp_problem(), n)),
    "block": (8, lambda n: losses(block_step(p := block_problem()), p, n)),
}


def stored() -> dict[str, list[float]]:
    """The table: losses by run."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return {name: [float(value) for value in values] for name, *values in csv.reader(file)}


def main() -> None:
    """Run what is named on the command line, or all, and write the table."""
    found = stored() if TABLE.exists() else {}
    for name in sys.argv[1:] or RUNS:
        steps, run = RUNS[name]
        found[name] = []
        for value in run(steps):
            found[name].append(round(value, 6))
            print(name, len(found[name]), value, flush=True)
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [name, *found[name]] for name in RUNS if name in found
        )


if __name__ == "__main__":
    main()
