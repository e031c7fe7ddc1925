"""`check`: whether a training step runs on a chip and keeps to fp32, op by op, with evidence and the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.commands.check_runs import CheckRuns
from ane_trainer.commands.model_options import Asked, Blocks, Chips, names_of, takes_subject
from ane_trainer.commands.options import Output
from ane_trainer.commands.subjects import ModelSubject, ProgramSubject
from ane_trainer.commands.verdicts import ChipVerdict, OpCheck, Problem, Rewrite, Verdict
from ane_trainer.utils import format_bytes

if TYPE_CHECKING:
    from ane_trainer.ane.capture.range.switch import Made
    from ane_trainer.ane.chips.lookup import Chip
    from ane_trainer.ane.dispatch import TrainingStep
    from ane_trainer.ane.mil.program import Program

#: How many ops a note of legalization is about, and the size of the largest operand.
_COUNT, _MIB = re.compile(r"(\d+) ops? ha(?:ve|s)"), re.compile(r"has ([\d.]+) MiB")
#: Where a bound is known from, as legalization tells it.
_SOURCE = re.compile(r" on [^()]+ \((.+)\); got ")
#: A bound that a size breaks: the bound, and the size.
_LIMIT = re.compile(r"at (?:most|least) ([\d.e+]+).*; got (?:rank )?(\d+)")


@takes_subject
def check(
    asked: Asked,
    blocks: Blocks = "auto",
    chip: Chips = "m4",
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Run a step on the simulator against fp32.")
    ] = True,
    sarif: Annotated[
        str | None, typer.Option(help="Write the problems there as SARIF.", metavar="FILE")
    ] = None,
) -> Output:
    """Say whether a model trains on a chip, op by op, and what heals it where it does not.

    `trains`: every op is known to run there, and the first step keeps to fp32. `unproven`: nothing refuses it, but no
    source covers what is listed. `departs`: its numbers are not fp32's. `does not train`: it is refused. The last two
    end with exit code 3.
    """
    found = verdict_of(asked.resolved("check", blocks), names_of(chip), asked.route, run=run)
    if sarif is not None:
        file = Path(asked.subject.rpartition(":")[0])
        document = found.to_sarif([file] if file.suffix == ".py" else [])
        Path(sarif).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return Output(found.to_json(), found.as_text(), 0 if found.fits else 3)


def verdict_of(
    subject: ModelSubject | ProgramSubject, chips: Sequence[str], path: str, *, run: bool = True
) -> Verdict:
    """Check the subject for each chip; a model's step is compiled, and run once where `run` is set."""
    from ane_trainer.ane.chips.lookup import get_chip

    asked = [get_chip(name) for name in chips]
    if isinstance(subject, ProgramSubject):
        return Verdict(subject.name, tuple(_program_verdict(subject.program, chip, path) for chip in asked))
    runs = CheckRuns(subject, path, run)
    found = tuple(_chip_verdict(runs, chip) for chip in asked)
    return Verdict(subject.name, found, runs.sampled)


def _chip_verdict(runs: CheckRuns, chip: Chip) -> ChipVerdict:
    try:
        step, made = runs.step(chip)
    except UnsupportedModel as error:
        return ChipVerdict(chip.name, chip.title, _by_cause(map(_refusal, error.findings)))
    try:
        return replace(_step_verdict(runs, step, chip), rewrites=_rewrites(step, made))
    finally:
        step.discard()


def _refusal(finding: Finding) -> Problem:
    match = _SOURCE.search(finding.reason)
    refused = match is not None or "the engine refuses" in finding.reason
    return Problem("refused" if refused else "unsupported", "error", finding.where, finding.op, finding.reason,
                   finding.fix, match[1] if match else "")  # fmt: skip


def _by_cause(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """One problem for each cause: a limit that one size breaks is told at the user's line, with the count of ops.

    A layer that is too wide is refused in forward, backward, loss and optimizer alike.
    """
    causes: dict[tuple[str, ...], list[Problem]] = {}
    for problem in problems:
        match = _LIMIT.search(problem.reason)
        same = problem.where if problem.rule == "unsupported" else ""
        key = match.groups() if match else (problem.op, problem.reason, same)
        causes.setdefault((problem.rule, *key), []).append(problem)
    found = []
    for members in causes.values():
        first = min(members, key=lambda problem: ".py:" not in problem.where)
        more = len(members) - 1
        others = "is one more input or op" if more == 1 else f"are {more} more inputs and ops"
        reason = f"{first.reason} So {others}." if more else first.reason
        fixes = dict.fromkeys(problem.fix for problem in (first, *members) if problem.fix)
        found.append(replace(first, reason=reason, fix=" ".join(list(fixes)[:2])))
    return tuple(found)


def _program_verdict(program: Program, chip: Chip, path: str) -> ChipVerdict:
    from ane_trainer.ane.compiler.legalize import Target, notes, refusals

    target = Target(chip, path)
    problems = list(_by_cause(map(_refusal, refusals(program.main, target))))
    problems += [p for finding in notes(program.main, target) if (p := _note(finding, chip)) is not None]
    problems = _largest_first(problems)
    problems += _size(len(program.main.ops), chip, path, "Split the program.")
    return ChipVerdict(
        chip.name,
        chip.title,
        tuple(problems),
        _checked(program, chip, path),
        (),
        _budgets(program, chip, path),
        program=True,
    )


def _step_verdict(runs: CheckRuns, step: TrainingStep, chip: Chip) -> ChipVerdict:
    problems = [p for finding in step.compiled.legalized.notes if (p := _note(finding, chip)) is not None]
    problems = [*_largest_first(problems), *_step_size(runs.subject, step, chip, runs.path)]
    words = ""
    if runs.runs:
        outcome = runs.outcome(step, chip)
        words = outcome.words
        problems += outcome.problems
    budgets = _budgets(step.program, chip, runs.path, [len(each.program.main.ops) for each in step.programs])
    return ChipVerdict(chip.name, chip.title, tuple(problems), _checked(step.program, chip, runs.path), (), budgets,
                       words)  # fmt: skip


def _largest_first(problems: Sequence[Problem]) -> list[Problem]:
    """The problems, with one note for all operands beyond the working set: that of the largest."""
    beyond = [p for p in problems if p.rule == "working-set"]
    if len(beyond) < 2:
        return list(problems)
    largest = max(beyond, key=lambda p: float(match[1]) if (match := _MIB.search(p.reason)) else 0.0)
    count = sum(int(match[1]) for p in beyond if (match := _COUNT.match(p.reason)))
    more = f"{count} ops at {len(beyond)} places have"
    found = replace(largest, reason=_COUNT.sub(more, largest.reason))
    return [p for p in problems if p.rule != "working-set"] + [found]


def _note(finding: Finding, chip: Chip) -> Problem | None:
    """A note of legalization as a problem; the program's length is told apart (`_size`)."""
    if finding.where == "program":
        return None
    if "no source says" in finding.reason:
        fix = "Run `ane-trainer conformance` on such a Mac, or replace the layer that needs it."
        return Problem("unknown-op", "warning", finding.where, finding.op, finding.reason, fix)
    if "into inf" in finding.reason:
        evidence = chip.evidence_for("width_slice_clamp")
        source = "" if evidence is None else evidence.source
        return Problem(
            "clamped-slice", "note", finding.where, finding.op, finding.reason, finding.fix, source
        )
    return Problem("working-set", "note", finding.where, finding.op, finding.reason, finding.fix)


def _checked(program: Program, chip: Chip, path: str) -> tuple[OpCheck, ...]:
    from ane_trainer.ane.chips.lookup import op_status

    found = {kind: op_status(kind, chip, path) for kind in {op.kind for op in program.main.ops}}
    return tuple(
        OpCheck(op.name, op.kind, op.source or op.name, found[op.kind].status,
                f"{found[op.kind].evidence}: {found[op.kind].source}")
        for op in program.main.ops
    )  # fmt: skip


def _size(count: int, chip: Chip, path: str, fix: str) -> list[Problem]:
    """A program that is longer than what is known to compile."""
    from ane_trainer.ane.chips.lookup import known_layers

    most, evidence = known_layers(chip, path)
    if count <= most:
        return []
    reason = f"{count} ops; the longest program known to compile has {most:g} layers."
    return [Problem("program-size", "warning", "program", "depth", reason, fix, evidence)]


def _step_size(subject: ModelSubject, step: TrainingStep, chip: Chip, path: str) -> list[Problem]:
    """The step's longest program beside what is known to compile: in programs of blocks, or what they would be."""
    from ane_trainer.ane.capture.repeats import repeating
    from ane_trainer.ane.chips.lookup import known_layers
    from ane_trainer.ane.compiler.blocks import Division

    longest = max(len(each.program.main.ops) for each in step.programs)
    most, evidence = known_layers(chip, path)
    if longest <= most and step.dispatches:
        reason = (
            f"{len(step.program.main.ops)} ops, in {len(step.programs)} programs of up to {longest}, "
            f"{step.dispatches_per_step} dispatches a step; the longest known to compile has {most:g}."
        )
        return [Problem("program-size", "note", "program", "depth", reason, "", evidence)]
    lowered = step.host_side[1].compiled.legalized.lowered
    divided = Division("auto", repeating(subject.model)).of(lowered, chip.name, path)
    fix = "" if divided is None else (
        f'Divide it: blocks="auto" (--blocks auto) makes {len(divided.programs)} programs of up to '
        f"{divided.longest} ops, {len(divided.dispatches)} dispatches a step."
    )  # fmt: skip
    return _size(longest, chip, path, fix)


def _rewrites(step: TrainingStep, made: Sequence[Made]) -> tuple[Rewrite, ...]:
    """What was changed to keep the step in range, op by op, and what the host does for it."""
    found = [
        Rewrite(port.target, "input", f"fed times {port.scale:g}", "its numbers leave the range")
        for port in step.compiled.inputs
        if port.role == "batch" and port.scale != 1.0
    ]
    found += [Rewrite(item.where, item.op, item.change, item.reason) for item in made]
    if step.optimizer_on == "host":
        reason = str(step.placement()["optimizer_reason"] or "it has no rule on the engine")
        found.append(Rewrite("optimizer", "update", "runs on the host", reason))
    return tuple(dict.fromkeys(found))  # a graph may be captured twice


def _budgets(program: Program, chip: Chip, path: str, sizes: Sequence[int] = ()) -> dict[str, object]:
    """Sizes of the program beside what is known; `sizes`: of the programs that it is in."""
    from ane_trainer.ane.chips.lookup import known_layers
    from ane_trainer.ane.chips.work import constant_bytes, held_bytes

    main = program.main
    state = sum(value.type.nbytes for value in main.inputs)
    constants = constant_bytes(main)
    most, _ = known_layers(chip, path)
    count, several = max(len(sizes), 1), f" in {len(sizes)} programs of up to {max(sizes, default=0)}"
    return {
        "ops": f"{len(main.ops)}{several if count > 1 else ''} (known to compile: {most:g})",
        "inputs": format_bytes(state),
        "constants": format_bytes(constants),
        "memory": f"{format_bytes(held_bytes(main))} of constants, inputs and outputs",
        "compiles": f"{count} of about 119 a process"
        if path == "direct"
        else f"{count} of 128 loaded programs a process",
    }
