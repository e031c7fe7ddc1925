"""`debug` finds the op and the remedy in models with one planted fault each, and says little of healthy ones."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.dispatch import StepOptions, resolve_target
from ane_trainer.ane.dispatch.loading import Subject
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.verify.faults import HELP, RULES
from ane_trainer.training.debugging import Report, debug_step
from ane_trainer.training.debugging.remedies import Bench
from ane_trainer.training.debugging.trials import REWRITES, Way
from tests.training.debugging.faulty import CASES, Case, DeadScale, Fine, Heavy, Norm, Sines


def report_of(
    model: type[nn.Module], loss: object = "cross_entropy", rewrites: bool = True, chip: str = "m4"
) -> Report:
    torch.manual_seed(0)
    net, x, y = model(), torch.randn(8, 16), torch.randint(4, (8,))
    subject = Subject(net, loss, torch.optim.Adam(net.parameters(), 1e-3), (x, y))  # type: ignore[arg-type]
    way = Way(StepOptions(seed=0), frozenset(REWRITES) if rewrites else frozenset())
    return debug_step(model.__name__, Bench(subject, resolve_target("sim", chip, "exact")), way)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_op_and_the_remedy_are_found(case: Case) -> None:
    report = report_of(case.model, case.loss, case.rewrites)  # type: ignore[arg-type]
    assert report.verdict == "departs"
    fault = report.faults[0]
    assert (fault.rule, fault.op, fault.phase) == (case.rule, case.op, case.phase)
    assert "faulty.py:" in fault.place.line
    healing = {remedy.name: remedy for remedy in fault.remedies if remedy.heals}
    assert case.remedy in healing, fault.remedies
    assert healing[case.remedy].after.worst < report.score.worst
    assert all(len(line) <= 80 for line in report.as_text().splitlines())


def test_a_healthy_model_gets_a_short_answer() -> None:
    report = report_of(Fine)
    assert report.agrees
    assert (report.faults, report.healed, report.lost) == ((), (), ())
    assert len(report.as_text().splitlines()) <= 12
    assert {op.phase for op in report.ops} == {"forward", "loss", "backward", "optimizer"}


def test_what_the_range_pass_heals_is_told() -> None:
    report = report_of(Norm)
    assert report.agrees
    (fault,) = report.healed
    assert (fault.op, fault.rule) == ("mul", "overflow")
    assert [r.name for r in fault.remedies if r.heals] == ["rewrite norms"]
    assert "Healed by the range pass" in report.as_text()


def test_what_is_lost_without_harm_is_told_with_a_way_out() -> None:
    report = report_of(DeadScale)
    assert report.agrees
    (fault,) = report.lost
    assert (fault.op, fault.rule, fault.phase) == ("mul", "underflow", "forward")
    assert "faulty.py:" in fault.place.line
    assert "LayerScale" in fault.advice
    text = report.as_text()
    assert "Lost on the way, though loss and updates agree:" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "Lost on the way" in report.as_html()


def test_where_no_op_loses_much_the_line_at_which_errors_grow_is_named() -> None:
    report = report_of(Sines)
    assert report.verdict == "departs"
    (fault,) = report.faults
    assert (fault.rule, fault.op) == ("sensitive", "sin")
    assert "faulty.py:" in fault.place.line
    assert "remainder" in fault.advice


class Phase(Fine):
    """Adds a number of which fp16 has the next multiple of four: 3e-4 of it, and half a period of a sine."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sin(self.a(x) + 5001.25))


def test_a_constant_that_is_added_is_named_by_what_it_loses() -> None:
    """Every op is right, and the result 100 % off: it was said that no single op is to blame, and no more."""
    report = report_of(Phase)
    assert report.verdict == "departs"
    (fault,) = report.faults
    assert (fault.rule, fault.op) == ("constant", "add")
    assert fault.facts.startswith("fp16 has 500")
    assert fault.facts.endswith("for the number 5001.25")
    assert "whole periods" in fault.advice
    assert "test_debugging.py:" in fault.place.line


class Large(Fine):
    """A norm whose squares are beyond fp16; the update is skipped in double precision as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x) * 2000
        return self.b(h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-5))


def test_inputs_are_not_blamed_for_what_double_precision_does_too() -> None:
    report = report_of(Large, rewrites=False)
    assert report.verdict == "departs"
    assert [fault.rule for fault in report.faults] == ["overflow"]


def test_there_is_help_for_every_kind_of_fault() -> None:
    assert set(HELP) == set(RULES)


def test_weights_beyond_the_range_are_a_fault() -> None:
    report = report_of(Heavy)
    assert report.verdict == "refused"
    assert "a.weight" in report.as_text()


def test_a_users_step_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model, x, y = Fine(), torch.randn(8, 16), torch.randint(4, (8,))
    step = at.compile_step(
        model, "cross_entropy", torch.optim.Adam(model.parameters()), example=(x, y), seed=0
    )
    step(x, y)
    before = {name: value.clone() for name, value in step.state_dict().items()}
    weights = [p.clone() for p in model.parameters()]
    report = at.debug(step, x, y)
    assert report.agrees
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    after = step.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(UsageError, match="ANE104"):
        at.debug(model, x, y)  # type: ignore[call-overload]


def test_the_page_and_json_hold_everything() -> None:
    report = report_of(Norm, rewrites=False)
    page = report.as_html()
    assert page.startswith("<!doctype html>")
    assert "faulty.py:" in page
    assert "<svg" in page
    assert "http" not in page
    found = json.loads(json.dumps(report.to_json()))
    assert found["faults"][0]["remedies"][0]["heals"]
    assert len(found["ops"]) == len(report.ops)
