"""Finds a learning rate by a short sweep, and a batch size by the cost model, before training begins."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.errors import NumericsWarning, UnsupportedModel, UsageError
from ane_trainer.training.loop import Batch
from ane_trainer.training.steps import Step

#: Of the mean of losses, as in Smith's range test; and what ends the sweep: a loss so many times the best.
_SMOOTHING, _DIVERGED = 0.98, 4.0
#: Losses at both ends of the sweep that say nothing: the mean settles, the loss explodes.
_FIRST, _LAST = 10, 5

#: The loss falls if it comes below this share of the first one; batches differ by about as much.
_FALLS = 0.97

BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
#: Of an epoch, at least.
_STEPS = 20
#: Of two batch sizes the smaller is taken if the larger one's throughput is not this much better.
_WORTH = 1.1


@dataclass(frozen=True)
class RateSweep:
    """What a sweep found: `rate` to train with, and the smoothed losses by learning rate."""

    rate: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]


def find_rate(
    step: Step, optimizer: torch.optim.Optimizer, batches: Iterable[Batch], rates: Sequence[float]
) -> RateSweep:
    """Train a step at each of the growing `rates`; the step and the optimizer are then as they were.

    The rate is where the loss falls fastest over the logarithm of the rate (L. N. Smith, arXiv:1506.01186).
    UsageError if the loss never falls.
    """
    before = {name: value.clone() for name, value in step.state_dict().items()}
    tops = [group["lr"] for group in optimizer.param_groups]
    mean, smoothed = 0.0, list[float]()
    try:
        for number, (rate, (x, y)) in enumerate(zip(rates, batches, strict=False), 1):
            for group in optimizer.param_groups:
                group["lr"] = rate
            with warnings.catch_warnings():  # the last rates are too large on purpose
                warnings.simplefilter("ignore", NumericsWarning)
                loss = float(step(x, y))
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
            smoothed.append(mean / (1 - _SMOOTHING**number))
            if not math.isfinite(loss) or smoothed[-1] > _DIVERGED * min(smoothed):
                smoothed.pop()
                break
    finally:
        step.load_state_dict(before)
        for group, top in zip(optimizer.param_groups, tops, strict=True):
            group["lr"] = top
    used = rates[: len(smoothed)]
    inner = range(min(_FIRST, len(used) // 4) + 1, max(len(used) - _LAST, 2))
    slopes = {number: smoothed[number] - smoothed[number - 1] for number in inner if number < len(used)}
    best = min(slopes, key=slopes.__getitem__, default=0)
    if not slopes or min(smoothed) > _FALLS * smoothed[0]:
        raise UsageError(
            "lr: needs a loss that falls at some learning rate; it fell at none from "
            f"{rates[0]:g} to {rates[-1]:g}. Give one, e.g. --lr 0.001.",
            code="ANE104",
        )
    return RateSweep(used[best], tuple(used), tuple(smoothed))


def geometric(lowest: float, highest: float, count: int) -> list[float]:
    """`count` numbers from `lowest` to `highest`, each the same factor above the one before."""
    return [lowest * (highest / lowest) ** (number / (count - 1)) for number in range(count)]


def find_batch_size(make: Callable[[int], Step], examples: int) -> tuple[int, str]:
    """The batch size of the most examples a second by the cost model, and why; `make` compiles a step for one.

    An epoch keeps `_STEPS` steps or more where that can be: a model does not learn from few large ones. A size
    that does not fit the chip ends the search. UnsupportedModel if the smallest does not fit.
    """
    speeds: dict[int, float] = {}
    for size in [size for size in BATCH_SIZES if size * _STEPS <= examples] or [
        min(BATCH_SIZES[0], examples)
    ]:
        try:
            step = make(size)
        except UnsupportedModel:
            if not speeds:
                raise
            break
        cost = step.cost()
        step.close()
        latency = cost.latency_us if cost is not None else None
        if not latency:
            return size, "nothing is known of the chip's speed"
        speeds[size] = size / latency * 1e6
    chosen = next(iter(speeds))
    for size, speed in speeds.items():
        if speed > _WORTH * speeds[chosen]:
            chosen = size
    return chosen, f"{speeds[chosen]:,.0f} examples a second by the cost model"
