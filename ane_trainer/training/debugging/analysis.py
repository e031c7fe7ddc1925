"""Debugs a step or a program: runs it, looks at every op, finds who is to blame, tries what heals."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence

from ane_trainer.ane.capture.range.editing import UPDATE
from ane_trainer.ane.capture.range.switch import REWRITES
from ane_trainer.ane.capture.scaling import SCALING
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.dispatch import StepOptions
from ane_trainer.ane.errors import AneTrainerError, UnsupportedModel
from ane_trainer.ane.errors import Finding as Refusal
from ane_trainer.ane.mil.program import Function, Op, Program
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import make_context, refusal
from ane_trainer.ane.simulator.states import without_states
from ane_trainer.ane.stages import Compiled
from ane_trainer.ane.verify.accuracy import Accuracy, examine, phase_inputs
from ane_trainer.ane.verify.lockstep import Lockstep
from ane_trainer.training.debugging.remedies import Bench, of_forms, of_options
from ane_trainer.training.debugging.report import Fault, OpLine, Place, Remedy, Report
from ane_trainer.training.debugging.scores import OutputCriterion, Score
from ane_trainer.training.debugging.search import Criterion, Culprit, Search
from ane_trainer.training.debugging.trials import Trial, Way

#: Forms of one op that are tried.
_MOST_FORMS = 5


def debug_step(name: str, bench: Bench, way: Way) -> Report:
    """The report of a training step, tried as `way` says.

    Where the step agrees and the range pass rewrote it, it is tried without the rewrites, too, to tell what they heal.
    """
    started = time.perf_counter()
    trial = bench.attempt(way)
    chip = get_chip(bench.target.chip or "m4").title
    report = Report(name, chip, "agrees", trial.score, "fp32", seconds_step=trial.seconds)
    if trial.refused is not None:
        faults = tuple(_refusals(trial.refused, trial.score))
        return dataclasses.replace(report, verdict="refused", faults=faults)
    seen = _Seen.of_trial(trial, bench)
    report = dataclasses.replace(report, ops=seen.lines())
    if not trial.score.agrees:
        faults = seen.faults(lambda culprits: of_options(bench, trial, *_kinds(culprits)))
        notes = () if faults else ("no single op is to blame; the ops below add up",)
        report = dataclasses.replace(report, verdict="departs", faults=faults, notes=notes)
    elif trial.made and way.rewrites:
        report = dataclasses.replace(report, healed=_healed(bench, way, trial))
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _healed(bench: Bench, way: Way, trial: Trial) -> tuple[Fault, ...]:
    """What goes wrong without rewrites, and which one heals it."""
    names = sorted({made.rewrite for made in trial.made} & way.rewrites)
    bare = bench.attempt(dataclasses.replace(way, rewrites=frozenset()))
    if bare.score.agrees or bare.refused is not None:
        return ()
    remedies = []
    for name in names:
        after = trial.score
        if len(names) > 1:
            after = bench.attempt(dataclasses.replace(way, rewrites=frozenset({name}))).score
        remedies.append(Remedy(f"rewrite {name}", f"rewrite `{name}`: {REWRITES[name]}", bare.score, after))
    if not any(r.heals for r in remedies):
        remedies.append(
            Remedy("rewrites", f"rewrites {' and '.join(names)} together", bare.score, trial.score)
        )
    found = _Seen.of_trial(bare, bench).faults(lambda culprits: iter(()), forms=False)
    return tuple(dataclasses.replace(f, remedies=tuple(remedies)) for f in found)


def debug_function(
    name: str, program: Program, feeds: Mapping[str, Array], chip: str, path: str | None = None
) -> Report:
    """The report of any program on these feeds, against its meaning in double precision."""
    started = time.perf_counter()
    context = make_context(chip, "exact", None, path)
    refusal.check(program.main, context.chip, path)
    function, _ = without_states(program.main)
    states = {v.name for v in program.main.inputs if v.type.state}
    given = {
        v.name: feeds[v.name] if v.name in feeds else _zeros(function, v.name)
        for v in function.inputs
        if v.name in feeds or v.name in states
    }
    run = Lockstep(function, given, context)
    once = time.perf_counter()
    run.hybrid(lambda unit: False)
    seconds = time.perf_counter() - once
    seen = _Seen(run, OutputCriterion(function), _program_phases(function))
    score = seen.search.before
    faults = () if score.agrees else seen.faults(lambda culprits: iter(()))
    return Report(
        name, context.chip.title, "agrees" if score.agrees else "departs", score, "double precision", faults, (),
        seen.lines(), () if faults or score.agrees else ("no single op is to blame; the ops below add up",),
        seconds, time.perf_counter() - started,
    )  # fmt: skip


def _zeros(function: Function, name: str) -> Array:
    import numpy as np

    value = next(v for v in function.inputs if v.name == name)
    return np.zeros(value.type.shape, np.float16)


class _Seen:
    """A run that was looked at: its ops, and the search for who is to blame."""

    def __init__(self, run: Lockstep, criterion: Criterion, phases: Callable[[Op], str]) -> None:
        self.run, self.criterion, self.phases = run, criterion, phases
        self.accuracy: Accuracy = examine(run)
        self.search = Search(run, self.accuracy, criterion, phases)

    @classmethod
    def of_trial(cls, trial: Trial, bench: Bench) -> _Seen:
        """The program of a trial as it ran."""
        compiled = trial.compiled
        assert compiled is not None
        context = make_context(compiled.chip, "exact", bench.target.threads, bench.target.path)
        run = Lockstep(compiled.program.main, trial.feeds, context, trial.exact)
        criterion: Criterion = trial.criterion or OutputCriterion(compiled.program.main)
        return cls(run, criterion, step_phases(compiled))

    def lines(self) -> tuple[OpLine, ...]:
        """Every op's numbers with place and direction."""
        ops = {v.name: op for unit in self.run.units for op in unit.own for v in op.results}
        return tuple(
            OpLine(Place.of(found.profile.source, found.name), self.phases(ops[found.name]), found)
            for found in self.accuracy.ops
        )

    def faults(self, options: Callable[[Sequence[Culprit]], object], forms: bool = True) -> tuple[Fault, ...]:
        """Who is to blame, each with what was tried."""
        culprits = self.search.culprits()
        if not culprits:
            return ()
        of_step: list[Remedy] = []
        for remedy in options(culprits):  # type: ignore[attr-defined]
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
                    tried.append(remedy)
            tried.sort(key=lambda r: (not r.heals, r.after.worst))
            found.append(_fault(culprit, (*of_step, *tried)))
        return tuple(found)


def _fault(culprit: Culprit, remedies: Sequence[Remedy]) -> Fault:
    suspect, op = culprit.suspect, culprit.suspect.op
    return Fault(
        op.kind, op.name, Place.of(op.profile.source, op.name), suspect.phase, suspect.fault.rule, suspect.fault.facts,
        culprit.before, culprit.after, culprit.alone, suspect.more, tuple(remedies),
    )  # fmt: skip


def _kinds(culprits: Sequence[Culprit]) -> tuple[frozenset[str], frozenset[str]]:
    """Directions and rules of faults."""
    return frozenset(c.suspect.phase for c in culprits), frozenset(c.suspect.fault.rule for c in culprits)


def _refusals(error: AneTrainerError, score: Score) -> list[Fault]:
    if isinstance(error, UnsupportedModel):
        return [Fault.of_finding(finding, score) for finding in error.findings]
    where, _, rest = str(error.args[0]).partition(": ")
    reason, _, fix = rest.partition(". ")
    return [Fault.of_finding(Refusal(where, error.code, f"{reason}.", fix), score)]


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


def _program_phases(function: Function) -> Callable[[Op], str]:
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


def default_way(seed: int = 0) -> Way:
    """A step as it is built where nothing is said of it."""
    return Way(StepOptions(seed=seed))
