"""`debug` names the operation at which plain PyTorch itself leaves the numbers, and what is 0 in fp16 unseen."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer.training.debugging.report import Report
from tests.training.debugging.faulty import Base
from tests.training.debugging.test_debugging import report_of


class MaskedRow(Base):
    """Attention over features, whose first row a mask leaves nothing of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        mask = torch.ones(32, 32).tril(-1)
        scores = (h[:, :, None] * h[:, None, :]).masked_fill(mask == 0, -math.inf)
        return self.b((scores.softmax(-1) * h[:, None, :]).sum(-1))


class Ratio(Base):
    """Odds of a tanh that is 1 for large operands."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = torch.tanh(self.a(x) * 60)
        return self.b(torch.log((1 + t) / (1 - t)))


class Steep(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x))) * 2000


class VanishedScale(Base):
    """A branch whose scale is below what fp16 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((32,), 1e-8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(h + torch.tanh(h) * self.scale)


class SmallEpsilon(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.a(x))
        return self.b(h / (h.sum(-1, keepdim=True) + 1e-9))


class Deviation(Base):
    """A variance as a difference of near numbers, whose root is a denominator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x) + 25
        mean = h.mean(1, keepdim=True)
        return self.b((h - mean) / (h.square().mean(1, keepdim=True) - mean.square()).sqrt())


def likelihood(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A logarithm of probabilities, some of which are 0."""
    return -torch.log(output.softmax(-1))[torch.arange(len(target)), target].mean()


def _fault(report: Report, kind: str = "faults") -> tuple[str, str, str]:
    fault = getattr(report, kind)[0]
    assert "test_undefined.py:" in fault.place.line
    assert fault.advice
    return fault.rule, fault.op, fault.phase


@pytest.mark.parametrize(
    ("model", "loss", "op", "phase", "says"),
    [
        (MaskedRow, "cross_entropy", "softmax", "forward", "8 of its rows are -inf throughout"),
        (Ratio, "cross_entropy", "div", "forward", "it divides by 0"),
        (Steep, likelihood, "log", "loss", "its operand is 0"),
    ],
)
def test_where_pytorch_leaves_the_numbers(
    model: type[nn.Module], loss: object, op: str, phase: str, says: str
) -> None:
    report = report_of(model, loss)
    assert report.verdict == "departs"
    assert _fault(report) == ("undefined", op, phase)
    assert says in report.faults[0].facts


def test_what_would_help_is_tried_in_pytorch() -> None:
    assert "With that plain PyTorch's loss is 1." in report_of(MaskedRow).faults[0].advice


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (VanishedScale, ("underflow", "mul", "forward")),
        (SmallEpsilon, ("constant", "add", "forward")),
    ],
)
def test_numbers_that_are_0_in_fp16_are_told_though_the_step_agrees(
    model: Callable[[], nn.Module], found: tuple[str, str, str]
) -> None:
    report = report_of(model)  # type: ignore[arg-type]
    assert report.agrees
    assert _fault(report, "lost") == found


def test_of_one_line_the_cause_is_named_and_not_what_follows_from_it() -> None:
    report = report_of(Deviation)
    assert (report.faults[0].rule, report.faults[0].op) == ("cancellation", "sub")
    assert any(remedy.heals for remedy in report.faults[0].remedies)
