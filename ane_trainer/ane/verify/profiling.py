"""What rounding does to a program, op by op: ranges, overflows, underflows, distance from double precision, time.

Every value of one simulated run is held against two witnesses in double precision (`semantics`): the op
worked out on the same simulated operands (what this op adds) and a run without any rounding (what has added
up so far). Times are the simulator's on this machine, not the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil import semantics
from ane_trainer.ane.mil.program import Function, Op, Program, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import KERNELS, Plan, make_context, prepare, refusal
from ane_trainer.ane.simulator.schedule import live_ops
from ane_trainer.ane.simulator.states import without_states

Feeds = Mapping[str, Array] | Sequence[Mapping[str, Array]]

#: The engine's infinity, a number to it.
ENGINE_INF = 65536.0

#: Relative errors are not taken of magnitudes below the smallest normal fp16 number.
SMALLEST_NORMAL = 2.0**-14

_TIMED_RUNS = 3


@dataclass(frozen=True)
class Distance:
    """How far an array lies from its value in double precision.

    `largest` is the largest absolute error, `largest_relative` the largest error relative to its element,
    `relative` the error's root mean square relative to the value's. Numbers beyond fp16 count as its
    infinity (65536).
    """

    largest: float
    largest_relative: float
    relative: float


@dataclass(frozen=True)
class OpProfile:
    """One result of one op in a simulated run.

    `low` and `high` are the range of its numbers other than infinity (None: no such number). `overflows`
    counts results that became infinite here, `underflows` zeros whose value is not zero. `own` is the
    distance from the same op in double precision on the same operands, `total` from a program without
    rounding (None for ops without a meaning in double precision). `time_us` is None where nothing is worked
    out at run time (views, constants); in a fused loop it is the op's part of `fused` ops.
    """

    name: str
    kind: str
    source: str | None
    type: str
    low: float | None
    high: float | None
    infinities: int
    overflows: int
    underflows: int
    own: Distance
    total: Distance
    time_us: float | None
    fused: int
    fidelity: str


@dataclass(frozen=True)
class OutputError:
    """One output of the program (or a state after the run) against double precision.

    `same` is the share of elements that equal the double-precision value rounded to the output's type.
    """

    name: str
    type: str
    distance: Distance
    infinities: int
    same: float


@dataclass(frozen=True)
class Profile:
    """The ops of a run in order, its outputs, and the time of one run on this machine."""

    ops: tuple[OpProfile, ...]
    outputs: tuple[OutputError, ...]
    time_us: float

    def worst(self, count: int = 5) -> tuple[OpProfile, ...]:
        """The ops that harm most: those that overflow first, then by their own relative error."""
        bad = [op for op in self.ops if op.overflows or op.own.relative > 0]
        return tuple(sorted(bad, key=lambda op: (-(op.overflows > 0), -op.own.relative))[:count])


def profile(
    program: Program,
    feeds: Feeds,
    *,
    chip: str = "m4",
    fidelity: str = "exact",
    threads: int | None = None,
    path: str | None = "e5rt",
    function: str | None = None,
) -> Profile:
    """Run `program` on the simulator and profile every op that an output or a state depends on.

    `feeds` is as for `simulate`; a sequence of feeds runs as many steps with the program's states kept, of
    which the last is profiled. Raises what `simulate` raises, and `ProgramError` for an unknown function.
    """
    chosen = function_of(program, function)
    steps = steps_of(feeds)
    context = make_context(chip, fidelity, threads, path)
    refusal.check(chosen, context.chip, path)
    plain, aliases = without_states(chosen)
    ops = live_ops(plain)
    plan = prepare(_showing_all(plain, ops), context, aliases)
    for step in steps[:-1]:
        plan.run(step)
    before = _inputs_before(plan, steps[-1])
    plan.run(steps[-1])
    values = before | {v.name: np.array(plan.buffers[v.name]) for v in plan.function.outputs}
    times, whole_us = _times(plan)
    exact = _reference_steps(chosen, steps, aliases)
    profiles = tuple(p for op in ops for p in op_profiles(op, values, exact, times))
    return Profile(profiles, _outputs(plain, aliases, values, exact), whole_us)


def compare(
    program: Program,
    feeds: Feeds,
    *,
    chip: str = "m4",
    fidelity: str = "exact",
    threads: int | None = None,
    path: str | None = "e5rt",
    function: str | None = None,
) -> tuple[OutputError, ...]:
    """Run `program` on the simulator and in double precision; each output's distance, states' too.

    `feeds` and errors are as for `profile`; the outputs are those of the last step.
    """
    chosen = function_of(program, function)
    steps = steps_of(feeds)
    context = make_context(chip, fidelity, threads, path)
    refusal.check(chosen, context.chip, path)
    plain, aliases = without_states(chosen)
    plan = prepare(plain, context, aliases)
    for step in steps:
        plan.run(step)
    values = {v.name: np.array(plan.buffers[v.name]) for v in plain.outputs}
    return _outputs(plain, aliases, values, _reference_steps(chosen, steps, aliases))


def function_of(program: Program, name: str | None) -> Function:
    """The function called `name` (None: the main one); `ProgramError` lists the ones there are."""
    if name is None:
        return program.main
    found = next((f for f in program.functions if f.name == name), None)
    if found is None:
        known = ", ".join(f.name for f in program.functions)
        raise ProgramError(f"function: needs one of {known}; got {name!r}.", code="MIL112")
    return found


def steps_of(feeds: Feeds) -> list[dict[str, Array]]:
    """The feeds of each step, as arrays."""
    given = [feeds] if isinstance(feeds, Mapping) else list(feeds)
    return [{name: np.asarray(array) for name, array in step.items()} for step in given]


def _showing_all(function: Function, ops: Sequence[Op]) -> Function:
    """The function with every live result among its outputs, so that a plan keeps it."""
    shown = {v.name for v in function.outputs}
    return replace(
        function, outputs=(*function.outputs, *(v for op in ops for v in op.results if v.name not in shown))
    )


def _inputs_before(plan: Plan, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Write the last step's feeds; the inputs as the engine sees them, states before they change."""
    for value in plan.function.inputs:
        if value.name in feeds:
            plan.write(value.name, feeds[value.name])
    return {value.name: np.array(plan.buffers[value.name]) for value in plan.function.inputs}


def _reference_steps(
    function: Function, steps: Sequence[Mapping[str, Array]], aliases: Sequence[tuple[str, str]]
) -> dict[str, Array]:
    """Every value of the last step in double precision; states after it by the outputs that keep them."""
    states: dict[str, Array] = {}
    exact: dict[str, Array] = {}
    for step in steps:
        feeds = {v.name: as_fed(step[v.name], v.type.dtype) for v in function.inputs if v.name in step}
        found = semantics.trace(function, feeds, states)
        exact, states = found.values, found.states
    return exact | {output: states[name] for output, name in aliases}


def as_fed(array: Array, dtype: str) -> Array:
    """An input as the simulator takes it: fp16 ports round to fp16, the host's way."""
    if dtype == "fp16" and array.dtype != np.float16:
        with np.errstate(over="ignore"):
            return array.astype(np.float16)
    return array


def op_profiles(
    op: Op,
    values: Mapping[str, Array],
    exact: Mapping[str, Array],
    times: Mapping[str, tuple[float, int]] = MappingProxyType({}),
    own: Sequence[Array] | None = None,
) -> list[OpProfile]:
    """One profile for each result of an op: `values` of its operands and results as decoded, `exact` of its results.

    `own`: the op in double precision on these operands, where that is known already.
    """
    wide: dict[str, Array] = {
        v.name: values[v.name].astype(semantics.wide_dtype(v.type.dtype), copy=False) for v in op.operands()
    }
    own = semantics.apply(op, wide.__getitem__) if own is None else own
    numbers = (semantics.literal_array(v) for _, v in op.literals() if isinstance(v.data, bytes))
    given_infinity = any(np.isinf(array).any() for array in numbers)
    profiles = []
    for value, local in zip(op.results, own, strict=True):
        got = values[value.name]
        infinite = np.abs(got) >= ENGINE_INF if value.type.dtype == "fp16" else np.zeros(got.shape, np.bool_)
        new = infinite
        if infinite.any():
            new = infinite & (np.abs(local) != ENGINE_INF) & ~(np.isinf(local) & given_infinity)
            new &= ~_infinite_operands(wide.values(), got.shape)
        finite = got if new is infinite and not infinite.any() else got[~infinite]
        ends = (float(finite.min()), float(finite.max())) if finite.size else (None, None)
        found = result_profile(op, value, got, local, exact.get(value.name, local))
        time_us, fused = times.get(op.name, (None, 1))
        profiles.append(
            replace(found, low=ends[0], high=ends[1], infinities=int(infinite.sum()), overflows=int(new.sum()),
                    time_us=time_us, fused=fused)
        )  # fmt: skip
    return profiles


def result_profile(op: Op, value: Value, got: Array, local: Array, exact: Array) -> OpProfile:
    """The profile of a result of which these are all entries, or some, none of them infinite on the engine."""
    half = value.type.dtype == "fp16"
    kernel = KERNELS.get(op.kind)
    own = distance(got, local, half)
    lost = int(((got == 0) & (local != 0) & np.isfinite(local)).sum()) if half else 0
    low, high = (float(got.min()), float(got.max())) if got.size else (None, None)
    return OpProfile(
        value.name, op.kind, op.source, str(value.type), low, high, 0, 0, lost, own,
        own if exact is local else distance(got, exact, half), None, 1, kernel.level if kernel else "",
    )  # fmt: skip


def _infinite_operands(operands: Iterable[Array], shape: tuple[int, ...]) -> Array:
    """Where an operand is infinite: element by element where they broadcast, else anywhere for everywhere."""
    passed = np.zeros(shape, np.bool_)
    for operand in operands:
        infinite = np.abs(operand) >= ENGINE_INF if operand.dtype == np.float64 else np.zeros((), np.bool_)
        pairs = zip(reversed(infinite.shape), reversed(shape), strict=False)
        fits = infinite.ndim <= len(shape) and all(n in (1, m) for n, m in pairs)
        passed = passed | (infinite if fits else infinite.any())
    return passed


def distance(got: Array, want: Array, half: bool = True) -> Distance:
    """How far `got` lies from `want`; undefined numbers (NaN) of `want` are left out.

    With `half` both saturate at 65536, fp16's infinity.
    """
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not all(_peak(v) < (65520 if half else np.inf) for v in (a, b)):  # not of nan either
        if half:
            a, b = (np.where(np.abs(v) >= 65520, np.sign(v) * ENGINE_INF, v) for v in (a, b))
        known = ~np.isnan(b) & ~((a == b) & np.isinf(b))
        a, b = a[known], b[known]
    if not a.size:
        return Distance(0.0, 0.0, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(a - b)
        size = float(np.sqrt(np.mean(np.square(b))))
        spread = float(np.sqrt(np.mean(np.square(error))))
        largest = float(error.max())
        error /= np.maximum(np.abs(b), SMALLEST_NORMAL)
    relative = spread / size if size > 0 else (0.0 if spread == 0 else float("inf"))
    return Distance(largest, float(error.max()), relative)


def _peak(values: Array) -> float:
    """The largest magnitude; nan where one is none."""
    return float(np.maximum(-values.min(), values.max())) if values.size else 0.0


def _outputs(
    plain: Function,
    aliases: Sequence[tuple[str, str]],
    values: Mapping[str, Array],
    exact: Mapping[str, Array],
) -> tuple[OutputError, ...]:
    """Every output and changed state."""
    renamed = dict(aliases)
    rows = []
    for value in plain.outputs:
        got, want = values[value.name], exact[value.name]
        half = value.type.dtype == "fp16"
        infinities = int((np.abs(got) >= ENGINE_INF).sum()) if half else 0
        rows.append(
            OutputError(
                renamed.get(value.name, value.name),
                str(value.type),
                distance(got, want, half),
                infinities,
                _same(got, want, half),
            )
        )
    return tuple(rows)


def _same(got: Array, want: Array, half: bool) -> float:
    """The share of elements that are the double-precision value, rounded to fp16 where that is the type."""
    if not got.size:
        return 1.0
    if not half:
        return float(np.mean(got == want.astype(got.dtype)))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = want.astype(np.float16).astype(np.float64)
    return float(np.mean(got == np.where(np.isinf(rounded), np.sign(rounded) * ENGINE_INF, rounded)))


def _times(plan: Plan) -> tuple[dict[str, tuple[float, int]], float]:
    """Microseconds of each op (best of a few runs) with the number of ops in its loop, and of a whole run."""
    best = np.full(len(plan.steps), np.inf)
    for _ in range(_TIMED_RUNS):
        for index, step in enumerate(plan.steps):
            start = time.perf_counter()
            step()
            best[index] = min(best[index], time.perf_counter() - start)
    times = {}
    for names, seconds in zip(plan.step_ops, best, strict=True):
        times.update({name: (seconds * 1e6 / len(names), len(names)) for name in names})
    return times, float(best.sum() * 1e6)
