"""Time of each op on the simulator next to the same op in PyTorch fp32 eager, measured in turn in one process.

    python -m bench.ops [WORD ...] [--seconds 0.12] [--threads 2] [--border] [--above 1.5]
    python -m bench.ops --distance [WORD ...]       how far fast mode's results lie from exact mode's

The least of repeated calls, both sides with as many threads: of one, its processor time, which a busy machine
disturbs little; of more, time on the wall. `--border` counts the conversions of inputs and results between fp16
patterns and the simulator's memory too. WORDs choose rows by their names (`cases.py`), `--above` those whose fast
mode costs more than that many times PyTorch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, TensorType
from ane_trainer.ane.simulator import Plan, make_context, prepare
from bench.cases import Case, cases

Run = Callable[[], object]
Array = NDArray[Any]

TURN_S = 0.005
"""A call is repeated as long before it is another's turn: PyTorch's threads keep a core busy when they have ended."""


def function_of(case: Case) -> Function:
    """The row's program."""
    b = Builder()
    inputs = [b.input(f"x{i}", TensorType("fp16", shape)) for i, shape in enumerate(case.shapes)]
    found = case.program(b, *inputs)
    return b.finish(found if isinstance(found, tuple) else (found,))


def least_of(runs: dict[str, Run], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """The shortest call of each, called in turns until each has had its share of `seconds` (twice at least)."""
    for run in runs.values():
        run()
    least = dict.fromkeys(runs, float("inf"))
    end, rounds = time.perf_counter() + seconds * len(runs), 0
    while rounds < 2 or time.perf_counter() < end:
        for name, run in runs.items():
            least[name] = min(least[name], least_of_turn(run, clock))
        rounds += 1
    return least


def least_of_turn(run: Run, clock: Callable[[], float]) -> float:
    """The shortest of the calls of one turn."""
    least, end = float("inf"), time.perf_counter() + TURN_S
    while time.perf_counter() < end:
        start = clock()
        run()
        least = min(least, clock() - start)
    return least


def plans_of(case: Case, threads: int, scale: float) -> tuple[dict[str, Plan], dict[str, Array]]:
    """The row in exact and in fast mode, and normal inputs of that deviation."""
    rng, function = np.random.default_rng(0), function_of(case)
    feeds = {v.name: (scale * rng.standard_normal(v.type.shape)).astype(np.float16) for v in function.inputs}
    return {f: prepare(function, make_context("m4", f, threads=threads)) for f in ("exact", "fast")}, feeds


def runs_of(case: Case, threads: int, border: bool) -> dict[str, Run]:
    """The row as three calls: exact, fast, eager."""
    plans, feeds = plans_of(case, threads, 0.25)
    tensors = [torch.from_numpy(array.astype(np.float32)) for array in feeds.values()]
    runs: dict[str, Run] = {}
    for fidelity, plan in plans.items():
        plan.run(feeds)
        runs[fidelity] = partial(plan.run, feeds) if border else partial(_steps, plan)
    runs["eager"] = lambda: case.eager(*tensors)
    return runs


def _steps(plan: Plan) -> None:
    for step in plan.steps:
        step()


def distances(words: list[str]) -> None:
    """Print, for normal inputs of deviation 1, the distance between the modes where it is not zero."""
    print(f"{'fast against exact':32}{'rms relative':>14}{'largest':>12}{'same bits':>12}")
    for case in chosen(words):
        plans, feeds = plans_of(case, 1, 1.0)
        (exact, fast) = (next(iter(plan.run(feeds).values())).astype(np.float64) for plan in plans.values())
        finite = np.isfinite(exact) & np.isfinite(fast)
        apart, size = np.where(finite, fast, 0) - np.where(finite, exact, 0), np.where(finite, exact, 0)
        if apart.any():
            rms = np.sqrt(np.square(apart).mean() / np.square(size).mean())
            same = np.mean(exact == fast)
            print(f"{case.name:32}{rms:14.2g}{np.abs(apart).max():12.2g}{same:12.1%}", flush=True)


def chosen(words: list[str]) -> list[Case]:
    """The rows whose names hold any of the words (none: every row)."""
    return [case for case in cases() if not words or any(word in case.name for word in words)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--seconds", type=float, default=0.12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--border", action="store_true")
    parser.add_argument("--above", type=float, default=0.0)
    parser.add_argument("--distance", action="store_true")
    options = parser.parse_args()
    if options.distance:
        return distances(options.words)
    table(options.words, options.seconds, options.threads, options.border, options.above)


def table(words: list[str], seconds: float, threads: int, border: bool = False, above: float = 0.0) -> None:
    """Measure and print the `chosen` rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    title = f"microseconds, {threads} thread{'s' * (threads > 1)}"
    print(f"{title:32}{'exact':>10}{'fast':>10}{'eager':>10}   exact / fast to eager")
    with torch.no_grad():
        for case in chosen(words):
            us = {
                name: 1e6 * t for name, t in least_of(runs_of(case, threads, border), seconds, clock).items()
            }
            if us["fast"] > above * us["eager"]:
                ratios = f"{us['exact'] / us['eager']:8.2f} {us['fast'] / us['eager']:8.2f}"
                print(
                    f"{case.name:32}{us['exact']:10.0f}{us['fast']:10.0f}{us['eager']:10.0f}   {ratios}",
                    flush=True,
                )
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
