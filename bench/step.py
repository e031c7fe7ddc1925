"""One training step on the simulator next to the same step in plain PyTorch fp32, measured in turn in one run.

    python -m bench.step [--model mlp] [--optimizer adam] [--batch-size 128] [--steps 40] [--threads 1]

Prints milliseconds (median and best) and the ratio to PyTorch, pair by pair, for exact and fast.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import ane_trainer as at
from ane_trainer.commands.bench import in_turn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}

FIRST_STEP = """
import time; start = time.perf_counter()
import torch, ane_trainer as at
model = at.build_model("mlp"); optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
x, y = torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))
at.compile_step(model, "cross_entropy", optimizer, example=(x, y), chip="m4", device="sim")(x, y)
print(time.perf_counter() - start)
"""


def eager_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> None:
    """One ordinary PyTorch step."""
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def use_threads(count: int) -> None:
    """Let PyTorch and the simulator use `count` cores."""
    torch.set_num_threads(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def compare(model_name: str, optimizer_name: str, batch: int, steps: int) -> None:
    """Print eager, exact and fast side by side."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))
    eager_model = at.build_model(model_name)
    eager_optimizer = OPTIMIZERS[optimizer_name](eager_model.parameters())
    runs: dict[str, Callable[[], object]] = {"eager": lambda: eager_step(eager_model, eager_optimizer, x, y)}
    for fidelity in ("exact", "fast"):
        model = at.build_model(model_name)
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        step = at.compile_step(
            model, "cross_entropy", optimizer, example=(x, y), chip="m4", device="sim", fidelity=fidelity
        )
        runs[fidelity] = lambda step=step: step(x, y)  # type: ignore[misc]
    # the processor's time with one thread, which a busy machine disturbs little, else that on the wall
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = in_turn(runs, steps, clock)
    print(
        f"{model_name}, {optimizer_name}, batch {batch}, {torch.get_num_threads()} threads, {steps} steps in turn"
    )
    for name, values in times.items():
        ratio = statistics.median(v / e for v, e in zip(values, times["eager"], strict=True))
        best = min(values) / min(times["eager"])
        print(
            f"  {name:6s} median {statistics.median(values) * 1e3:8.2f} ms   best {min(values) * 1e3:8.2f} ms"
            f"   ratio to eager {ratio:5.2f} (pairwise median), {best:5.2f} (best to best)"
        )


def first_step(runs: int = 3) -> None:
    """Print the time from `import ane_trainer` to the first step's result, in fresh processes."""
    found = []
    for _ in range(runs):
        result = subprocess.run(
            [sys.executable, "-c", FIRST_STEP], check=True, capture_output=True, text=True
        )
        found.append(float(result.stdout.strip().splitlines()[-1]))
    print(
        f"from import to the first step's result: best {min(found):.1f} s, worst {max(found):.1f} s of {runs}"
    )


def main() -> None:
    """Parse the options and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--optimizer", default="adam", choices=OPTIMIZERS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    first_step()
    use_threads(options.threads)
    compare(options.model, options.optimizer, options.batch_size, options.steps)


if __name__ == "__main__":
    main()
