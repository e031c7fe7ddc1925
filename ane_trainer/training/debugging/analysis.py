"""Debugs a step or a program: runs it, looks at every op, finds who is to blame, tries what heals."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ane_trainer.ane.capture.range.switch import REWRITES
from ane_trainer.ane.chips.lookup import get_chip, known_chips
from ane_trainer.ane.mil.program import Function, Program
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import make_context, refusal
from ane_trainer.ane.simulator.states import without_states
from ane_trainer.ane.verify.faults import HELP, VANISHED
from ane_trainer.ane.verify.lockstep import Lockstep
from ane_trainer.ane.verify.profiling import distance
from ane_trainer.training.debugging.refusals import refusals
from ane_trainer.training.debugging.remedies import Bench, of_options
from ane_trainer.training.debugging.report import Fault, OpLine, Place, Remedy, Report
from ane_trainer.training.debugging.scores import OutputCriterion, Score
from ane_trainer.training.debugging.search import Culprit
from ane_trainer.training.debugging.seen import Seen, no_options, program_phases
from ane_trainer.training.debugging.skipped import skipped
from ane_trainer.training.debugging.trials import ADDED, NOT_FINITE, Constant, Trial, Way
from ane_trainer.training.debugging.undefined import undefined

_TOGETHER = "no single op is to blame: what the ops below lose adds up"


#: Half a unit in fp16's last place, relative; and by how much an error grows at an op that is told as sensitive.
_UNIT, _GROWTH = 2.0**-11, 20.0
#: Losses without harm that are told.
_MOST_LOST = 3


def debug_step(name: str, bench: Bench, way: Way) -> Report:
    """The report of a training step, tried as `way` says.

    Where the step agrees and the range pass rewrote it, it is tried without the rewrites, too, to tell what they heal.
    """
    started = time.perf_counter()
    trial = bench.attempt(way)
    chip = get_chip(bench.target.chip or "m4").title
    report = Report(name, chip, "agrees", trial.score, "fp32", seconds_step=trial.seconds)
    if trial.refused is not None:
        faults = refusals(bench, trial)
        return dataclasses.replace(
            report, verdict="refused", faults=faults, seconds=time.perf_counter() - started
        )
    seen = Seen.of_trial(trial, bench)
    report = dataclasses.replace(report, ops=seen.lines())
    if trial.score.note == NOT_FINITE and (faults := undefined(bench.subject)):
        report = dataclasses.replace(report, verdict="departs", faults=faults)
    elif not trial.score.agrees:
        faults = seen.faults(lambda culprits: of_options(bench, trial, *_kinds(culprits)))
        beyond = () if faults else skipped(bench, trial, seen.search.best)
        if beyond:
            faults = beyond
        elif numbers := _numbers(trial, seen):
            tried = () if faults else tuple(of_options(bench, trial, frozenset(["forward"]), frozenset()))
            faults = (*faults, *(dataclasses.replace(f, remedies=tried) for f in numbers))
        faults = faults or _sensitive(trial, seen)
        report = dataclasses.replace(
            report, verdict="departs", faults=faults, notes=() if faults else (_TOGETHER,)
        )
    else:
        costs = _costs(trial, seen)
        healed = _healed(bench, way, trial) if trial.made and way.rewrites else ()
        report = dataclasses.replace(
            report, costs=costs, healed=healed, lost=_lost(trial, seen, (*costs, *healed))
        )
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _sensitive(trial: Trial, seen: Seen) -> tuple[Fault, ...]:
    """Where no op loses much by itself: the line at which what its operands are off by grows most."""
    grown: list[tuple[float, OpLine]] = []
    for line in seen.lines():
        found, total = line.accuracy, line.accuracy.profile.total.relative
        growth = min(total, 10.0) / max(found.before, _UNIT)
        if line.phase in ("forward", "loss") and line.place.line and growth >= _GROWTH and total >= VANISHED:
            grown.append((growth, line))
    most = max((growth for growth, _ in grown), default=0.0)
    first = next((line for growth, line in grown if growth >= most / 2), None)
    if first is None:
        return ()
    found, total = first.accuracy, min(first.accuracy.profile.total.relative, 10.0)
    facts = f"its operands are off by {100 * found.before:.2g} %, its result by {100 * total:.2g} %"
    fault = Fault(found.profile.kind, found.name, first.place, first.phase, "sensitive", facts, trial.score)
    return (dataclasses.replace(fault, advice=HELP["sensitive"]),)


def _numbers(trial: Trial, seen: Seen) -> tuple[Fault, ...]:
    """Inputs and constants that do not fit into fp16, where they make the result depart."""
    found = []
    if not seen.search.best.agrees:
        for constant in dict.fromkeys(trial.constants):
            found.append(_constant(constant, trial.score))
    compiled = trial.compiled
    batch = {p.name for p in compiled.inputs if p.role == "batch"} if compiled is not None else set()
    for name, score in seen.search.inputs(batch):
        facts = f"its rounding to fp16 alone leaves {score}"
        advice = "Centre and scale it on the host, or feed it in two parts, say whole and rest."
        found.append(Fault("input", name, Place(name), "", "input", facts, trial.score, advice=advice))
    return tuple(found)


def _constant(constant: Constant, score: Score) -> Fault:
    advice = HELP["constant"]
    if constant.half == 0.0:
        advice = "Take a larger one (an epsilon from 1e-5 on), or scale what it meets."
    elif constant.op in ADDED and math.isfinite(constant.half):
        advice = "Take from it what does not count (whole periods of a sine, a common offset), or add it in two parts."
    facts = f"fp16 has {constant.half:.6g} for the number {constant.number:.6g}"
    place = Place.of(constant.where, constant.op)
    return Fault(constant.op, constant.op, place, "forward", "constant", facts, score, advice=advice)


def _costs(trial: Trial, seen: Seen) -> tuple[Fault, ...]:
    """Where fp16's own rounding costs more than usual, in a step that agrees as far as fp16 goes."""
    if trial.criterion is None or trial.criterion.official is None or trial.score.worst <= 1.0:
        return ()
    strict = Seen(seen.run, trial.criterion.strict(), seen.phases, seen.accuracy)
    if strict.search.before.agrees:
        return ()
    return (*strict.faults(no_options), *_numbers(trial, strict))


def _lost(trial: Trial, seen: Seen, told: Sequence[Fault]) -> tuple[Fault, ...]:
    """Ops of the forward pass or the loss that lose numbers which nothing needs today, where nothing else is told.

    A norm that works on rows in a power of two loses its epsilon where that has no weight: it is left out.
    """
    known = {fault.place.line for fault in told}
    known |= {Place.of(made.where, "").line for made in trial.made if made.rewrite == "norms"}
    found = []
    for suspect in seen.search.suspects(VANISHED):
        op, place = suspect.op, Place.of(suspect.op.profile.source, suspect.op.name)
        if suspect.phase in ("forward", "loss") and place.line and place.line not in known:
            found.append(Fault(
                op.kind, op.name, place, suspect.phase, suspect.fault.rule, suspect.fault.facts, trial.score,
                more=suspect.more, advice=HELP[suspect.fault.rule],
            ))  # fmt: skip
    known |= {fault.place.line for fault in found}
    found += [fault for fault in _vanished(trial, seen) if fault.place.line not in known]
    return tuple(found[:_MOST_LOST])


def _vanished(trial: Trial, seen: Seen) -> Iterator[Fault]:
    """Weights, and numbers in the code, that are 0 in fp16 though they are none."""
    run, phase = seen.run, seen.phases
    for value in run.function.inputs:
        if value.name not in (run.given_exact or {}):
            continue
        exact = run.exact_feed(value.name)
        lost = distance(run.feed(value.name), exact).relative
        readers = (op for op in run.function.ops if value in op.operands() and phase(op) == "forward")
        if lost > 0.5 and np.any(exact) and (reader := next(readers, None)):
            facts = f"`{value.name}`, at most {np.abs(exact).max():.3g}, is off by {100 * lost:.2g} % in fp16"
            place = Place.of(reader.source, reader.name)
            yield Fault(
                reader.kind, value.name, place, "forward", "underflow", facts, trial.score, advice=HELP["underflow"]
            )  # fmt: skip
    for constant in dict.fromkeys(trial.constants):
        if constant.half == 0.0 and (place := Place.of(constant.where, constant.op)).line:
            yield _constant(constant, trial.score)


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
        how = f"rewrites {' and '.join(names)} together"
        remedies.append(Remedy("rewrites", how, bare.score, trial.score))
    seen = Seen.of_trial(bare, bench)
    found = seen.faults(no_options, forms=False) or _numbers(bare, seen) or _first_made(trial, bare)
    return tuple(dataclasses.replace(f, remedies=tuple(remedies), advice="") for f in found)


def _first_made(trial: Trial, bare: Trial) -> tuple[Fault, ...]:
    """Where no single op is to blame, the place of the first rewrite."""
    made = trial.made[0]
    facts = "values out of fp16's range, none of which breaks it alone"
    return (Fault(made.op, made.op, Place.of(made.where, made.op), "", "underflow", facts, bare.score),)


def debug_function(
    name: str, program: Program, feeds: Mapping[str, Array], chip: str, path: str | None = None
) -> Report:
    """The report of any program on these feeds, against its meaning in double precision."""
    started = time.perf_counter()
    context = make_context(chip, "exact", None, path)
    refusal.check(program.main, context.chip, None)
    refused = {f.op for f in refusal.refused_ops(program.main, context.chip, path)}
    function, _ = without_states(program.main)
    run = Lockstep(function, _with_states(program.main, feeds), context)
    once = time.perf_counter()
    run.hybrid(lambda unit: False)
    seconds = time.perf_counter() - once
    seen = Seen(run, OutputCriterion(function), program_phases(function))
    score = seen.search.before
    faults = () if score.agrees else seen.faults(no_options)
    faults = tuple(_with_chips(fault, run, seen) for fault in faults)
    notes = [] if faults or score.agrees else [_TOGETHER]
    if refused:
        notes.append(
            f"by the path {path} the engine of {context.chip.title} refuses {', '.join(sorted(refused))}"
        )
    return Report(
        name, context.chip.title, "agrees" if score.agrees else "departs", score, "double precision", faults,
        ops=seen.lines(), notes=tuple(notes), seconds_step=seconds, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _with_states(function: Function, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds, states at zero where they are not given."""
    zeros = {v.name: np.zeros(v.type.shape, np.float16) for v in function.inputs if v.type.state}
    return zeros | {v.name: feeds[v.name] for v in function.inputs if v.name in feeds}


def _with_chips(fault: Fault, run: Lockstep, seen: Seen) -> Fault:
    """A slice that clamps: the first chip on which it does not."""
    if fault.rule != "clamped-slice":
        return fault
    for name in known_chips():
        chip = get_chip(name)
        if chip.width_slice_clamp is None:
            other = Lockstep(run.function, run.given, dataclasses.replace(run.engine.context, chip=chip))
            outputs, _ = other.hybrid(lambda unit: False)
            after = seen.criterion(outputs, seen.accuracy.outcome.exact)
            remedy = Remedy(
                "chip", f"run it on {chip.title} or later, whose slices are exact", fault.before, after
            )
            return dataclasses.replace(fault, remedies=(*fault.remedies, remedy))
    return fault


def _kinds(culprits: Sequence[Culprit]) -> tuple[frozenset[str], frozenset[str]]:
    """Directions and rules of faults."""
    return frozenset(c.suspect.phase for c in culprits), frozenset(c.suspect.fault.rule for c in culprits)
