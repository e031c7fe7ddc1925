"""Gradients that a parameter of 0 hides in the first step are right from the second on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.capture.calibrate import Calibration, calibrate, gradient_peaks
from ane_trainer.ane.capture.hidden import after_first_updates
from ane_trainer.ane.capture.ports import find_parameters


class Adapted(nn.Module):
    """A layer with a low-rank branch whose second factor begins at 0, as LoRA's does."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.base.requires_grad_(False)
        self.first, self.second = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.second.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + self.scale * self.second(self.first(x))))


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3])
def test_the_first_factor_of_an_adapter_trains_as_in_fp32(scale: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 32), torch.randint(0, 4, (64,))
    model = Adapted(scale)
    plain, start = copy.deepcopy(model), model.first.weight.detach().clone()
    ours, theirs = (
        torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (model, plain)
    )
    step = at.compile_step(model, "cross_entropy", ours, (x, y), verify="off")
    for _ in range(3):
        step(x, y)
        theirs.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        theirs.step()
    moved, wanted = model.first.weight - start, plain.first.weight - start
    assert (moved - wanted).norm() < 0.05 * wanted.norm()


def test_an_adapter_trains_from_a_rate_that_warms_up() -> None:
    """The parameters of 0 then become much larger than the first rate says."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 32), torch.randint(0, 4, (64,))
    model = Adapted(1.0)
    plain, start = copy.deepcopy(model), model.second.weight.detach().clone()
    ours, theirs = (
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-8) for m in (model, plain)
    )
    step = at.compile_step(model, "cross_entropy", ours, (x, y), verify="off")
    for number in range(40):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, number / 10)
        step(x, y)
        theirs.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        theirs.step()
    step.sync()
    moved, wanted = model.second.weight - start, plain.second.weight - start
    assert (moved - wanted).norm() < 0.02 * wanted.norm()
    assert step.skipped_steps == 0


def test_nothing_is_moved_where_every_gradient_shows() -> None:
    model = Adapted(1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    parameters = [p for p in find_parameters(model, optimizer) if p.trained]
    shown = Calibration((), {p.name: 0.5 for p in parameters})
    assert after_first_updates(parameters, optimizer, shown) == {}
    hidden = Calibration((), {p.name: 0.0 if p.name == "first.weight" else 0.5 for p in parameters})
    assert set(after_first_updates(parameters, optimizer, hidden)) == {"second.weight"}


def test_peaks_alone_are_those_of_the_calibration() -> None:
    model, example = Adapted(1.0), (torch.randn(8, 32), torch.randint(0, 4, (8,)))
    parameters = find_parameters(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    whole = calibrate(model, F.cross_entropy, parameters, example).peaks
    assert gradient_peaks(model, F.cross_entropy, parameters, example) == pytest.approx(whole, rel=1e-5)
    assert whole["first.weight"] == 0.0 < whole["second.weight"]
