"""Watch the values of one simulated run op by op, in memory that does not grow with the length of the program.

A program runs in parts, one after the other: the results of a part are looked at and let go, but for those that later
parts read. Within a part the simulator's loops are those of the whole program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil import semantics
from ane_trainer.ane.mil.opset import bind
from ane_trainer.ane.mil.program import Function, Op, Program, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import EngineContext, make_context, prepare, refusal
from ane_trainer.ane.simulator.schedule import VIEWS, lazy_values
from ane_trainer.ane.simulator.states import without_states
from ane_trainer.ane.verify.accuracy import CONTRACTIONS
from ane_trainer.ane.verify.lockstep import ENGINE_INF, Unit, units_of
from ane_trainer.ane.verify.profiling import OpProfile, op_profiles

#: Bytes of results, decoded, of the ops that run together.
PART_BYTES = 96_000_000
#: Rows of a product on which it is asked whether a 0 should be one, where many are.
_ROWS = 256
#: Share of a product's results that are 0 from which it is asked.
_MANY = 0.01

#: Shown an op and the values that it reads and makes, by name, decoded.
Seen = Callable[[Op, Mapping[str, Array]], None]


@dataclass(frozen=True)
class Extremes:
    """One result of one op in a run.

    `low` and `high` are the range of its numbers other than infinity (None: there are none); `overflows` counts those
    that became infinite here. `vanished`: of a product, the share of its results that are 0 and should not be, on
    evenly spaced rows where there are many.
    """

    name: str
    kind: str
    source: str | None
    low: float | None
    high: float | None
    overflows: int = 0
    vanished: float = 0.0

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low or 0.0), abs(self.high or 0.0))


def watch(
    program: Program, feeds: Mapping[str, Array], seen: Seen, *, chip: str, path: str | None = "e5rt"
) -> None:
    """Run the main function on the simulator, exactly, and show every op that an output depends on, in order.

    Windows that only products read are not made, and so not shown: they repeat what they show. Raises what `simulate`
    raises.
    """
    context = make_context(chip, "exact", None, path)
    refusal.check(program.main, context.chip, path)
    function, _ = without_states(program.main)
    values = _fed(function, {v.name for v in program.main.inputs if v.type.state}, feeds, context)
    parts = _parts(units_of(function, context))
    last = _last_readers(parts)
    hidden = _hidden(function, context)
    for number, ops in enumerate(parts):
        values.update(_run(ops, values, hidden, {n for n, at in last.items() if at > number}, context))
        reading = _Reading(values, ops)
        for op in ops:
            if all(v.name in values for v in op.results):
                seen(op, reading)
        gone = {v.name for op in ops for v in (*op.results, *op.operands()) if last.get(v.name, 0) <= number}
        for name in gone:
            values.pop(name, None)


def extremes(
    program: Program, feeds: Mapping[str, Array], *, chip: str, path: str | None = "e5rt"
) -> tuple[Extremes, ...]:
    """The range of every result, and what overflows and vanishes, in one run of the program on these feeds."""
    found: list[Extremes] = []
    watch(program, feeds, lambda op, values: found.extend(_extremes(op, values)), chip=chip, path=path)
    return tuple(found)


def own_errors(
    program: Program, feeds: Mapping[str, Array], *, chip: str, path: str | None = "e5rt"
) -> tuple[OpProfile, ...]:
    """The profile of every result in one run, each op against itself in double precision on the same operands."""
    found: list[OpProfile] = []
    watch(program, feeds, lambda op, values: found.extend(op_profiles(op, values, {})), chip=chip, path=path)
    return tuple(found)


def _extremes(op: Op, values: Mapping[str, Array]) -> Iterator[Extremes]:
    profiles = None
    for number, value in enumerate(op.results):
        got = values[value.name]
        if not got.size:
            continue
        low, high, infinite = float(got.min()), float(got.max()), 0
        if value.type.dtype == "fp16" and max(-low, high) >= ENGINE_INF:
            profiles = op_profiles(op, values, {}) if profiles is None else profiles
            found = profiles[number]
            yield Extremes(value.name, op.kind, op.source, found.low, found.high, found.overflows)
            continue
        vanished = _vanished(op, got, values) if op.kind in CONTRACTIONS else 0.0
        yield Extremes(value.name, op.kind, op.source, low, high, infinite, vanished)


def _vanished(op: Op, got: Array, values: Mapping[str, Array]) -> float:
    """The share of a product's results that are 0 and are not without the accumulator's rounding."""
    zeros = got == 0
    if np.count_nonzero(zeros) < _MANY * got.size:
        return 0.0
    operands = {v.name: values[v.name] for v in op.operands()}
    op, chosen = _fewer_rows(op, operands)
    with np.errstate(all="ignore"):
        (true,) = semantics.apply(op, operands.__getitem__)
    lost = zeros[chosen] & (true != 0) & np.isfinite(true)
    return float(np.count_nonzero(lost)) / true.size


def _fewer_rows(op: Op, operands: dict[str, Array]) -> tuple[Op, tuple[slice, ...]]:
    """A product of evenly spaced rows of its first operand, which `operands` then holds, and where those are."""
    x = op.arg("x")
    every = (slice(None),) * op.result.type.rank
    if not isinstance(x, Value) or any(
        isinstance(op.arg(n), Value) and op.arg(n) == x for n in ("y", "weight")
    ):
        return op, every
    rank = x.type.rank
    if rank < 2:
        return op, every
    if op.kind in ("conv", "conv_transpose"):
        axis, result_axis, most = 0, 0, 1
    elif op.kind == "matmul":
        swapped = bind(op.kind, dict(op.args)).flag("transpose_x")
        axis, result_axis, most = rank - 1 if swapped else rank - 2, op.result.type.rank - 2, _ROWS
    else:
        axis, result_axis, most = 0, 0, _ROWS
    size = x.type.shape[axis]
    step = math.ceil(size / most)
    if step == 1 or op.result.type.shape[result_axis] != size:
        return op, every
    chosen = slice(None, None, step)
    operands[x.name] = operands[x.name][(slice(None),) * axis + (chosen,)]
    shape = list(op.result.type.shape)
    shape[result_axis] = len(range(0, size, step))
    few = _resized(op, x, operands[x.name].shape, tuple(shape))
    return few, (*every[:result_axis], chosen, *every[result_axis + 1 :])


def _resized(op: Op, x: Value, x_shape: tuple[int, ...], shape: tuple[int, ...]) -> Op:
    """The op with its operand x and its result of other shapes."""
    small = replace(x, type=replace(x.type, shape=x_shape))
    args = tuple((name, small if name == "x" else arg) for name, arg in op.args)
    result = replace(op.result, type=replace(op.result.type, shape=shape))
    return replace(op, args=args, results=(result,))


class _Reading(Mapping[str, Array]):
    """Values by name; one that was not made is worked out from what it shows when it is asked for."""

    def __init__(self, values: Mapping[str, Array], ops: tuple[Op, ...]) -> None:
        self._values = values
        self._makers = {v.name: op for op in ops for v in op.results}

    def __getitem__(self, name: str) -> Array:
        found = self._values.get(name)
        if found is not None:
            return found
        op = self._makers[name]
        results = semantics.apply(op, self.__getitem__)
        (array,) = (a for v, a in zip(op.results, results, strict=True) if v.name == name)
        return array.astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._makers, **self._values})

    def __len__(self) -> int:
        return len({**self._makers, **self._values})


def _fed(
    function: Function, states: Collection[str], feeds: Mapping[str, Array], context: EngineContext
) -> dict[str, Array]:
    """The inputs as the engine sees them; states that are not fed start from 0."""
    plan = prepare(Function(function.name, function.inputs, (), ()), context)
    for value in function.inputs:
        if value.name in feeds:
            plan.write(value.name, feeds[value.name])
        elif value.name not in states:
            raise SimulationError(
                f"run: needs the input {value.name} ({value.type}); it is missing.", code="SIM101"
            )
    return {v.name: plan.buffers[v.name] for v in function.inputs}


def _parts(units: tuple[Unit, ...]) -> list[tuple[Op, ...]]:
    """The live ops in runs of some bytes of results; what runs as one stays together."""
    parts: list[dict[str, Op]] = [{}]
    size = 0
    for unit in units:
        own = sum(4 * v.type.size for v in unit.results)
        if size + own > PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1].update({op.name: op for op in unit.ops})
        size += own
    return [tuple(part.values()) for part in parts if part]


def _last_readers(parts: list[tuple[Op, ...]]) -> dict[str, int]:
    """The last part that reads each value."""
    return {v.name: number for number, ops in enumerate(parts) for op in ops for v in op.operands()}


def _hidden(function: Function, context: EngineContext) -> frozenset[str]:
    """Results of moves that need no memory of their own; not of slices where they change what they show."""
    lazy = lazy_values(function)
    changing = context.chip.width_slice_clamp is not None
    moved = {
        v.name
        for op in function.ops
        for v in op.results
        if op.kind in (*VIEWS, "concat")
        and not (changing and op.kind in ("slice_by_size", "slice_by_index", "split"))
    }
    return lazy & moved


def _run(
    ops: tuple[Op, ...],
    values: Mapping[str, Array],
    hidden: frozenset[str],
    needed: set[str],
    context: EngineContext,
) -> dict[str, Array]:
    """Run a part on the values that it reads; its results, but for hidden ones that nothing later reads."""
    made = {v.name for op in ops for v in op.results}
    reads = {v.name: v for op in ops for v in op.operands() if v.name not in made}
    shown = tuple(v for op in ops for v in op.results if v.name not in hidden or v.name in needed)
    function = Function("main", tuple(reads.values()), ops, shown)
    plan = prepare(function, context, (), {name: values[name] for name in reads})
    for step in plan.steps:
        step()
    return {v.name: plan.buffers[v.name] for v in shown}
