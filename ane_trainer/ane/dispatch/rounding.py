"""What rounding alone costs a captured step on a batch: the same step in arithmetic of eleven bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ane_trainer.ane.capture.range.departure import Rounded, rounding_error, run_rounded
from ane_trainer.ane.dispatch.loading import LoadedStep
from ane_trainer.ane.stages import Captured

#: Runs that are rounded at random where no operation departs, and how many are made together.
_ROUNDINGS, _AT_ONCE = 12, 3


def rounded_run(
    loaded: LoadedStep, batch: tuple[object, object], before: Mapping[str, torch.Tensor]
) -> Rounded:
    """The captured step on this batch in rounded arithmetic, with the parameters as they were `before` it."""
    return run_rounded(*_step_and_values(loaded, batch, before))


def error_at_random(
    loaded: LoadedStep, batch: tuple[object, object], before: Mapping[str, torch.Tensor]
) -> Iterator[float]:
    """The errors of the same step's gradients where numbers are rounded up or down at random, of a few runs each."""
    captured, values = _step_and_values(loaded, batch, before)
    for i in range(0, _ROUNDINGS, _AT_ONCE):  # each holds the step's values
        yield rounding_error(captured, values, range(i, i + _AT_ONCE))


def _step_and_values(
    loaded: LoadedStep, batch: tuple[object, object], before: Mapping[str, torch.Tensor]
) -> tuple[Captured, dict[str, torch.Tensor]]:
    captured = loaded.capture.captured
    values = dict(loaded.capture.values(batch))
    values |= {p.name: before[p.target].reshape(p.shape) for p in captured.inputs if p.target in before}
    scaled = [p for p in captured.inputs if p.role == "batch" and p.scale != 1.0]
    return captured, {**values, **{p.name: values[p.name] * p.scale for p in scaled}}
