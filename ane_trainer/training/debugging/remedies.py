"""What is tried against a fault, each on copies and measured: options of the step, rewrites, forms of the op itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ane_trainer.ane.capture import get_loss
from ane_trainer.ane.capture.range.switch import REWRITES
from ane_trainer.ane.dispatch import Target
from ane_trainer.ane.dispatch.loading import Subject
from ane_trainer.ane.errors import ProgramError, SimulationError
from ane_trainer.ane.mil.program import Function, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.verify.accuracy import Accuracy
from ane_trainer.ane.verify.lockstep import Lockstep
from ane_trainer.training.debugging.forms import Graph
from ane_trainer.training.debugging.report import Remedy
from ane_trainer.training.debugging.rewrites import rewrites_at
from ane_trainer.training.debugging.scores import Score
from ane_trainer.training.debugging.search import Criterion, Culprit
from ane_trainer.training.debugging.trials import Trial, Way, attempt
from ane_trainer.utils import return_memory

State = Mapping[str, torch.Tensor] | None


@dataclass(frozen=True)
class Bench:
    """What trials of a step need: what is trained, where, and the state that it continues from."""

    subject: Subject
    target: Target
    state: State = None

    def attempt(self, way: Way) -> Trial:
        """One trial; the memory of its step goes back to the system (of a model of 135 million weights, 1.5 GB)."""
        found = attempt(self.subject, self.target, way, self.state)
        return_memory()
        return found

    def with_loss(self, factor: float) -> Bench:
        """The same with the loss times a number."""
        loss = get_loss(self.subject.loss)

        def scaled(output: object, target: object) -> torch.Tensor:
            return loss(output, target) * factor

        return dataclasses.replace(self, subject=dataclasses.replace(self.subject, loss=scaled))


def of_options(bench: Bench, trial: Trial, phases: frozenset[str], rules: frozenset[str]) -> Iterator[Remedy]:
    """Options that a user can pass, where they may help in these directions against these faults."""
    way, before = trial.way, trial.score
    for name in sorted(frozenset(REWRITES) - way.rewrites):
        after = bench.attempt(dataclasses.replace(way, rewrites=way.rewrites | {name})).score
        yield Remedy(f"rewrite {name}", f"the range pass's rewrite `{name}`: {REWRITES[name]}", before, after)
    missing = frozenset(REWRITES) - way.rewrites
    if len(missing) > 1:
        after = bench.attempt(dataclasses.replace(way, rewrites=frozenset(REWRITES))).score
        yield Remedy("rewrites", "the range pass (on unless switched off)", before, after)
    options = way.options
    if options.loss_scale != "auto":
        after = bench.attempt(
            dataclasses.replace(way, options=dataclasses.replace(options, loss_scale="auto"))
        ).score
        yield Remedy("loss scale", 'leave loss_scale at "auto"', before, after)
    if "optimizer" in phases and options.optimizer_on != "host":
        host = dataclasses.replace(options, optimizer_on="host")
        after = bench.attempt(dataclasses.replace(way, options=host)).score
        yield Remedy("optimizer on host", 'update on the host: optimizer_on="host"', before, after)
    if phases & {"loss", "backward"} and rules & {"overflow", "accumulator"}:
        for power in (6, 12):
            after = bench.with_loss(2.0**-power).attempt(way).score
            how = (
                f"divide the loss by {2**power:,} (plain SGD: its steps shrink by as much), or take its mean"
            )
            yield Remedy("smaller loss", how, before, after)
            if after.agrees:
                break


def of_forms(
    run: Lockstep, accuracy: Accuracy, criterion: Criterion, culprit: Culprit, others: frozenset[str]
) -> Iterator[Remedy]:
    """Other forms of the op to blame, with the `others` in double precision meanwhile."""
    suspect = culprit.suspect
    makers = {v.name: op for op in run.function.ops for v in op.results}
    graph = Graph(run.function, {op.name: op for op in accuracy.ops})
    for rewritten in rewrites_at(graph, makers[suspect.op.name], suspect.fault.rule):
        after = rerun(rewritten.function, run, criterion, accuracy, others)
        if after is not None:
            yield Remedy(rewritten.name, rewritten.how, culprit.before, after)


def rerun(
    function: Function, run: Lockstep, criterion: Criterion, accuracy: Accuracy, others: frozenset[str]
) -> Score | None:
    """The score of a rewritten function on the same feeds; None where it cannot run."""
    try:
        keep = {new.name for old, new in _pairs(function, run) if old.name in run.keep}
        again = Lockstep(function, run.given, run.engine.context, run.given_exact, keep)
        outputs, _ = again.hybrid(lambda unit: unit.name in others)
        exact = accuracy.outcome.exact
        if any(a.dtype == np.float64 and not np.isfinite(a).all() for a in exact.values()):
            new, _ = again.hybrid(lambda unit: True)  # the program had no numbers to compare with
            exact = _renamed(new, function, run)
    except (ProgramError, SimulationError):
        return None
    return criterion(_renamed(outputs, function, run), exact)


def _pairs(function: Function, run: Lockstep) -> list[tuple[Value, Value]]:
    return list(zip(run.function.outputs, function.outputs, strict=True))


def _renamed(outputs: Mapping[str, Array], function: Function, run: Lockstep) -> dict[str, Array]:
    """The outputs of a rewritten function by the names of the original."""
    return {old.name: outputs[new.name] for old, new in _pairs(function, run) if old.name in run.keep}
