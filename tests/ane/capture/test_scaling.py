"""Loss scaling: the overflow flag, the skip that costs nothing, halving and growth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ane_trainer.ane.capture import CaptureOptions, capture_training
from ane_trainer.ane.capture.scaling import (
    GROWTH_INTERVAL,
    OVERFLOW,
    SMALLEST_SCALE,
    all_below,
    gradient_peaks,
    next_scale,
)
from tests.ane.capture.harness import FxStep


@pytest.mark.parametrize(("largest", "fits"), [(OVERFLOW, 0.0), (OVERFLOW * (1 - 2**-11), 1.0), (0.0, 1.0)])
def test_the_flag_is_about_the_largest_magnitude(largest: float, fits: float) -> None:
    gradients = [torch.zeros(3), torch.tensor([[1.0, -largest]])]
    assert all_below(torch.cat(gradient_peaks(gradients)), OVERFLOW).tolist() == [fits]


def scale_after(scale: float, good: float, ok: float) -> tuple[float, float, float]:
    one = torch.ones(1)
    return tuple(float(v) for v in next_scale(one * scale, one / scale, one * good, one * ok))  # type: ignore[return-value]


def test_scale_halves_grows_and_stays_within_bounds() -> None:
    assert scale_after(1024.0, 17.0, 0.0) == (512.0, 1 / 512, 0.0)
    assert scale_after(1024.0, 17.0, 1.0) == (1024.0, 1 / 1024, 18.0)
    assert scale_after(1024.0, GROWTH_INTERVAL - 1.0, 1.0) == (2048.0, 1 / 2048, 0.0)
    assert scale_after(SMALLEST_SCALE, 3.0, 0.0) == (SMALLEST_SCALE, 1 / SMALLEST_SCALE, 0.0)
    assert scale_after(32768.0, GROWTH_INTERVAL - 1.0, 1.0) == (32768.0, 1 / 32768, 0.0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_skipped_step_changes_nothing_but_the_scale(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    x, y = torch.randn(3, 4), torch.randn(3, 2)
    captured = capture_training(model, "mse", optimizer, (x, y), CaptureOptions(loss_scale=32768.0))
    step = FxStep(captured, model, optimizer)
    assert step.step({"x": x * 1e-3, "y": y * 1e-3})[1] == 1.0  # moments are not zero any more
    before = {target: value.clone() for target, value in step.state.items()}
    assert step.step({"x": x * 100, "y": y})[1] == 0.0
    changed = {t for t in before if not torch.equal(before[t], step.state[t])}
    assert changed == {"step/loss_scale", "step/loss_scale_inverse", "step/good_steps"}
    assert step.state["step/loss_scale"].item() == 16384.0
    assert step.count == 1
