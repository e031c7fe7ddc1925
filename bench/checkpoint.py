"""Memory and time of a step whose blocks' activations are computed again, beside one that keeps them.

    python -m bench.checkpoint [--layers 2 8] [--width 64] [--rows 16] [--tokens 64]

An encoder (`bench.compile_time`) with Adam on the simulator of M4, exact, one thread. MB: what the simulator holds
besides weights, moments and batch, in a step that keeps and in one that computes again; then processor seconds of
both, least of five. Both give the same loss, or the script fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

import ane_trainer as at
from ane_trainer.ane.simulator import make_context, prepare
from bench.compile_time import Transformer


def measured(layers: int, options: argparse.Namespace, checkpoint: bool) -> tuple[float, float, float]:
    """(MB, seconds, loss of the last step)."""
    torch.manual_seed(0)
    model = Transformer(layers, options.width, 64, options.tokens)
    x = torch.randint(0, 64, (options.rows, options.tokens))
    y = torch.randint(0, 64, (options.rows * options.tokens,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step: Any = at.compile_step(
        model, "cross_entropy", optimizer, (x, y), threads=1, seed=0, checkpoint=checkpoint
    )
    plan = prepare(step.program.main, make_context("m4", threads=1))
    held = sum(block.nbytes for block in plan.shared) / (1 << 20)
    least, loss = float("inf"), 0.0
    for _ in range(6):
        start = time.process_time()
        loss = float(step(x, y))
        least = min(least, time.process_time() - start)
    step.discard()
    return held, least, loss


def main() -> int:
    """Print a row for each number of layers; 1 where the losses are not the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    for name, value in (("width", 64), ("rows", 16), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'layers':>6}{'MB kept':>9}{'MB again':>10}{'s kept':>9}{'s again':>9}", flush=True)
    same = True
    for layers in options.layers:
        kept, again = (measured(layers, options, checkpoint) for checkpoint in (False, True))
        print(f"{layers:6d}{kept[0]:9.1f}{again[0]:10.1f}{kept[1]:9.3f}{again[1]:9.3f}", flush=True)
        same = same and kept[2] == again[2]
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
