"""Numeric hazards of a step on its example batch: values at the end of the range, products that vanish, table ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ane_trainer.commands.subjects import ModelSubject
from ane_trainer.commands.verdicts import Problem

if TYPE_CHECKING:
    from ane_trainer.ane.dispatch import TrainingStep
    from ane_trainer.ane.verify.watching import Extremes

#: What the accumulator holds, and the share of it and of fp16 from which a value counts as near.
_MAC_LIMIT, _NEAR = 32768.0, 0.5
#: Places of the step's own: the loss scale, which doubles until it no longer fits, and what watches gradients.
_OWN = ("loss scaling", "gradient clipping", None)
#: Share of a product's results that vanish from which it is told.
_DEAD = 0.05


def hazards(subject: ModelSubject, step: TrainingStep, chip: str) -> Iterator[Problem]:
    """Numeric hazards of the example batch, each kind once a place."""
    from ane_trainer.ane.verify.watching import extremes

    feeds = step.feeds(*subject.example) | step.port_state()
    found = extremes(step.program, feeds, chip=chip)
    by_name = {op.name: op for op in found}
    told: set[tuple[str, str]] = set()
    operands = {op.name: [v.name for v in op.operands()] for op in step.program.main.ops}
    for op in found:
        if op.source in _OWN:
            continue
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
