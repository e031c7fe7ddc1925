"""A program op by op: the engine's arithmetic and double precision side by side, or either in the other's place.

Ops that the engine's compiler takes as one (a sum and the number that it is multiplied by, a product of quantized
operands) are one unit here, too. Values are let go after their last reader, so that memory does not grow with the
length of a program. The engine's values are decoded fp16 in float32, its infinity 65536.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ane_trainer.ane.mil import semantics
from ane_trainer.ane.mil.inputs import check_array, missing_input
from ane_trainer.ane.mil.program import Function, Op, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import EngineContext, Plan, prepare
from ane_trainer.ane.simulator.arrays import from_border, storage_dtype
from ane_trainer.ane.simulator.kernels.integer import encoded_products, integer_operands
from ane_trainer.ane.simulator.schedule import folded_factors, live_ops

#: The engine's infinity, a number to it, and the largest number below it.
ENGINE_INF, LARGEST, SMALLEST_NORMAL = 65536.0, 65504.0, 2.0**-14
#: Bytes of plans that are kept for equal ops to come.
_KEPT_BYTES = 256_000_000

Values = dict[str, Array]


@dataclass(frozen=True)
class Unit:
    """Ops that run as one; `own` are those that are new in it, the others a copy of what another unit shows."""

    ops: tuple[Op, ...]
    own: tuple[Op, ...]

    @property
    def name(self) -> str:
        """The name of its last result."""
        return self.own[-1].name

    @property
    def reads(self) -> tuple[Value, ...]:
        """What it takes from elsewhere."""
        made = {v.name for op in self.ops for v in op.results}
        found = {v.name: v for op in self.ops for v in op.operands() if v.name not in made}
        return tuple(found.values())

    @property
    def results(self) -> tuple[Value, ...]:
        """Its own results."""
        return tuple(v for op in self.own for v in op.results)


def units_of(function: Function, context: EngineContext) -> tuple[Unit, ...]:
    """The live ops of a function without states, in an order of work."""
    ops = live_ops(function)
    made_by = {v.name: op for op in ops for v in op.results}
    factors = folded_factors(function)
    quantized = {*integer_operands(function, context.chip.generation_number), *encoded_products(function)}
    sums = {next(op.operands()).name: op for op in ops if op.name in factors}
    found = []
    for op in ops:
        if op.name in factors:
            continue  # with its sum
        if op.name in sums:
            factor = sums[op.name]
            found.append(Unit((op, factor), (op, factor)))
        elif op.name in quantized:
            before = tuple(made_by[v.name] for v in op.operands() if v.name in made_by)
            before = tuple(
                o for o in before if not any(v.name in made_by for v in o.operands()) or "quantize" in o.kind
            )
            found.append(Unit((*before, op), (op,)))
        else:
            found.append(Unit((op,), (op,)))
    return tuple(found)


class Engine:
    """Runs units on the simulated engine; units that are equal but for names share a plan."""

    def __init__(self, context: EngineContext) -> None:
        self.context = context
        self._plans: OrderedDict[Function, tuple[Plan, int]] = OrderedDict()
        self._bytes = 0

    def run(self, unit: Unit, value_of: Callable[[str], Array]) -> Values:
        """The unit's own results on these operands, which are decoded fp16 or of their own type."""
        names = {value.name: f"a{number}" for number, value in enumerate(unit.reads)}
        for op in unit.ops:
            for value in op.results:
                names[value.name] = f"a{len(names)}"
        plan = self._plan(_renamed(unit, names))
        for value in unit.reads:
            np.copyto(plan.buffers[names[value.name]], value_of(value.name), casting="same_kind")
        for step in plan.steps:
            step()
        return {v.name: np.array(plan.buffers[names[v.name]]) for v in unit.results}

    def _plan(self, function: Function) -> Plan:
        found = self._plans.get(function)
        if found is None:
            plan = prepare(function, self.context)
            size = sum(array.nbytes for array in plan.buffers.values())
            found = self._plans[function] = (plan, size)
            self._bytes += size
            while self._bytes > _KEPT_BYTES and len(self._plans) > 1:
                self._bytes -= self._plans.popitem(last=False)[1][1]
        self._plans.move_to_end(function)
        return found[0]


def _renamed(unit: Unit, names: Mapping[str, str]) -> Function:
    """The unit as a function of its own, under names that say nothing of where it stands."""

    def value(old: Value) -> Value:
        return Value(names[old.name], old.type)

    ops = tuple(replace(op.renamed(names), source=None) for op in unit.ops)
    return Function("main", tuple(map(value, unit.reads)), ops, tuple(map(value, unit.results)))


@dataclass(frozen=True)
class Seen:
    """One op of a run in lockstep: its operands and results on the engine, what double precision makes of the same
    operands (`local`), and its results in double precision from the start (`exact`).
    """

    op: Op
    operands: Mapping[str, Array]
    got: tuple[Array, ...]
    local: tuple[Array, ...]
    exact: tuple[Array, ...]
    exact_operands: Mapping[str, Array]


@dataclass(frozen=True)
class Outcome:
    """The outputs of a function by name, on the engine and in double precision."""

    engine: Values
    exact: Values


class Lockstep:
    """A function without states, its feeds, and an engine for it.

    feeds  arrays by input as a program takes them; `exact` those that they were rounded from, where known.
    keep   the outputs that are wanted; None: all.
    """

    def __init__(
        self, function: Function, feeds: Mapping[str, Array], context: EngineContext,
        exact: Mapping[str, Array] | None = None, keep: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        self.function, self.engine = function, Engine(context)
        self.given, self.given_exact = feeds, exact
        self.units = units_of(function, context)
        self.keep = frozenset(v.name for v in function.outputs if keep is None or v.name in keep)
        self._inputs = {v.name: v for v in function.inputs}
        for value in function.inputs:
            _check(value, feeds.get(value.name))
        self._last = _last_readers(self.units, self.keep)

    def feed(self, name: str) -> Array:
        """An input as the engine sees it."""
        value = self._inputs[name]
        out = np.zeros(value.type.shape, storage_dtype(value.type))
        from_border(np.asarray(self.given[name]), value.type, out)
        return out

    def exact_feed(self, name: str) -> Array:
        """What an input was rounded from, in double precision."""
        found = (self.given_exact or {}).get(name)
        array = self.feed(name) if found is None else np.asarray(found).reshape(self._inputs[name].type.shape)
        return array.astype(semantics.wide_dtype(self._inputs[name].type.dtype))

    def walk(self, seen: Callable[[Seen], None]) -> Outcome:
        """Run both from the start; every op is shown to `seen` in order."""
        engine, exact = _Lazy(self.feed), _Lazy(self.exact_feed)
        with np.errstate(all="ignore"):
            for number, unit in enumerate(self.units):
                engine.update(self.engine.run(unit, engine.__getitem__))
                for op in unit.own:
                    operands = {v.name: engine[v.name] for v in op.operands()}
                    wide: Values = {n: a.astype(_wide(a)) for n, a in operands.items()}
                    exact_operands = {v.name: exact[v.name] for v in op.operands()}
                    local = semantics.apply(op, wide.__getitem__)
                    same = all(exact_operands[n] is wide[n] for n in wide)
                    found = local if same else semantics.apply(op, exact.__getitem__)
                    exact.update(zip((v.name for v in op.results), found, strict=True))
                    got = tuple(engine[v.name] for v in op.results)
                    seen(Seen(op, operands, got, local, found, exact_operands))
                for name in self._last[number]:
                    engine.pop(name, None)
                    exact.pop(name, None)
        return Outcome({n: engine[n] for n in self.keep}, {n: exact[n] for n in self.keep})

    def hybrid(
        self, exactly: Callable[[Unit], bool], wide: bool = True, rounded: Collection[str] | None = None
    ) -> tuple[Values, frozenset[str]]:
        """Run the units that `exactly` chooses in double precision, the others on the engine; the outputs, and the
        names of the units that ran in double precision.

        With `wide`, a unit whose operands came in double precision and are beyond fp16 runs so, too. `rounded`: the
        inputs that are as the engine sees them; None: all.
        """

        def first(name: str) -> Array:
            return self.feed(name) if rounded is None or name in rounded else self.exact_feed(name)

        values = _Lazy(first)
        exact_units = set()
        with np.errstate(all="ignore"):
            for number, unit in enumerate(self.units):
                if exactly(unit) or (wide and any(_leaves(values[v.name]) for v in unit.reads)):
                    exact_units.add(unit.name)
                    self._exact(unit, values)
                else:
                    operands = {v.name: _on_engine(values[v.name], v) for v in unit.reads}
                    values.update(self.engine.run(unit, operands.__getitem__))
                for name in self._last[number]:
                    values.pop(name, None)
        return {name: values[name] for name in self.keep}, frozenset(exact_units)

    def _exact(self, unit: Unit, values: Values) -> None:
        for op in unit.own:
            wide: Values = {
                v.name: values[v.name].astype(_wide(values[v.name]), copy=False) for v in op.operands()
            }
            results = semantics.apply(op, wide.__getitem__)
            values.update(zip((v.name for v in op.results), results, strict=True))


class _Lazy(dict[str, Array]):
    """Values by name; those that are not there are made when they are first asked for."""

    def __init__(self, make: Callable[[str], Array]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Array:
        found = self[name] = self._make(name)
        return found


def _check(value: Value, array: Array | None) -> None:
    """SimulationError for an input that is missing or misshapen."""
    if array is None:
        raise missing_input(value)
    check_array(value, array)


def _wide(array: Array) -> type:
    if array.dtype == np.bool_:
        return np.bool_
    return np.float64 if array.dtype.kind == "f" else np.int64


def _leaves(array: Array) -> bool:
    """Whether numbers of double precision are beyond what fp16 holds, or most of them below its normal ones."""
    if array.dtype != np.float64 or not array.size:
        return False
    size = np.abs(array)
    there = size[(size > 0) & np.isfinite(size) & (size != ENGINE_INF)]
    return bool((there > LARGEST).any()) or 2 * int((there < SMALLEST_NORMAL).sum()) > there.size


def _on_engine(array: Array, value: Value) -> Array:
    """A value as an operand on the engine: numbers of double precision are rounded to fp16, its infinity 65536."""
    if array.dtype == np.float64 and value.type.dtype == "fp16":
        rounded = np.where(np.isnan(array), 0.0, np.clip(array, -ENGINE_INF, ENGINE_INF))
        with np.errstate(over="ignore"):
            half = rounded.astype(np.float16).astype(np.float32)
        return np.where(np.isinf(half), np.copysign(np.float32(ENGINE_INF), half), half)
    return array.astype(storage_dtype(value.type), copy=False)


def _last_readers(units: tuple[Unit, ...], kept: Collection[str]) -> list[list[str]]:
    """For each unit, the values that nobody reads after it."""
    last: dict[str, int] = {}
    for number, unit in enumerate(units):
        for value in (*unit.reads, *unit.results):
            last[value.name] = number
    found: list[list[str]] = [[] for _ in units]
    for name, number in last.items():
        if name not in kept:
            found[number].append(name)
    return found
