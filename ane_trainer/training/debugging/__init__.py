"""The accuracy debugger: which op of a training step or program departs from full precision, why, and what heals it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, overload

from ane_trainer.ane.capture.range.switch import REWRITES
from ane_trainer.ane.dispatch import TrainingStep
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Program
from ane_trainer.training.debugging.analysis import debug_function, debug_step
from ane_trainer.training.debugging.remedies import Bench
from ane_trainer.training.debugging.report import Fault, Remedy, Report
from ane_trainer.training.debugging.scores import Score
from ane_trainer.training.debugging.trials import Way

__all__ = ["Fault", "Remedy", "Report", "Score", "debug", "debug_function", "debug_step"]


@overload
def debug(step: TrainingStep, x: object, y: object, *, rewrites: bool = True) -> Report: ...
@overload
def debug(step: Program, x: Mapping[str, Any], *, chip: str = "m4", path: str | None = "e5rt") -> Report: ...
def debug(
    step: TrainingStep | Program, x: Any, y: object = None, *, rewrites: bool = True, chip: str = "m4",
    path: str | None = "e5rt",
) -> Report:  # fmt: skip
    """Find the op where a training step departs from fp32 on the batch (x, y), and what heals it.

    step      of `compile_step`, as it stands: its weights and state are copied, nothing of it changes.
    rewrites  False: without the range pass's rewrites, to see what they heal.

    Or of a program: `debug(program, {"input": array, ...}, chip="m1")`, against double precision.

    The report says verdict, faults with module, line and remedies (each measured), and every op's numbers;
    `print(report)` shows a tree, `report.as_html()` is a page. Runs on the simulator, exactly, a few times the step.

    UsageError for a step that is no single program (divided, or partly on the CPU).
    """
    if isinstance(step, Program):
        return debug_function("program", step, x, chip, path)
    if not isinstance(step, TrainingStep) or len(step.programs) > 1:
        raise UsageError(
            f"debug: needs a step of one program, or a program; got {type(step).__name__}. "
            'Compile it with blocks="off", shards=0 and fallback="none".',
            code="ANE104",
        )
    subject = dataclasses.replace(step.subject, example=(x, y))
    target = dataclasses.replace(step.target, device="sim", fidelity="exact", precision="fp16")
    state = step.state_dict() if step.steps else None
    options = dataclasses.replace(step.options, gradients=step.gradient_options)
    if options.seed is None:
        options = dataclasses.replace(options, seed=0)
    way = Way(options, frozenset(REWRITES) if rewrites else frozenset())
    return debug_step(type(subject.model).__name__, Bench(subject, target, state), way)
