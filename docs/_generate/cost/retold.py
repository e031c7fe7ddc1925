# ruff: noqa: E501  (prose of the page)
"""Published training on the engine, and what the cost model makes of the same work."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from ane_trainer import compile_step
from ane_trainer.ane.chips.cost import estimate
from docs._generate.cost.workloads import program

TABLE = Path(__file__).with_name("retold.csv")


@dataclass(frozen=True)
class Retold:
    """One published training time (ms a step) beside the estimate and its interval, with the reasons for the gap."""

    what: str
    source: str
    chip: str
    path: str
    published_ms: str
    estimated_ms: float
    low_ms: float
    high_ms: float
    reason: str


class _Block(nn.Module):
    """A pre-norm transformer block with a single head over [B, S, D] (onnxsim's published block)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        scores = self.q(h) @ self.k(h).transpose(-1, -2) / h.shape[-1] ** 0.5
        x = x + self.out(scores.softmax(-1) @ self.v(h))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def _step(
    model: nn.Module, loss: object, x: torch.Tensor, y: torch.Tensor, chip: str, path: str
) -> tuple[float, ...]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = compile_step(model, loss, optimizer, (x, y), device="sim", chip=chip)  # type: ignore[arg-type]
    found = estimate(step.program, chip, path)
    step.close()
    return tuple(
        us / 1e3 for us in (found.latency_us, found.latency_interval.low, found.latency_interval.high)
    )


def _stories(chip: str) -> tuple[float, ...]:
    """Engine kernels of one Stories110M step of 12 layers at 256 tokens: forward and input gradients.

    A kernel each for the fused projections, the feed-forward network and their gradients, as in maderix's
    trainer (60 a step); attention scores are counted within the projections' kernels.
    """
    layer = [
        "pointwise_conv 768 2304 256", "pointwise_conv 768 768 256", "pointwise_conv 768 4096 256",
        "pointwise_conv 2048 768 256", "pointwise_conv 4096 768 256",
    ]  # fmt: skip
    costs = [estimate(program(kernel), chip, "direct") for kernel in layer]
    return tuple(12 * sum(values) / 1e3 for values in zip(
        *((c.latency_us, c.latency_interval.low, c.latency_interval.high) for c in costs), strict=True))  # fmt: skip


def retell() -> Iterator[Retold]:
    """Every published training step that the model can be held against."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 10))
    step = _step(mlp, "cross_entropy", torch.rand(128, 784), torch.randint(10, (128,)), "m5-pro", "e5rt")
    yield Retold(
        "MNIST MLP 784-256-10, batch 128, Adam, weights resident", "ANEForge 0.4.0, docs/training", "m5-pro", "e5rt",
        "0.40 to 0.43", *step,
        "Our program keeps two fp16 numbers a weight and moment (ANEForge one), so that it moves about twice the state in"
        " three times the ops.",
    )  # fmt: skip
    found = estimate(program("mlp_step 128 784 256 10"), "m5-pro")
    yield Retold(
        "The same, as ANEForge's own program of 75 ops", "ANEForge 0.4.0, docs/training", "m5-pro", "e5rt",
        "0.40 to 0.43", *(us / 1e3 for us in (found.latency_us, found.latency_interval.low, found.latency_interval.high)),
        "Its host loop: converting and copying the batch, and reading the loss, before the next dispatch.",
    )  # fmt: skip
    wide = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024))
    x = torch.randn(256, 1024)
    step = _step(wide, "mse", x, torch.randn(256, 1024), "m4", "coreml")
    yield Retold(
        "MLP 1024-2048-1024, batch 256, Adam (110 ops)", "onnxsim #1402", "m4", "coreml", "10.3", *step,
        "Core ML with all state as plain inputs and outputs: 25 MB each way through MLMultiArrays in fp32, which Core ML"
        " converts. Nothing of Core ML on M4 is published otherwise: its transfer rates are those of M5 Pro and M6,"
        " shrunk by DRAM bandwidth.",
    )  # fmt: skip
    x = torch.randn(1, 128, 256)
    step = _step(_Block(256, 1024), "mse", x, torch.randn(1, 128, 256), "m4", "coreml")
    yield Retold(
        "Transformer block with attention backward, Adam (352 ops)", "onnxsim #1443", "m4", "coreml", "34.8", *step,
        "The sizes of the published block are not given; a block of width 256 at 128 tokens is priced. Its 352 ops take"
        " 0.1 ms each, more than ops of this size: a share of them is probably not on the engine, or split into segments.",
    )  # fmt: skip
    for chip, published in (("m4", "9.6 (engine part), 91 to 115 in all"), ("m4-pro", "8.9 (engine part), 69 to 73 in all"),
                            ("m4-max", "10.2 (engine part), 64 in all"),
                            ("m5", "9.1 to 9.8 (engine part), 101 to 120 in all")):  # fmt: skip
        yield Retold(
            "Stories110M, 12 layers, 256 tokens: engine kernels of a step", "maderix/ANE, issue 3", chip, "direct",
            published, *_stories(chip),
            "Only forward and input gradients run on the engine: weight gradients, classifier, norms and Adam run on the"
            " CPU and make up most of the step.",
        )  # fmt: skip
    yield Retold(
        "Stories110M, 12 layers, 256 tokens: engine kernels of a step", "Orion, RESULTS.md", "m4-max", "direct",
        "849 + 494 (evaluation and swap of weights)", *_stories("m4-max"),
        "Orion unloads, rewrites and loads 60 kernels each step (about 8 ms a kernel, 494 ms), and computes weight"
        " gradients, classifier and Adam on one CPU thread.",
    )  # fmt: skip


def write() -> None:
    """Write the table that the page shows."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([item.name for item in fields(Retold)])
        for row in retell():
            writer.writerow([f"{item:.4g}" if isinstance(item, float) else item for item in astuple(row)])


def load() -> list[dict[str, str]]:
    """The rows of the table in the tree."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
