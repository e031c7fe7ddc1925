"""Steps whose gradients do not fit their units: blamed on the loss, or on what made them too large."""

from __future__ import annotations

import torch
from torch import nn

from ane_trainer.ane.dispatch import StepOptions, resolve_target
from ane_trainer.ane.dispatch.loading import Subject
from ane_trainer.training.debugging import Report, debug_step
from ane_trainer.training.debugging.remedies import Bench
from ane_trainer.training.debugging.trials import REWRITES, Way


class Squares(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squared: torch.Tensor = (super().forward(x) * 300) ** 2
        return squared


def _report(net: nn.Module, loss: str, x: torch.Tensor, y: torch.Tensor) -> Report:
    subject = Subject(net, loss, torch.optim.Adam(net.parameters(), 1e-3), (x, y))
    bench = Bench(subject, resolve_target("sim", "m4", "exact"))
    return debug_step("step", bench, Way(StepOptions(seed=0), frozenset(REWRITES)))


def test_the_loss_is_named_and_a_smaller_one_heals() -> None:
    torch.manual_seed(0)
    report = _report(Squares(16, 3), "mse", torch.randn(8, 16), torch.randn(8, 3))
    assert report.verdict == "departs"
    (fault,) = report.faults
    assert (fault.op, fault.rule) == ("loss", "overflow")
    assert fault.remedy is not None
    assert "divide the loss by" in fault.remedy.how
    assert fault.remedy.after.update is not None
    assert fault.remedy.after.update < 0.01


class Written(nn.Module):
    """A norm whose variance is a difference of squares: without digits it is clamped to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.first(x) + 100
        mean = rows.mean(-1, keepdim=True)
        variance = rows.square().mean(-1, keepdim=True) - mean.square()
        return self.head((rows - mean) / (variance.clamp_min(0) + 1e-2).sqrt())


def test_gradients_that_a_remedy_makes_far_smaller_count_as_well() -> None:
    """Their unit was chosen for the wrong ones, and each remedy was said to leave an update that is skipped."""
    torch.manual_seed(0)
    report = _report(Written(), "cross_entropy", torch.randn(128, 8), torch.randint(4, (128,)))
    first = report.faults[0]
    assert (report.verdict, first.rule, first.op) == ("departs", "cancellation", "sub")
    healing = {remedy.name for remedy in first.remedies if remedy.heals}
    assert "variance" in healing
    assert not any(remedy.after.note for remedy in first.remedies)
