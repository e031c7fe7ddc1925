"""Reductions and softmax on the pointwise unit.

The order of the engine's partial sums is not settled (ANE guide chapter 3 and M6 disagree). Sums and means take
four consecutive elements of the last reduced axis one after the other, rounded to fp16's 11 bits, then add wide and
round once: this gives M1's 5116 for 4096 and 1,024 ones (ANE guide chapter 3), the integers up to 2048 and 2049 ->
2050 of six chips (ANEForge numeric_cliffs), and M5's published accuracy in ANEForge's seeded MNIST CNN
(docs/aneforge.md). Partial sums have no limit and a number that multiplies the total meets it before it is rounded
(`schedule.folded_factors`): M5's group_norm is right to 0.03 where both pass 65504. Not explained: the survivors of
ones added at 3000 to 4090 (M1), and the larger errors of long sums and softmax (docs/fidelity.md).
Other reductions sum in float64 and round once. Roots and logarithms of sums go through the tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import axes
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.loops.compiled import LINE, Pass, Step, chain, extreme_for, total_for
from ane_trainer.ane.simulator.loops.convert import rounded, table_of
from ane_trainer.ane.simulator.loops.jit import PARALLEL_ELEMENTS
from ane_trainer.ane.simulator.numbers.fp16 import to_11_bits
from ane_trainer.ane.simulator.registry import KERNELS, EngineContext, kernel, writes

_SUM = (
    "four terms in fp16, then wide: ANE guide chapter 3 (M1: 4096 and 1,024 ones give 5116), ANEForge"
    " numeric_cliffs (integers to 2048, 2049 -> 2050 on six chips); the order on other chips is unknown"
)
_SWEEP = "ANEForge vocabulary sweep (M5): relative error "


def _over(call: Call) -> dict[str, Any]:
    return {"axis": axes(call, "axes", call.type().rank), "keepdims": call.flag("keep_dims")}


def scaled_sum_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array, factor: float) -> Step:
    """A sum or mean, and the same times a number: the total meets the factor before it is rounded."""
    return _folding(ctx, call, x, outputs[0], (outputs[1], factor))


def _folding(
    ctx: EngineContext, call: Call, x: Array, out: Array, scaled: tuple[Array, float] | None = None
) -> Step:
    """The reduction as one loop over x, and what follows on its totals as another; `scaled` is a second result and
    its factor.
    """
    kind, over = call.op.kind, _over(call)["axis"]
    if not over:
        over, x = (x.ndim,), x[..., None]
    if kind in _BY_FOURS and not ctx.fast:
        return _by_fours(ctx, kind, x, over, out, scaled)
    fold, table = _FOLDED[kind]
    shaped = out.reshape([1 if a in over else n for a, n in enumerate(x.shape)])
    last, total = Pass(ctx), shaped if fold in ("max", "min") else total_for(ctx, x, over)
    gather = _gather(ctx, fold, kind == "reduce_l1_norm", x, over, total)
    if total is shaped:
        return gather
    count = x.size / total.size if kind == "reduce_mean" else 1
    result = last.total(total, count)
    found = last.store(result if table is None else last.lookup(result, table), shaped)
    if scaled is None:
        return chain(gather, found)
    second, (target, factor) = Pass(ctx), scaled
    product = second.add("mul", second.load(total), second.number(factor / count))
    return chain(gather, found, second.store(product, target.reshape(shaped.shape)))


def _gather(
    ctx: EngineContext, fold: str, sizes: bool, x: Array, over: tuple[int, ...], total: Array
) -> Step:
    """One loop over x (`sizes`: over magnitudes); for few totals, a part of x for each thread, which are joined."""
    work, parts = Pass(ctx), ctx.threads if total.size < 2 * LINE and x.size >= PARALLEL_ELEMENTS else 1
    if parts == 1 or 0 not in over or x.shape[0] % parts:
        value = work.load(x)
        return work.fold(fold, work.add("abs", value) if sizes else value, total)
    value = work.load(x.reshape(parts, -1, *x.shape[1:]))
    several = np.empty((parts, *total.shape), total.dtype)
    gather = work.fold(fold, work.add("abs", value) if sizes else value, several)
    join = {"max": np.maximum, "min": np.minimum}.get(fold, np.add).reduce

    def run() -> None:
        gather()
        join(several, axis=0, out=total)

    return run


#: Reductions whose first stage is the sum of four elements in fp16.
_BY_FOURS = frozenset(("reduce_sum", "reduce_mean"))


def _fours(x: Array, axis: int) -> list[list[Array]]:
    """Views of x that are summed in fp16 first: each fourth element of `axis` from 0, 1, 2 and 3; then the rest."""
    whole = x.shape[axis] // 4 * 4
    lead = (slice(None),) * axis
    groups = [
        [x[(*lead, slice(start, stop, 4))] for start in range(first, min(first + 4, stop))]
        for first, stop in ((0, whole), (whole, x.shape[axis]))
    ]
    return [group for group in groups if group]


def _by_fours(
    ctx: EngineContext,
    kind: str,
    x: Array,
    over: tuple[int, ...],
    out: Array,
    scaled: tuple[Array, float] | None,
) -> Step:
    """Sum or mean: one loop over the groups of four, one over what is left, then the look at the totals."""
    totals: list[Array] = []
    steps: list[Step] = []
    for views in _fours(x, max(over)):
        work, total = Pass(ctx), total_for(ctx, x, over)
        apart = x.strides[max(over)] // x.itemsize
        value = work.load_of_four(views[0], 0)
        for place in range(1, len(views)):
            value = work.add("partial", value, work.load_of_four(views[0], place * apart))
        steps.append(work.fold("sum", value, total))
        totals.append(total.reshape(out.shape))
    count = x.size / out.size if kind == "reduce_mean" else 1

    def run() -> None:
        for step in steps:
            step()
        total = sum(totals[1:], totals[0]) / count
        if scaled is not None:
            target, factor = scaled
            target[...] = rounded(total * factor)
        out[...] = rounded(total)

    return run


def _sum_by_fours(x: Array, over: dict[str, Any]) -> Array:
    """The float64 total of the fp16 sums of four."""
    last = max(over["axis"], default=None)
    if last is None:
        return np.asarray(x, np.float64)
    total: Array = np.zeros(())
    for views in _fours(x, last):
        partial = views[0]
        for view in views[1:]:
            partial = to_11_bits(partial + view)
        total = total + np.sum(partial, dtype=np.float64, **over)
    return total


#: Reductions of one loop: what it gathers, and the table that a total then goes through.
_FOLDED: dict[str, tuple[str, str | None]] = {
    "reduce_sum": ("sum", None), "reduce_mean": ("sum", None), "reduce_l1_norm": ("sum", None),
    "reduce_sum_square": ("sum_square", None), "reduce_l2_norm": ("sum_square", "sqrt"),
    "reduce_log_sum": ("sum", "log"), "reduce_max": ("max", None), "reduce_min": ("min", None),
}  # fmt: skip


@writes(" ".join(_FOLDED))
def reduce_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """Every reduction that one loop and a look at its totals make; int32 and fp32 take their kernels."""
    if call.type().dtype == "fp16":
        return _folding(ctx, call, x, outputs[0])
    kernel_of = KERNELS[call.op.kind].run

    def run() -> None:
        outputs[0][...] = kernel_of(ctx, call, x)

    return run


def _sum(x: Array, **over: Any) -> Array:
    return rounded(np.sum(x, dtype=np.float64, **over))


@kernel("reduce_sum", "assumed", _SUM)
def reduce_sum(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Sum over `axes`."""
    return rounded(_sum_by_fours(x, _over(call)))


@kernel("reduce_mean", "assumed", _SUM)
def reduce_mean(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Mean over `axes`."""
    total = _sum_by_fours(x, _over(call))
    return rounded(total / (x.size / total.size))


@kernel("reduce_l1_norm", "assumed", _SWEEP + "0.00071; the order of partial sums is unknown")
def reduce_l1_norm(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Sum of magnitudes."""
    return _sum(np.abs(x), **_over(call))


@kernel("reduce_sum_square", "assumed", _SWEEP + "0.00054; the order of partial sums is unknown")
def reduce_sum_square(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Sum of squares."""
    return _sum(np.square(x), **_over(call))


@kernel("reduce_l2_norm", "assumed", _SWEEP + "0.00051; sum of squares in fp16 range, then the sqrt table")
def reduce_l2_norm(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Root of the sum of squares."""
    return table_of("sqrt", reduce_sum_square(ctx, call, x))


@kernel("reduce_log_sum", "assumed", _SWEEP + "0.00091; sum, then the log table")
def reduce_log_sum(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Logarithm of the sum."""
    return table_of("log", _sum(x, **_over(call)))


@kernel("reduce_log_sum_exp", "assumed", _SWEEP + "0.00077; maximum subtracted, exp table, sum, log table")
def reduce_log_sum_exp(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Logarithm of the sum of exponentials."""
    over = _over(call)
    most = np.max(x, axis=over["axis"], keepdims=True)
    total = _sum(table_of("exp", rounded(x - most)), **over)
    return rounded(table_of("log", total) + most.reshape(total.shape))


@kernel(
    "reduce_prod", "assumed", "refused on the e5rt path (ANEForge sweep, M5); multiplied wide, rounded once"
)
def reduce_prod(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Product over `axes`."""
    return rounded(np.prod(x, dtype=np.float64, **_over(call)))


@kernel("reduce_max", "exact", "no arithmetic: ANEForge vocabulary sweep, relative error 0 on M5")
def reduce_max(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Largest element over `axes`."""
    return np.asarray(np.max(x, **_over(call)))


@kernel("reduce_min", "exact", "no arithmetic: ANEForge vocabulary sweep, relative error 0 on M5")
def reduce_min(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Smallest element over `axes`."""
    return np.asarray(np.min(x, **_over(call)))


@kernel(
    "softmax", "assumed", "ane-guide ch. 3: the maximum is subtracted; exp table, sum, inverse table, product"
)
def softmax(ctx: EngineContext, call: Call, x: Array) -> Array:
    """exp(x) over its sum along one axis."""
    return softmax_over(x, call.integer("axis"))


def softmax_over(x: Array, axis: int) -> Array:
    """exp(x - maximum) times the inverse of its sum, along one axis; every step rounded."""
    shifted = rounded(x - np.max(x, axis=axis, keepdims=True))
    weights = table_of("exp", shifted)
    return rounded(weights * table_of("inverse", _sum(weights, axis=axis, keepdims=True)))


@writes("softmax")
def softmax_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `softmax_over`."""
    work = Pass(ctx)
    return softmax_steps(ctx, work, work.load(x), call.integer("axis") % x.ndim, outputs[0])


def softmax_steps(ctx: EngineContext, work: Pass, value: int, axis: int, out: Array) -> Step:
    """`softmax_over` of a value of a pass in four loops: maximum; exponentials and their sum; factor; product."""
    total, most, factor = total_for(ctx, out, (axis,)), extreme_for(out, (axis,)), extreme_for(out, (axis,))
    weights, inverted, last = Pass(ctx), Pass(ctx), Pass(ctx)
    plain = work.code.instrs[value].code == "load"
    source = work.code.arrays[work.code.instrs[value].which] if plain else out
    shifted = weights.add("sub", weights.load(source), weights.load(most))
    return chain(
        work.fold("max", value, most, store=None if plain else out),
        weights.fold("sum", weights.lookup(shifted, "exp"), total, store=out),
        inverted.store(inverted.lookup(inverted.total(total), "inverse"), factor),
        last.store(last.add("mul", last.load(out), last.load(factor)), out),
    )


@writes("reduce_log_sum_exp")
def reduce_log_sum_exp_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `reduce_log_sum_exp`."""
    out, over = outputs[0], _over(call)["axis"]
    if not over:
        over, x = (x.ndim,), x[..., None]
    total, most = total_for(ctx, x, over), extreme_for(x, over)
    first, second, last = Pass(ctx), Pass(ctx), Pass(ctx)
    shifted = second.add("sub", second.load(x), second.load(most))
    logarithm = last.lookup(last.total(total), "log")
    return chain(
        first.fold("max", first.load(x), most),
        second.fold("sum", second.lookup(shifted, "exp"), total),
        last.store(last.add("add", logarithm, last.load(most)), out.reshape(total.shape)),
    )
