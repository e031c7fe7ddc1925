"""Judges what an op does to numbers: which kind of fault it is, in words, and what usually helps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ane_trainer.ane.verify.accuracy import ACCUMULATOR, CONTRACTIONS, OpAccuracy
from ane_trainer.ane.verify.lockstep import LARGEST

#: What an op may add to the error of its operands, relative, before it counts as a place where numbers depart.
TOLERATED = 0.02
#: Share of products, or of results, that vanish from which it is told.
VANISHED = 0.05
#: Op -> magnitude of the operand beyond which the engine's table is constant or infinite (M6 notes, ANE guide).
TABLE_ENDS = {
    "exp": 11.09,
    "exp2": 16.0,
    "sigmoid": 8.0,
    "tanh": 4.0,
    "softplus": 11.09,
    "silu": 8.0,
    "erf": 4.0,
}
_SLICES = ("slice_by_index", "slice_by_size", "split")
_SUMS = ("reduce_sum", "reduce_mean", "reduce_sum_square", "reduce_l2_norm", "cumsum")

#: Kinds of faults -> what they are, worst first.
RULES = {
    "undefined": "the program as it is divides by 0 here, or takes a logarithm or root of what has none",
    "overflow": "numbers become infinite here",
    "accumulator": "a sum passes 32,768, where the accumulator ends",
    "clamped-slice": "large values become infinite in this slice on this chip",
    "table-end": "operands lie beyond the end of the engine's table",
    "dead-products": "products below 2^-17 vanish in the accumulator",
    "underflow": "numbers vanish: they are below what fp16 holds",
    "integers": "whole numbers from 2,048 on are rounded",
    "cancellation": "near numbers are subtracted: what rounding left of them is most of the difference",
    "sensitive": "small errors of its operands become large ones here",
    "rounding": "rounding here costs more than fp16 itself",
    "input": "an input does not fit into fp16 as it is",
    "constant": "a number in the code does not fit into fp16 as it is",
}


#: Kinds of faults -> what helps where nothing that was tried does.
HELP = {
    "undefined": "Keep away from 0: an epsilon from 1e-5 on under the division, root or logarithm.",
    "overflow": "Divide by a power of two before it and multiply the result again, or normalise before it.",
    "accumulator": "Divide by a power of two before the sum, or take a mean.",
    "clamped-slice": "Slice before the numbers grow, or along another axis than the last.",
    "table-end": "Beyond its table's end the op is constant or infinite: normalise before it.",
    "dead-products": "Multiply one operand by a power of two, and the result by its inverse.",
    "underflow": "Start a factor as small as this larger (a LayerScale at 1e-3 or more), or divide by it later: "
    "a branch that vanishes counts once its scale has grown.",
    "integers": "Keep whole numbers below 2,048: take the remainder or the difference earlier.",
    "cancellation": "Subtract before the squares: ((x - mean) ** 2).mean() for (x * x).mean() - mean ** 2, "
    "((a - b) ** 2).sum() for a distance; or leave out an offset that all have in common.",
    "sensitive": "Keep its operands small: before a sine take the remainder in the data or on the host, before "
    "an exponential or a steep slope a smaller factor.",
    "rounding": "Keep its operands nearer to 1, or normalise before it.",
    "input": "Centre and scale it on the host, or feed it in two parts, say whole and rest.",
    "constant": "Split it into factors that fp16 holds (2^-14 to 65,504), or scale what it meets.",
}


@dataclass(frozen=True)
class Fault:
    """What happens at one op: a rule's name, the facts in words, how bad it is (an error relative to its result)."""

    rule: str
    facts: str
    size: float


def fault_of(op: OpAccuracy, operands: float = 0.0, tolerated: float = TOLERATED) -> Fault | None:
    """The fault that an op shows on this run, or None. `operands`: the largest magnitude among them."""
    profile = op.profile
    own, total = profile.own.relative, profile.total.relative
    if op.undefined:
        many = f"{op.undefined:,} numbers are" if op.undefined > 1 else "one number is"
        facts = f"{many} infinite or nan in double precision, too: a division by 0, say"
        return Fault("undefined", facts, math.inf)
    if profile.overflows:
        return _overflow(op)
    if own > tolerated:
        return _loss(op, operands)
    sums = op.kind in ("add", "sub", *_SUMS, *CONTRACTIONS)
    if sums and total > tolerated + 2.0 * op.before and math.isfinite(total):
        facts = f"its operands are off by {_percent(op.before)}, their difference by {_percent(total)}"
        return Fault("cancellation", facts, total)
    return None


def _overflow(op: OpAccuracy) -> Fault:
    profile = op.profile
    count = f"{profile.overflows:,} of its {_size(profile.type):,} numbers become infinite"
    size = max(profile.own.relative, 1.0)
    if profile.kind in _SLICES:
        return Fault("clamped-slice", f"{count}; the largest is {op.peak:,.4g}", size)
    if profile.kind in TABLE_ENDS:
        return Fault("table-end", f"{count}; its table ends at {TABLE_ENDS[profile.kind]:g}", size)
    summed = profile.kind in CONTRACTIONS or profile.kind in _SUMS
    if summed and op.peak < LARGEST:
        return Fault(
            "accumulator",
            f"{count}; sums reach {op.peak:,.6g}, the accumulator holds {ACCUMULATOR:,.0f}",
            size,
        )
    return Fault("overflow", f"{count}; they reach {op.peak:,.4g}, fp16 holds {LARGEST:,.0f}", size)


def _loss(op: OpAccuracy, operands: float) -> Fault:
    profile, own = op.profile, op.profile.own.relative
    end = TABLE_ENDS.get(profile.kind)
    if op.dead is not None and op.dead >= VANISHED:
        facts = f"{op.dead:.0%} of its products vanish: they are below 2^-17; its result is off by {_percent(own)}"
        return Fault("dead-products", facts, own)
    if end is not None and operands > end:
        return Fault(
            "table-end",
            f"operands reach {operands:,.4g}, the table ends at {end:g}; off by {_percent(own)}",
            own,
        )
    if op.flushed >= VANISHED or op.peak < 2.0**-14:
        facts = f"{op.flushed:.0%} of its numbers are below 2^-14, the largest is {op.peak:.3g}; off by {_percent(own)}"
        return Fault("underflow", facts, own)
    if op.kind == "cast" or (op.peak >= 2048 and profile.own.largest >= 0.5 and own < 1e-2):
        return Fault(
            "integers", f"whole numbers up to {op.peak:,.6g}; off by up to {profile.own.largest:,.4g}", own
        )
    return Fault("rounding", f"its result is off by {_percent(own)}", own)


def _percent(value: float) -> str:
    if not math.isfinite(value) or value >= 10.0:
        return "10x or more"
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def _size(type_: str) -> int:
    extents = type_.partition("[")[2].rstrip("]").split(",")
    return math.prod(int(extent) for extent in extents if extent)
