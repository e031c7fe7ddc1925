"""What each op of a program loses on the engine: errors, overflow, underflow, dead products, histograms of magnitudes.

One walk in lockstep (`lockstep`), each op held against itself in double precision on the same operands (what it adds)
and against double precision from the start (what has added up). Its cost is linear in the ops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ane_trainer.ane.mil.opset import bind
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Value
from ane_trainer.ane.mil.semantics import literal_array
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.verify.lockstep import ENGINE_INF, Lockstep, Outcome, Seen
from ane_trainer.ane.verify.profiling import SMALLEST_NORMAL, OpProfile, op_profiles, result_profile

#: Products of the accumulator below this vanish: it counts in 2^-16, rounded half away from zero.
LEAST_PRODUCT = 2.0**-17
#: What the accumulator holds.
ACCUMULATOR = 32768.0
#: Magnitudes of histograms, as powers of two: below the first and above the last all fall together.
LEAST_POWER, LARGEST_POWER = -30, 34
#: Entries that errors and histograms are taken of where no number left the range; of more, evenly spaced ones.
_SAMPLE = 2**13
#: Steps of a sum, and entries of each factor, that dead products are counted over; of more, evenly spaced ones.
_STEPS, _ROWS = 48, 4096
#: The ops that make infinities or nan of ordinary numbers: divisions by 0, logarithms and roots of what has none.
_UNDEFINED_BY = ("real_div", "inverse", "rsqrt", "log", "sqrt", "pow", "acos", "asin", "atanh")
#: The ops whose products meet in the accumulator: kind -> its two factors.
CONTRACTIONS = {
    "matmul": ("x", "y"), "linear": ("x", "weight"), "conv": ("x", "weight"), "conv_transpose": ("x", "weight"),
}  # fmt: skip


@dataclass(frozen=True)
class OpAccuracy:
    """One result of one op: its profile, and

    flushed    the share of its numbers, of those that are not 0 in double precision, that the engine has as 0 or
               subnormal (below 2^-14)
    dead       of a contraction, the share of its products of numbers other than 0 that vanish in the accumulator
    before     the largest relative error from the start among its operands
    rms        root mean square of its numbers in double precision from the start
    peak       the largest of those on the engine's operands, before the engine's limits; `true_peak` from the start
    histogram  counts by power of two from LEAST_POWER to LARGEST_POWER, on the engine and in double precision; 0, and
               what is beyond the ends, is in `zeros` and in the last bins
    undefined  numbers that are infinite or nan in double precision, of operands that are not
    """

    profile: OpProfile
    flushed: float
    dead: float | None
    before: float
    rms: float
    peak: float
    histogram: tuple[tuple[int, ...], tuple[int, ...]] = field(repr=False)
    zeros: tuple[int, int] = (0, 0)
    undefined: int = 0
    true_peak: float = 0.0

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def kind(self) -> str:
        return self.profile.kind


@dataclass(frozen=True)
class Accuracy:
    """The ops of a run in order, its outputs on the engine and in double precision."""

    ops: tuple[OpAccuracy, ...]
    outcome: Outcome = field(repr=False)


def examine(run: Lockstep) -> Accuracy:
    """Walk the run once."""
    errors: dict[str, float] = {}
    found: list[OpAccuracy] = []

    def seen(each: Seen) -> None:
        before = max((errors.get(v.name, 0.0) for v in each.op.operands()), default=0.0)
        for item in _measured(each, before):
            errors[item.name] = item.profile.total.relative
            found.append(item)

    outcome = run.walk(seen)
    return Accuracy(tuple(found), outcome)


def _measured(each: Seen, before: float) -> list[OpAccuracy]:
    op = each.op
    dead = dead_products(op, each.operands)
    rows = []
    for number, (value, got, local, true) in enumerate(
        zip(op.results, each.got, each.local, each.exact, strict=True)
    ):
        peak = _peak(local) if local.dtype == np.float64 else 0.0
        scale = math.ceil(got.size / _SAMPLE)
        if scale == 1 or _largest(got) >= ENGINE_INF:
            values = dict(each.operands) | {v.name: a for v, a in zip(op.results, each.got, strict=True)}
            exact = {v.name: a for v, a in zip(op.results, each.exact, strict=True)}
            profile = op_profiles(op, values, exact, own=each.local)[number]
        else:  # no number left the range: evenly spaced entries tell the errors of all
            got, local, true = (a.reshape(-1)[::scale] for a in (got, local, true))
            profile = result_profile(op, value, got, local, true)
            whole = each.got[number]
            profile = replace(
                profile,
                low=float(whole.min()),
                high=float(whole.max()),
                underflows=profile.underflows * scale,
            )
        numbers = local.dtype == np.float64
        engine, double = (_histogram(a) if numbers else ((), 0) for a in (got, true))
        rows.append(
            OpAccuracy(
                profile, _flushed(got, local) if numbers else 0.0, dead, before, _rms(true) if numbers else 0.0,
                peak, (engine[0], double[0]), (engine[1], double[1]), _undefined(each, number),
                _peak(each.exact[number]) if numbers else 0.0,
            )
        )  # fmt: skip
    return rows


def _undefined(each: Seen, number: int) -> int:
    """Results in double precision from the start that are no numbers, though all operands are."""
    found = each.exact[number]
    if found.dtype != np.float64 or np.isfinite(found).all() or each.op.kind not in _UNDEFINED_BY:
        return 0
    whole = all(np.isfinite(a).all() for a in each.exact_operands.values() if a.dtype == np.float64)
    return int((~np.isfinite(found)).sum()) if whole else 0


def _largest(array: Array) -> float:
    return float(max(-array.min(), array.max())) if array.dtype.kind == "f" and array.size else 0.0


def _flushed(got: Array, local: Array) -> float:
    """The share of numbers other than 0 that became 0 or subnormal on the engine."""
    size = np.abs(local)
    there = (size > 0) & np.isfinite(size)
    count = int(there.sum())
    return float(((np.abs(got) < SMALLEST_NORMAL) & there).sum()) / count if count else 0.0


def _rms(array: Array) -> float:
    finite = array[np.isfinite(array)]
    return float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0


def _peak(array: Array) -> float:
    """The largest finite magnitude."""
    largest = _largest(array)
    if math.isfinite(largest):
        return largest
    size = np.abs(array)
    return float(size[np.isfinite(size)].max(initial=0.0))


def _histogram(array: Array) -> tuple[tuple[int, ...], int]:
    """Counts by power of two, and the number of zeros."""
    flat = np.abs(array.reshape(-1)[:: max(1, math.ceil(array.size / _SAMPLE))])
    known = flat[(flat > 0) & ~np.isnan(flat)]
    powers = np.frexp(np.minimum(known, 2.0**60))[1] - 1
    bins = np.clip(powers, LEAST_POWER, LARGEST_POWER) - LEAST_POWER
    counts = np.bincount(bins, minlength=LARGEST_POWER - LEAST_POWER + 1)
    return tuple(counts.tolist()), int((flat == 0).sum())


def dead_products(op: Op, operands: Mapping[str, Array]) -> float | None:
    """The share of a contraction's products of numbers other than 0 that vanish in the accumulator; None of others.

    Counted exactly for the steps of the sum that are looked at: a sort of one factor, a search for each of the other.
    """
    names = CONTRACTIONS.get(op.kind)
    if names is None or op.results[0].type.dtype != "fp16":
        return None
    factors = [_number_array(op.arg(name), operands) for name in names]
    if any(f is None for f in factors):
        return None
    call = bind(op.kind, dict(op.args))
    x, y = (np.abs(f) for f in factors if f is not None)
    if op.kind == "matmul":
        x = np.swapaxes(x, -1, -2) if call.flag("transpose_x") else x  # [..., m, k]
        y = y if call.flag("transpose_y") else np.swapaxes(y, -1, -2)  # [..., n, k]
        pairs = [(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))]
        if x.ndim > 2 and y.ndim > 2:
            pairs = _batches(x, y)
    elif op.kind == "linear":
        pairs = [(x.reshape(-1, x.shape[-1]), y)]
    else:
        pairs = _channels(op.kind, x, y, call.integer("groups"))
    dead = alive = 0
    for a, b in pairs:
        lost, all_of = _dead_of(a, b)
        dead, alive = dead + lost, alive + all_of
    return dead / alive if alive else 0.0


def _batches(x: Array, y: Array) -> list[tuple[Array, Array]]:
    """Matrices of a batch side by side, the smaller batch repeated."""
    lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    a = np.broadcast_to(x, (*lead, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
    b = np.broadcast_to(y, (*lead, *y.shape[-2:])).reshape(-1, *y.shape[-2:])
    chosen = _spaced(len(a), 8)
    return [(a[i], b[i]) for i in chosen]


def _channels(kind: str, x: Array, weight: Array, groups: int) -> list[tuple[Array, Array]]:
    """A convolution's factors by group, each `[entries, channels]`: every place may meet every tap."""
    places = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
    pairs = []
    for g in _spaced(groups, 16):
        width = x.shape[1] // groups
        own = places[:, g * width : (g + 1) * width]
        if kind == "conv":
            rows = len(weight) // groups
            taps = np.moveaxis(weight[g * rows : (g + 1) * rows], 1, -1).reshape(-1, weight.shape[1])
        else:
            taps = weight[g * width : (g + 1) * width].reshape(width, -1).T
        pairs.append((own, taps))
    return pairs


def _dead_of(a: Array, b: Array) -> tuple[int, int]:
    """(products that vanish, products of numbers other than 0) of `a [m, k]` and `b [n, k]` over the steps k."""
    dead = count = 0
    for k in _spaced(a.shape[1], _STEPS):
        left, right = a[_spaced(len(a), _ROWS), k], b[_spaced(len(b), _ROWS), k]
        left, right = left[left > 0], np.sort(right[right > 0])
        if left.size and right.size:
            dead += int(np.searchsorted(right, LEAST_PRODUCT / left, side="left").sum())
            count += left.size * right.size
    return dead, count


def _spaced(size: int, most: int) -> Array:
    """At most so many places of `size`, evenly spaced."""
    return np.arange(size) if size <= most else np.linspace(0, size - 1, most).astype(np.int64)


def _number_array(arg: Arg | None, operands: Mapping[str, Array]) -> Array | None:
    if isinstance(arg, Value):
        found = operands[arg.name]
        return found if found.dtype.kind == "f" else None
    if isinstance(arg, Literal):
        return literal_array(arg)
    return None


def phase_inputs(function: Function, seeds: Sequence[str]) -> frozenset[str]:
    """The values that depend on the inputs called `seeds`."""
    reached = set(seeds)
    for op in function.ops:
        if any(v.name in reached for v in op.operands()):
            reached.update(v.name for v in op.results)
    return frozenset(reached)


__all__ = ["ACCUMULATOR", "ENGINE_INF", "Accuracy", "OpAccuracy", "examine", "phase_inputs"]
