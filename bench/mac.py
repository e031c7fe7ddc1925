"""Speed of the exact multiply-accumulate kernel, next to torch's float32 matmul in the same run.

    python -m bench.mac [--threads 2] [--seconds 0.3]

Figures are 10^9 multiply-accumulates per second, the best of repeated calls. With one thread the thread's
processor time counts, which a busy machine disturbs little; with more it is the time on the wall.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.simulator.mac import product as mac
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away

F32 = NDArray[np.float32]

# name, (M, K, N), scale of a, scale of b, smallest |a| and |b| (0: products may drop)
CASES = [
    ("narrow, no drop", (512, 512, 512), 0.5, 0.05, 2.0**-5),
    ("narrow, drop", (512, 512, 512), 0.5, 0.05, 0.0),
    ("narrow, short runs", (512, 512, 512), 1.0, 1.0, 0.0),
    ("wide", (512, 512, 512), 20.0, 1.0, 0.0),
    ("suspicious sums", (512, 512, 512), 100.0, 2.0, 0.0),
    ("MLP layer", (128, 784, 512), 0.5, 0.05, 0.0),
    ("MLP last layer", (128, 256, 10), 0.5, 0.05, 0.0),
    ("MLP last gradient", (10, 128, 256), 0.5, 0.05, 0.0),
    ("conv im2col", (64, 576, 25088), 0.2, 0.2, 0.0),
]


def best_seconds(step: Callable[[], object], options: argparse.Namespace) -> float:
    """Shortest of repeated calls."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    best, end = float("inf"), time.perf_counter() + options.seconds
    while time.perf_counter() < end:
        start = clock()
        step()
        best = min(best, clock() - start)
    return best


def operand(rng: np.random.Generator, shape: tuple[int, int], scale: float, least: float) -> F32:
    """Normal values as decoded fp16, none nearer to zero than `least`."""
    values = rng.normal(size=shape) * scale
    return round_half_away(np.copysign(np.maximum(np.abs(values), least), values))


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    mac.mac_matmul(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), threads=1)
    print(f"compiled in {time.perf_counter() - start:.3f} s; {options.threads} threads")
    rng = np.random.default_rng(0)
    for name, (rows, depth, columns), a_scale, b_scale, least in CASES:
        a, b = operand(rng, (rows, depth), a_scale, least), operand(rng, (depth, columns), b_scale, least)
        out = np.zeros((rows, columns), np.float32)
        tensors = torch.from_numpy(a), torch.from_numpy(b), torch.zeros(rows, columns)
        bound = mac.mac_bind(a, b, threads=options.threads, out=out)
        ours = best_seconds(bound, options)
        free = best_seconds(lambda: mac.mac_matmul(a, b, threads=options.threads), options)  # noqa: B023
        theirs = best_seconds(lambda: torch.mm(tensors[0], tensors[1], out=tensors[2]), options)  # noqa: B023
        work = rows * depth * columns / 1e9
        print(
            f"{name:20} {rows:4}x{depth}x{columns:<6} {work / ours:6.1f} G/s ({ours * 1e6:8.1f} us bound, "
            f"{free * 1e6:8.1f} us free)   torch {work / theirs:6.1f} G/s   ratio {ours / theirs:5.2f}"
        )


if __name__ == "__main__":
    main()
