"""Timeline of a program's dispatch by the cost model: what each lane does when, and what memory holds.

MAC array, elementwise unit and transfers take turns (`cost.py`); only constants stream while the array computes. So an
op reads what the host sent, computes, and writes what the host reads back; the next op begins where it ends, and the
last one ends at the estimate's latency.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ane_trainer.ane.chips.cost import Cost, OpCost, estimate, leaves_engine, rates
from ane_trainer.ane.chips.counting import FREE
from ane_trainer.ane.chips.lookup import Chip, get_chip
from ane_trainer.ane.chips.work import OpWork, Streams, function_work, stored_bytes
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import Function, Op, Program

#: What works or moves bytes, in the order in which a reader follows a step.
LANES = ("host", "transfers in", "weights", "MAC array", "elementwise", "transfers out")
#: Lanes whose slices carry the ops that ride on them.
_COMPUTING = ("MAC array", "elementwise")
#: What memory holds.
HELD = ("inputs", "constants", "outputs", "intermediates")


@dataclass(frozen=True)
class Slice:
    """One stretch of one lane, of `op` (None: the dispatch); `moved_bytes` are under way meanwhile.

    `carries` names the ops that ride on the output stage of this one and take no time of their own.
    """

    lane: str
    name: str
    start_us: float
    duration_us: float
    op: OpCost | None = None
    moved_bytes: int = 0
    carries: tuple[str, ...] = ()

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us


@dataclass(frozen=True)
class Memory:
    """Bytes that are held from `start_us` on, by what holds them (HELD)."""

    start_us: float
    inputs: int
    constants: int
    outputs: int
    intermediates: int

    @property
    def total(self) -> int:
        return self.inputs + self.constants + self.outputs + self.intermediates


@dataclass(frozen=True)
class Timeline:
    """One dispatch in time. `ends_us` says of each op when it is done, also of those that take no time."""

    chip: str
    title: str
    path: str
    cost: Cost
    slices: tuple[Slice, ...]
    memory: tuple[Memory, ...]
    ends_us: Mapping[str, float]

    def busy_us(self, lane: str) -> float:
        """For how long a lane has work."""
        return sum(item.duration_us for item in self.slices if item.lane == lane)

    def in_flight(self) -> Iterator[tuple[float, int]]:
        """Each time at which the bytes under way change, and how many they are from then on."""
        changes: dict[float, int] = {0.0: 0}
        for item in self.slices:
            if item.moved_bytes:
                changes[item.start_us] = changes.get(item.start_us, 0) + item.moved_bytes
                changes[item.end_us] = changes.get(item.end_us, 0) - item.moved_bytes
        now = 0
        for time_us in sorted(changes):
            now += changes[time_us]
            yield time_us, now

    def peak(self) -> Memory:
        """When memory holds most."""
        return max(self.memory, key=lambda item: item.total)


def timeline(program: Program, chip: Chip | str, path: str = "e5rt") -> Timeline:
    """The dispatch of the program's main function; its slices follow each other up to the estimate's latency.

    Raises: UsageError for an unknown chip or path.
    """
    chip = get_chip(chip) if isinstance(chip, str) else chip
    cost = estimate(program, chip, path)
    work = function_work(program.main)
    values = {name: rate.value for name, rate in rates(chip.name, path).items()}
    on_host = leaves_engine(work, chip)
    carried = _carried(work)
    slices = [Slice("host", "dispatch", 0.0, cost.dispatch_us)]
    ends: dict[str, float] = {}
    now = cost.dispatch_us
    for item, op in zip(work, cost.ops, strict=True):
        found = list(_slices(item, op, now, values, on_host))
        if riders := carried.get(op.name):
            found = [replace(part, carries=riders) if part.lane in _COMPUTING else part for part in found]
        now += op.latency_us
        ends[op.name] = now
        slices += found
    memory = tuple(_memory(program.main, ends, cost.dispatch_us))
    return Timeline(chip.name, chip.title, path, cost, tuple(slices), memory, ends)


def _slices(
    work: OpWork, op: OpCost, start_us: float, values: Mapping[str, float], on_host: bool
) -> Iterator[Slice]:
    """An op's reading, constants, computing and writing, those that take time."""
    reading = tuple(part for part in work.transfers if part[0] == "read")
    writing = tuple(part for part in work.transfers if part[0] != "read")
    known, rest = (
        sum(size / (1.0 if on_host else values[name]) for name, size in part) for part in (reading, writing)
    )
    read_us = op.activation_us * known / (known + rest) if known + rest else 0.0
    busy_us = max(op.compute_us, op.weight_us) + op.overhead_us
    unit = "host" if on_host else "MAC array" if work.unit == "mac" else "elementwise"
    label = op.op if op.source is None else f"{op.op} {op.source}"
    begin = start_us + read_us
    candidates = (
        Slice("transfers in", label, start_us, read_us, op, _size(reading)),
        Slice("weights", label, begin, op.weight_us, op, op.weight_bytes),
        Slice(unit, label, begin, busy_us, op),
        Slice("transfers out", label, begin + busy_us, op.activation_us - read_us, op, _size(writing)),
    )
    yield from (item for item in candidates if item.duration_us > 0)


def _size(streams: Streams) -> int:
    return sum(size for _, size in streams)


def _carried(work: Sequence[OpWork]) -> dict[str, tuple[str, ...]]:
    """Product, or elementwise op -> the ops that ride on its output stage."""
    makers = {value.name: item for item in work for value in item.op.results}
    riders: dict[str, tuple[str, ...]] = {}
    host_of: dict[str, str] = {}
    for item in work:
        maker = next((makers[v.name] for v in item.op.operands() if v.name in makers), None)
        if item.unit != "fused" or maker is None:
            continue
        product = host_of.get(maker.op.name, maker.op.name)
        host_of[item.op.name] = product
        riders[product] = (*riders.get(product, ()), item.op.kind)
    return riders


def _memory(function: Function, ends: Mapping[str, float], begin_us: float) -> Iterator[Memory]:
    """What memory holds from each op on; a view holds nothing itself but keeps what it shows."""
    shown = _shown(function.ops)
    kept = {shown.get(value.name, value.name) for value in function.outputs}
    leaving = _leaving(function.ops, shown)
    inputs = sum(value.type.nbytes for value in function.inputs)
    constants = sum(
        stored_bytes(item) for op in function.ops for _, item in op.literals() if isinstance(item.data, bytes)
    )
    written = made = 0
    live: dict[str, int] = {}
    yield Memory(0.0, inputs, constants, 0, 0)
    now = begin_us
    for index, op in enumerate(function.ops):
        for value in () if family(op.kind) in FREE else op.results:
            if value.name in kept:
                written += value.type.nbytes
            else:
                live[value.name] = value.type.nbytes
                made += value.type.nbytes
        yield Memory(now, inputs, constants, written, made)
        now = ends[op.name]
        made -= sum(live.pop(name, 0) for name in leaving.get(index, ()))
    yield Memory(now, inputs, constants, written, made)


def _leaving(ops: Sequence[Op], shown: Mapping[str, str]) -> dict[int, list[str]]:
    """Index of an op -> the values that nobody reads after it."""
    last: dict[str, int] = {}
    for index, op in enumerate(ops):
        for value in (*op.operands(), *op.results):
            last[shown.get(value.name, value.name)] = index
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        found.setdefault(index, []).append(name)
    return found


def _shown(ops: Iterable[Op]) -> dict[str, str]:
    """View -> the value whose memory it shows."""
    found: dict[str, str] = {}
    for op in ops:
        if family(op.kind) in FREE and (first := next(op.operands(), None)) is not None:
            found.update((value.name, found.get(first.name, first.name)) for value in op.results)
    return found
