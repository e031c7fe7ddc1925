"""Time from a model to a compiled step, by stage, and how it grows with the number of layers.

    python bench/compile_time.py [--layers 2 4 8 12 16]

Prints seconds of processor time (the machine may be shared) for capture, lower, legalize and compile, and the
program's size. Bounds: 3 s for an MLP or CNN, 15 s for a transformer of 12 layers, linear in the layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.capture import capture_training
from ane_trainer.ane.compiler.build import compile_program
from ane_trainer.ane.compiler.legalize import legalize
from ane_trainer.ane.compiler.lower import lower

STAGES = ("capture", "lower", "legalize", "compile")


class Transformer(nn.Module):
    """Token embedding, `layers` encoder layers with dropout, a head."""

    def __init__(self, layers: int, width: int = 64, words: int = 64, length: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(x) + self.position)).flatten(0, 1)


def transformer(layers: int) -> tuple[nn.Module, Any, Any]:
    return Transformer(layers), torch.randint(0, 64, (4, 16)), torch.randint(0, 64, (64,))


def built(name: str) -> tuple[nn.Module, Any, Any]:
    return at.build_model(name), torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))


def measure(model: nn.Module, x: Any, y: Any) -> tuple[list[float], int]:
    """(processor seconds of each stage, ops of the program)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    times, value = [], None
    stages: list[Callable[[Any], Any]] = [
        lambda _: capture_training(model, "cross_entropy", optimizer, (x, y)).captured,
        lower,
        lambda lowered: legalize(lowered, "m4"),
        lambda legal: compile_program(legal, cache=False),
    ]
    for stage in stages:
        start = time.process_time()
        value = stage(value)
        times.append(time.process_time() - start)
    assert value is not None
    return times, len(value.program.main.ops)


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 12, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(*built("mlp"))  # what torch itself loads and compiles on first use
    print(f"{'model':24s}" + "".join(f"{stage:>10s}" for stage in (*STAGES, "total")) + f"{'ops':>8s}")
    cases: list[tuple[str, Callable[[], tuple[nn.Module, Any, Any]]]] = [
        ("mlp", lambda: built("mlp")),
        ("cnn", lambda: built("cnn")),
        *((f"transformer, {n} layers", lambda n=n: transformer(n)) for n in options.layers),  # type: ignore[misc]
    ]
    for name, make in cases:
        torch.manual_seed(0)
        times, ops = measure(*make())
        print(f"{name:24s}" + "".join(f"{t:10.2f}" for t in (*times, sum(times))) + f"{ops:8d}", flush=True)


if __name__ == "__main__":
    main()
