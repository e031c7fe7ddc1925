"""`debug` on programs, in which nothing was rewritten: the op, the rule and a remedy that heals when applied."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import ane_trainer as at
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Value
from tests.training.debugging.programs import PLANTED, program_of, sliced, tiny


def fed(program: object) -> dict[str, np.ndarray]:
    shape = program.main.inputs[0].type.shape  # type: ignore[attr-defined]
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float16)}


@pytest.mark.parametrize("make", PLANTED, ids=lambda make: make.__name__)
def test_the_op_and_the_remedy_are_found(make: Callable[[Builder], Value]) -> None:
    rule, remedy, chip = PLANTED[make]
    program = program_of(make)
    report = at.debug(program, fed(program), chip=chip)
    assert report.verdict == "departs"
    fault = report.faults[0]
    assert (fault.name, fault.rule) == ("fault", rule)
    healing = [r.name for r in fault.remedies if r.heals]
    assert remedy in healing, fault.remedies
    assert "heals" in report.as_text()


def test_another_chip_may_heal_a_slice_that_clamps() -> None:
    program = program_of(sliced)
    report = at.debug(program, fed(program), chip="m1")
    assert "M4" in next(r.how for r in report.faults[0].remedies if r.name == "chip")
    assert at.debug(program, fed(program), chip="m4").agrees


def test_what_is_carried_stays_in_range_with_larger_numbers() -> None:
    """The power of two is chosen from the true magnitudes, not from what the fault left of them."""
    program = program_of(tiny)
    fault = at.debug(program, fed(program)).faults[0]
    carry = next(r for r in fault.remedies if r.name == "carry")
    assert carry.after.output is not None
    assert carry.after.output < 1e-3
