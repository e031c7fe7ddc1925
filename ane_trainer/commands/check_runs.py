"""Steps of one model for several chips: captured once, and run once for all chips of the same arithmetic."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ane_trainer.ane.errors import NumericsWarning
from ane_trainer.commands.batches import fitting
from ane_trainer.commands.hazards import hazards
from ane_trainer.commands.subjects import ModelSubject
from ane_trainer.commands.verdicts import Problem

if TYPE_CHECKING:
    from ane_trainer.ane.capture import StepCapture
    from ane_trainer.ane.capture.range.switch import Made
    from ane_trainer.ane.chips.lookup import Chip
    from ane_trainer.ane.dispatch import TrainingStep
    from ane_trainer.ane.dispatch.agreement import Agreement
    from ane_trainer.ane.mil.program import Program

#: Examples that are run, at most, where the whole batch is more than LIGHT of what is quickly run. Legality is checked
#: for the whole batch; gradients of a sum over it grow with it.
_RUN_BATCH, _LIGHT = 8, 0.1
#: What to do about a loss that is nan.
_UNDEFINED = "Look for logarithms and roots of negative numbers, and for 0 / 0."
#: Steps on the batch until one changes the weights: a loss scale that starts too high falls meanwhile.
_TRIES = 8
#: Steps after it: an update may carry a value out of the range that the example set.
_FURTHER = 2
#: What makes gradients smaller that fit into no unit; and for SGD, whose units follow the learning rate.
_SMALLER = (
    "Divide the loss by a power of two, or normalise outputs and targets.",
    "Lower the learning rate, or normalise outputs and targets.",
)
#: What keeps a value in the range that the example set.
_NEARER = "Lower the learning rate, or start the weights there nearer to the size that an update gives them."
_SIMULATED = "simulated, exact arithmetic"


@dataclass(frozen=True)
class Outcome:
    """One run of a step: how it agrees with fp32, in words, and the problems that it showed."""

    words: str
    problems: tuple[Problem, ...]


class CheckRuns:
    """A model's steps for the chips that are asked about."""

    def __init__(self, subject: ModelSubject, path: str, run: bool) -> None:
        self.subject, self.path, self.runs = subject, path, run
        self._made: tuple[Made, ...] = ()
        self._capture: StepCapture | None = None
        self._few: ModelSubject | None = None
        self._few_capture: StepCapture | None = None
        self._known: list[tuple[Program, object, Outcome]] = []

    def step(self, chip: Chip) -> tuple[TrainingStep, tuple[Made, ...]]:
        """The step for a chip and the whole batch, and the rewrites that it took."""
        from ane_trainer.ane.capture.range.switch import REWRITES, limited_to

        verify = "first" if self.runs else "off"
        with limited_to(REWRITES) as made:
            step = self.subject.step(chip.name, self.path, verify, self._capture)
        if self._capture is None:
            self._capture, self._made = step.capture, tuple(made)
        return step, self._made

    @property
    def few(self) -> ModelSubject:
        """The subject with the examples that are run."""
        if self._few is None:
            subject, whole = self.subject, self.subject.request.batch
            most = min(whole, _RUN_BATCH)
            if whole > most and _quick(subject, whole, _LIGHT) == whole:
                most = whole
            elif most > 2:
                most = _quick(subject, most)
            self._few = subject.with_batch(most)
        return self._few

    def outcome(self, step: TrainingStep, chip: Chip) -> Outcome:
        """Run the chip's step on few examples, or recall the run of a chip that computes the same."""
        few = self.few
        if few is self.subject:
            return self._recalled(step, chip)
        small = few.step(chip.name, self.path, "first", self._few_capture)
        self._few_capture = small.capture
        try:
            return self._recalled(small, chip)
        finally:
            small.discard()

    def _recalled(self, step: TrainingStep, chip: Chip) -> Outcome:
        from ane_trainer.ane.simulator.kernels.integer import FIRST_GENERATION

        numbers = (chip.width_slice_clamp, chip.winograd, chip.generation_number >= FIRST_GENERATION)
        for program, arithmetic, outcome in self._known:
            if arithmetic == numbers and program == step.program:
                return outcome
        found = tuple(hazards(self.few, step, chip.name))
        words, wrong = _agreement(self.few, step, bool(found))
        outcome = Outcome(words, (*wrong, *found))
        self._known.append((step.program, numbers, outcome))
        return outcome

    @property
    def sampled(self) -> str:
        """What of the batch was looked at, in words."""
        whole, request = self.subject.request.batch, self.subject.request
        legal = f"checked for batches of {whole}"
        if request.chosen:
            legal += f" ({request.chosen})"
        if not self._known:
            return f"{legal}; nothing was run."
        run = self.few.request.batch
        examples = "all of them" if run == whole else f"the first {run}"
        random = " (random numbers)" if request.where == "check" else ""
        return f"{legal}, run once on {examples}{random}."


def _quick(subject: ModelSubject, most: int, work: float = 1.0) -> int:
    """Examples that are quickly run, of those that there are."""
    import torch

    from ane_trainer.ane.capture.calibrate import module_mode

    x = subject.with_batch(2).example[0]
    inputs = x if isinstance(x, tuple) else (x,)
    if not all(isinstance(part, torch.Tensor) for part in inputs):
        return most
    with torch.random.fork_rng(devices=[]), module_mode(subject.model, training=False):
        return fitting(subject.model, inputs, most, work)


def _agreement(subject: ModelSubject, step: TrainingStep, told: bool) -> tuple[str, list[Problem]]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", NumericsWarning)
        for _ in range(_TRIES):
            step(*subject.example)
            if step.applied_steps:
                break
        applied, found = step.applied_steps, step.agreement
        for _ in range(_FURTHER if applied and (found is None or found.agrees) else 0):
            step(*subject.example)
    skipped = next((str(w.message) for w in warned if "skipped" in str(w.message)), "gradients overflow")
    if not applied and (found is None or found.agrees):
        reason = f"{_TRIES} steps on this batch changed no weight: {_cause(skipped)}"
        return "every update is skipped", [_stuck(reason, _SMALLER[subject.request.optimizer == "sgd"])]
    if applied and step.applied_steps == applied and (found is None or found.agrees):
        reason = f"after the first update, which {found}, every one is skipped: {_cause(skipped)}"
        return "later updates are skipped", [_stuck(reason.replace("which None, ", ""), _NEARER)]
    if found is None:
        return "fp32 itself cannot run it", []
    return str(found), [] if found.agrees else [_departs(found, told)]


def _departs(found: Agreement, told: bool) -> Problem:
    """A first step that is not fp32's; `told`: there are notes of numbers that leave the range."""
    if math.isnan(found.loss):
        return Problem(
            "agreement", "warning", "loss", "numbers", f"{found}: the engine has no nan.", _UNDEFINED
        )
    where = "step" if found.first is None else str(found.first)
    fix = "`ane-trainer debug` finds the op and tries remedies."
    if told:
        fix = f"See the notes below; keep the values there in range, or normalise before. {fix}"
    return Problem("agreement", "warning", where, "numbers", f"{found}.", fix, _SIMULATED)


def _stuck(reason: str, fix: str) -> Problem:
    return Problem("agreement", "warning", "step", "gradients", reason, fix, _SIMULATED)


def _cause(text: str) -> str:
    """What a step says of an update that it skipped, without its advice."""
    return f"{text.partition(' The update')[0].rstrip('.')}."
