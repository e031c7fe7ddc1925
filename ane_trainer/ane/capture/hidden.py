"""Gradients that parameters of 0 hide in the example: of LoRA's first factor, and behind gates that begin at 0.

Such a gradient, and every value on the way to it, is 0 in the first step and small from the second on. Powers of two
that are chosen from zeros would lose it, so the range pass looks at a later step, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ane_trainer.ane.capture.calibrate import Calibration, calibrate, gradient_peaks
from ane_trainer.ane.capture.losses import Loss
from ane_trainer.ane.capture.optimizers.table import plain
from ane_trainer.ane.capture.ports import Parameter

#: Updates after which the parameters of 0 are looked at.
_UPDATES = 8.0
#: The least rate that they are taken to have: one that warms up says nothing of the parameters' later size.
_LEAST_RATE = 1e-4


def calibrate_hidden(
    model: torch.nn.Module,
    loss: Loss,
    parameters: Sequence[Parameter],
    example: tuple[object, object],
    optimizer: torch.optim.Optimizer,
) -> tuple[Calibration, dict[str, torch.Tensor]]:
    """The calibration of the parameters, hidden gradients as a later step shows them, and what hid them, moved."""
    found = calibrate(model, loss, parameters, example)
    moved = after_first_updates(parameters, optimizer, found)
    if moved:
        there = [dataclasses.replace(p, tensor=moved.get(p.name, p.tensor)) for p in parameters]
        later = gradient_peaks(model, loss, there, example)
        found = dataclasses.replace(found, peaks={n: v or later.get(n, 0.0) for n, v in found.peaks.items()})
    return found, moved


def after_first_updates(
    parameters: Sequence[Parameter], optimizer: torch.optim.Optimizer, calibration: Calibration
) -> dict[str, torch.Tensor]:
    """Parameters that are 0 as they are after some updates, by name; none where every gradient of the example shows.

    SGD moves by the rate times the gradient, others by about the rate, which counts as 1e-4 at least; signs are drawn,
    by a seed of their own.
    """
    trained = [p for p in parameters if p.trained and p.name in calibration.peaks]
    if all(calibration.peaks[p.name] > 0.0 for p in trained):
        return {}
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for p in trained:
        peak = calibration.peaks[p.name]
        if peak > 0.0 and p.group is not None and not bool(p.tensor.detach().any()):
            rate = max(float(plain(optimizer.param_groups[p.group]).get("lr", 0.0)), _LEAST_RATE)
            size = rate * (peak if isinstance(optimizer, torch.optim.SGD) else 1.0)
            moved[p.name] = _UPDATES * size * torch.randn(p.tensor.shape, generator=generator)
    return moved
