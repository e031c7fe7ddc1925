"""A step whose gradients fit into no unit is blamed on its loss, and a smaller one heals it."""

from __future__ import annotations

import torch
from torch import nn

from ane_trainer.ane.dispatch import StepOptions, resolve_target
from ane_trainer.ane.dispatch.loading import Subject
from ane_trainer.training.debugging import debug_step
from ane_trainer.training.debugging.remedies import Bench
from ane_trainer.training.debugging.trials import REWRITES, Way


class Squares(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squared: torch.Tensor = (super().forward(x) * 300) ** 2
        return squared


def test_the_loss_is_named_and_a_smaller_one_heals() -> None:
    torch.manual_seed(0)
    net, x, y = Squares(16, 3), torch.randn(8, 16), torch.randn(8, 3)
    subject = Subject(net, "mse", torch.optim.Adam(net.parameters(), 1e-3), (x, y))
    bench = Bench(subject, resolve_target("sim", "m4", "exact"))
    report = debug_step("Squares", bench, Way(StepOptions(seed=0), frozenset(REWRITES)))
    assert report.verdict == "departs"
    (fault,) = report.faults
    assert (fault.op, fault.rule) == ("loss", "overflow")
    assert fault.remedy is not None
    assert "divide the loss by" in fault.remedy.how
    assert fault.remedy.after.update is not None
    assert fault.remedy.after.update < 0.01
