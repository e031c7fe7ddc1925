"""`check`: whether a training step runs on a chip and keeps to fp32, op by op, with evidence and the way out."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_trainer.ane.errors import Finding, NumericsWarning, UnsupportedModel
from ane_trainer.commands.options import Batch, Classes, Dataset, Optimizer, Output
from ane_trainer.commands.subjects import (
    Blocks,
    Dtype,
    LossName,
    ModelSubject,
    ProgramSubject,
    Request,
    Shapes,
    Subject,
    classes_of,
    resolve,
    shapes_of,
)
from ane_trainer.commands.verdicts import ChipVerdict, OpCheck, Problem, Rewrite, Verdict
from ane_trainer.utils import format_bytes

if TYPE_CHECKING:
    from ane_trainer.ane.capture.range.switch import Made
    from ane_trainer.ane.chips.lookup import Chip
    from ane_trainer.ane.dispatch import TrainingStep
    from ane_trainer.ane.mil.program import Program
    from ane_trainer.ane.verify.watching import Extremes

#: What the accumulator and fp16 hold, and the share of it from which a value counts as near.
_MAC_LIMIT, _NEAR = 32768.0, 0.5
#: Examples that are run; legality is checked for the whole batch.
_RUN_BATCH = 8
#: Share of a product's results that vanish from which it is told.
_DEAD = 0.05
#: What to do about a loss that is nan.
_UNDEFINED = "Look for logarithms and roots of negative numbers, and for 0 / 0."
#: Where a bound is known from, as legalization tells it.
_SOURCE = re.compile(r" on [^()]+ \((.+)\); got ")
#: A bound that a size breaks: the bound, and the size.
_LIMIT = re.compile(r"of at (?:most|least) ([\d.e+]+).*; got (\d+)")


def check(
    subject: Subject,
    dataset: Dataset = "mnist",
    input_shape: Shapes = None,
    classes: Classes = None,
    batch: Batch = 128,
    loss: LossName = "auto",
    dtype: Dtype = "auto",
    optimizer: Optimizer = "adam",
    blocks: Blocks = "auto",
    chip: Annotated[str, typer.Option(help="One or more, e.g. m1,m4.", metavar="NAMES")] = "m4",
    path: Annotated[
        str, typer.Option(help="How programs reach the engine.", metavar="e5rt|direct|coreml")
    ] = "e5rt",
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
    count = classes_of(classes, dataset)
    request = Request("check", shapes_of(input_shape, dataset), count, batch, loss, dtype, optimizer, blocks)
    found = verdict_of(resolve(subject, request), [name.strip() for name in chip.split(",")], path, run=run)
    if sarif is not None:
        file = Path(subject.rpartition(":")[0])
        document = found.to_sarif([file] if file.suffix == ".py" else [])
        Path(sarif).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return Output(found.to_json(), found.as_text(), 0 if found.fits else 3)


def verdict_of(
    subject: ModelSubject | ProgramSubject, chips: Sequence[str], path: str, *, run: bool = True
) -> Verdict:
    """Check the subject for each chip; a model's step is compiled, and run once where `run` is set."""
    from ane_trainer.ane.chips.lookup import get_chip

    return Verdict(subject.name, tuple(_chip_verdict(subject, get_chip(name), path, run) for name in chips))


def _chip_verdict(subject: ModelSubject | ProgramSubject, chip: Chip, path: str, run: bool) -> ChipVerdict:
    if isinstance(subject, ProgramSubject):
        return _program_verdict(subject.program, chip, path)
    from ane_trainer.ane.capture.range.switch import REWRITES, limited_to

    try:
        with limited_to(REWRITES) as made:
            step = subject.step(chip.name, path, "first" if run else "off")
    except UnsupportedModel as error:
        return ChipVerdict(chip.name, chip.title, _by_cause(map(_refusal, error.findings)))
    try:
        return replace(_step_verdict(subject, step, chip, path, run), rewrites=_rewrites(step, made))
    finally:
        step.close()


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
        reason = f"{first.reason} So are {more} more inputs and ops of the step." if more else first.reason
        found.append(replace(first, reason=reason))
    return tuple(found)


def _program_verdict(program: Program, chip: Chip, path: str) -> ChipVerdict:
    from ane_trainer.ane.compiler.legalize import Target, notes, refusals

    target = Target(chip, path)
    problems = list(_by_cause(map(_refusal, refusals(program.main, target))))
    problems += [p for finding in notes(program.main, target) if (p := _note(finding, chip)) is not None]
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


def _step_verdict(subject: ModelSubject, step: TrainingStep, chip: Chip, path: str, run: bool) -> ChipVerdict:
    problems = [p for finding in step.compiled.legalized.notes if (p := _note(finding, chip)) is not None]
    problems += _step_size(subject, step, chip, path)
    words = ""
    if run:
        few = subject.with_batch(_RUN_BATCH)
        with nullcontext(step) if few is subject else few.step(chip.name, path, "first") as small:
            hazards = list(_hazards(few, small, chip))
            words, wrong = _agreement(few, small)
        problems += [*wrong, *hazards]
    budgets = _budgets(step.program, chip, path, [len(each.program.main.ops) for each in step.programs])
    return ChipVerdict(chip.name, chip.title, tuple(problems), _checked(step.program, chip, path), (), budgets,
                       words)  # fmt: skip


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


def _agreement(subject: ModelSubject, step: TrainingStep) -> tuple[str, list[Problem]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericsWarning)
        step(*subject.example)
    found = step.agreement
    if found is None:
        skipped = step.skipped_steps > 0
        return (
            "skipped: gradients overflowed, the loss scale falls" if skipped else "fp32 itself cannot run it"
        ), []
    if found.agrees:
        return str(found), []
    if math.isnan(found.loss):
        return "nan in fp32", [
            Problem("agreement", "warning", "loss", "numbers", f"{found}: the engine has no nan.", _UNDEFINED)
        ]
    where = "step" if found.first is None else str(found.first)
    reason = f"{found}."
    fix = "See the overflow and the dead products told below; keep the values there smaller, or normalise before."
    return str(found), [
        Problem("agreement", "warning", where, "numbers", reason, fix, "simulated, exact arithmetic")
    ]


def _hazards(subject: ModelSubject, step: TrainingStep, chip: Chip) -> Iterator[Problem]:
    """Numeric hazards of the example batch, each kind once a place."""
    from ane_trainer.ane.verify.watching import extremes

    feeds = step.feeds(*subject.example) | step.port_state()
    found = extremes(step.program, feeds, chip=chip.name)
    by_name = {op.name: op for op in found}
    told: set[tuple[str, str]] = set()
    operands = {op.name: [v.name for v in op.operands()] for op in step.program.main.ops}
    for op in found:
        inputs = [by_name[name] for name in operands.get(op.name, []) if name in by_name]
        for problem in (_overflow(op), _near(op), _dead(op), _table_end(op, inputs)):
            if problem is not None and (problem.rule, problem.where) not in told:
                told.add((problem.rule, problem.where))
                yield problem


def _where(op: Extremes) -> str:
    return op.source or f"op {op.name}"


def _overflow(op: Extremes) -> Problem | None:
    if not op.overflows:
        return None
    reason = f"{op.overflows} of its numbers become infinite on this batch."
    fix = "Scale its operands down, or normalise before it."
    return Problem("overflow", "note", _where(op), op.kind, reason, fix, "simulated")


def _near(op: Extremes) -> Problem | None:
    from ane_trainer.ane.mil.program import MAX_FP16

    product = op.kind in ("matmul", "linear", "conv", "conv_transpose")
    limit, largest = (_MAC_LIMIT if product else MAX_FP16), op.largest
    if op.overflows or not _NEAR * limit <= largest < limit:
        return None
    reason = f"its largest number is {largest:,.0f}; the engine holds up to {limit:,.0f} there."
    return Problem(
        "near-limit", "note", _where(op), op.kind, reason, "Leave room: scale it down.", "simulated"
    )


def _dead(op: Extremes) -> Problem | None:
    if op.vanished < _DEAD:
        return None
    reason = f"{op.vanished:.0%} of its results vanish: products below 2^-17 are dropped."
    fix = "Scale its operands up by a power of two (gradients: raise loss_scale)."
    return Problem(
        "dead-products", "note", _where(op), op.kind, reason, fix, "simulated; M6 notes/numerics.md"
    )


def _table_end(op: Extremes, operands: Sequence[Extremes]) -> Problem | None:
    from ane_trainer.ane.verify.faults import TABLE_ENDS

    end = TABLE_ENDS.get(op.kind)
    largest = max((item.largest for item in operands), default=0.0)
    if end is None or largest <= end or (op.kind == "exp" and max(i.high or 0.0 for i in operands) <= end):
        return None
    reason = f"operands reach {largest:,.3g}; the engine's table ends at {end:g}."
    return Problem(
        "table-end", "note", _where(op), op.kind, reason, "Normalise before it.", "decoded tables, M6 notes"
    )


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
