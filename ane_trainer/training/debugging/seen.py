"""A run that was looked at, op by op, with the search for who is to blame."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from ane_trainer.ane.capture.gradients import FLOORS
from ane_trainer.ane.capture.range.editing import UPDATE
from ane_trainer.ane.capture.scaling import SCALING
from ane_trainer.ane.mil.program import Function, Op
from ane_trainer.ane.simulator import make_context
from ane_trainer.ane.stages import Compiled
from ane_trainer.ane.verify.accuracy import Accuracy, examine, phase_inputs
from ane_trainer.ane.verify.faults import HELP
from ane_trainer.ane.verify.lockstep import Lockstep
from ane_trainer.training.debugging.remedies import Bench, of_forms
from ane_trainer.training.debugging.report import Fault, OpLine, Place, Remedy
from ane_trainer.training.debugging.scores import OutputCriterion
from ane_trainer.training.debugging.search import Criterion, Culprit, Search
from ane_trainer.training.debugging.trials import Trial
from ane_trainer.utils import return_memory

#: Forms of one op that are tried.
_MOST_FORMS = 5

Options = Callable[[Sequence[Culprit]], Iterator[Remedy]]


def no_options(culprits: Sequence[Culprit]) -> Iterator[Remedy]:
    """Where nothing but the op's own form can change."""
    return iter(())


class Seen:
    """A run that was looked at: its ops, and the search for who is to blame."""

    def __init__(
        self,
        run: Lockstep,
        criterion: Criterion,
        phases: Callable[[Op], str],
        accuracy: Accuracy | None = None,
    ) -> None:
        self.run, self.criterion, self.phases = run, criterion, phases
        self.accuracy: Accuracy = examine(run) if accuracy is None else accuracy
        self.search = Search(run, self.accuracy, criterion, phases)

    @classmethod
    def of_trial(cls, trial: Trial, bench: Bench) -> Seen:
        """The program of a trial as it ran."""
        compiled = trial.compiled
        assert compiled is not None
        context = make_context(compiled.chip, "exact", bench.target.threads, bench.target.path)
        keep = trial.criterion.needs if trial.criterion is not None else None
        # A floor tells the host to choose other units: what is healed may have far smaller gradients than what ran.
        feeds = {**trial.feeds, **{name: 0 * array for name, array in trial.feeds.items() if name == FLOORS}}
        run = Lockstep(compiled.program.main, feeds, context, trial.exact, keep)
        criterion: Criterion = trial.criterion or OutputCriterion(compiled.program.main)
        found = cls(run, criterion, step_phases(compiled))
        return_memory()  # of every op's numbers in double precision
        return found

    def lines(self) -> tuple[OpLine, ...]:
        """Every op's numbers with place and direction."""
        ops = {v.name: op for unit in self.run.units for op in unit.own for v in op.results}
        return tuple(
            OpLine(Place.of(found.profile.source, found.name), self.phases(ops[found.name]), found)
            for found in self.accuracy.ops
        )

    def faults(self, options: Options, forms: bool = True) -> tuple[Fault, ...]:
        """Who is to blame, each with what was tried."""
        culprits = self.search.culprits()
        if not culprits:
            return ()
        of_step: list[Remedy] = []
        for remedy in options(culprits):
            of_step.append(remedy)
            if remedy.heals:
                break
        found = []
        for culprit in culprits:
            others = frozenset().union(*(c.suspect.units for c in culprits if c is not culprit))
            tried: list[Remedy] = []
            if forms:
                before = dataclasses.replace(
                    culprit, before=self.search.score(others) if others else culprit.before
                )
                for remedy in itertools.islice(
                    of_forms(self.run, self.accuracy, self.criterion, before, others), _MOST_FORMS
                ):
                    if not (remedy.heals and any(r.heals and r.name == remedy.name for r in tried)):
                        tried.append(remedy)
            remedies = sorted(
                (*of_step, *tried), key=lambda r: (not r.heals, 0.0 if r.heals else r.after.worst)
            )
            found.append(_fault(culprit, remedies))
        return tuple(found)


def _fault(culprit: Culprit, remedies: Sequence[Remedy]) -> Fault:
    suspect, op = culprit.suspect, culprit.suspect.op
    return Fault(
        op.kind, op.name, Place.of(op.profile.source, op.name), suspect.phase, suspect.fault.rule, suspect.fault.facts,
        culprit.before, culprit.after, culprit.alone, suspect.more, tuple(remedies),
        advice="" if any(r.heals for r in remedies) else HELP[suspect.fault.rule],
    )  # fmt: skip


def step_phases(compiled: Compiled) -> Callable[[Op], str]:
    """Op -> its direction: what depends on the loss scale is backward, or the optimizer where its place says so."""
    seeds = [port.name for port in compiled.inputs if port.target == f"{SCALING}loss_scale"]
    reached = phase_inputs(compiled.program.main, seeds)

    def phase(op: Op) -> str:
        source = op.source or ""
        if source.startswith(UPDATE):
            return "optimizer"
        if op.name in reached:
            return "backward"
        return "loss" if source.startswith("loss ") else "forward"

    return phase


def program_phases(function: Function) -> Callable[[Op], str]:
    """Directions of a program that holds a training step; of another none."""
    known = any((op.source or "").startswith(UPDATE) for op in function.ops)

    def phase(op: Op) -> str:
        source = op.source or ""
        if not known:
            return ""
        return (
            "optimizer" if source.startswith(UPDATE) else "loss" if source.startswith("loss ") else "forward"
        )

    return phase
