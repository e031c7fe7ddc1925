"""The order of work: which ops run alone and which pointwise ops share one fused loop.

An entry may use only what earlier entries made, or, inside a fused entry, what the entry itself made. A
pointwise op joins the earliest fused entry of its shape for which that holds; otherwise it opens a new one. Ops of an
entry that share nothing are entries of their own in the end: the updates of equal parameters are then equal loops,
compiled once, and how long a loop is does not grow with the number of layers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from ane_trainer.ane.mil.program import Function, Literal, Op, Value
from ane_trainer.ane.simulator.arrays import literal_array
from ane_trainer.ane.simulator.kernels.fused import is_pointwise

#: Ops whose result is another view of their operand's memory (no work unless the view needs a copy).
VIEWS = frozenset(
    ["reshape", "transpose", "expand_dims", "squeeze", "slice_by_size", "slice_by_index", "split"]
)


@dataclass
class Entry:
    """One unit of work: one op, or several pointwise ops of one result shape (`fused`).

    A `constant` entry depends on no input: it is worked out once, when the plan is made. `factor`: the entry is a
    sum and the multiplication of its total by this number.
    """

    ops: list[Op]
    fused: bool = False
    reads: set[str] = field(default_factory=set)
    constant: bool = False
    factor: float | None = None


def schedule(function: Function) -> list[Entry]:
    """Entries in an order that respects every dependency; dead ops are left out."""
    made_by: dict[str, int] = {value.name: -1 for value in function.inputs}
    entries: list[Entry] = []
    fused: dict[tuple[int, ...], list[int]] = {}  # the fused entries of each shape, in order
    constants: set[str] = set()
    factors = folded_factors(function)
    for op in live_ops(function):
        needs = max((made_by[v.name] for v in op.operands()), default=-1)
        constant = all(v.name in constants for v in op.operands())
        fusable = _fusable(op) and not constant
        alike = fused.setdefault(op.result.type.shape, []) if fusable else []
        place = bisect_left(alike, needs)  # at `needs` itself only if that is fused
        index = alike[place] if place < len(alike) else None
        if op.name in factors and not constant:
            index, entries[needs].factor = needs, factors[op.name]
        if index is None:
            index = len(entries)
            entries.append(Entry([], fusable, constant=constant))
            alike.append(index)
        entries[index].ops.append(op)
        entries[index].reads.update(v.name for v in op.operands())
        for value in op.results:
            made_by[value.name] = index
        if constant:
            constants.update(value.name for value in op.results)
    return [part for entry in entries for part in (_parts(entry) if entry.fused else [entry])]


#: Elements below which a loop costs less than its call: entries that share nothing stay together, up to so many ops.
_SMALL, _MOST_SMALL_OPS = 1 << 12, 32


def _parts(entry: Entry) -> list[Entry]:
    """The groups of a fused entry's ops that are connected by what they make, or read of the entry's own shape."""
    shape, leader = entry.ops[0].result.type.shape, dict[str, str]()

    def find(name: str) -> str:
        while (above := leader.setdefault(name, name)) != name:
            leader[name] = name = leader[above]
        return name

    for op in entry.ops:
        for value in op.operands():
            if value.type.shape == shape:
                leader[find(op.result.name)] = find(value.name)
    groups: dict[str, list[int]] = {}
    for number, op in enumerate(entry.ops):
        groups.setdefault(find(op.result.name), []).append(number)
    joined: list[list[int]] = []
    for numbers in groups.values():
        if joined and math.prod(shape) < _SMALL and len(joined[-1]) + len(numbers) <= _MOST_SMALL_OPS:
            joined[-1] += numbers
        else:
            joined.append(numbers)
    parts = [[entry.ops[number] for number in sorted(numbers)] for numbers in joined]
    return [Entry(ops, True, {v.name for op in ops for v in op.operands()}) for ops in parts]


def lazy_values(function: Function) -> frozenset[str]:
    """Values that only moves, concatenations and matrix products read: they need no memory where they are views."""
    readers: dict[str, list[Op]] = {}
    for op in function.ops:
        for value in op.operands():
            readers.setdefault(value.name, []).append(op)
    outputs, lazy = {value.name for value in function.outputs}, set[str]()
    for op in reversed(function.ops):
        for value in op.results:
            if (
                value.name not in outputs
                and value.type.dtype == "fp16"
                and all(
                    reader.kind == "matmul" or (reader.kind in _MOVES and reader.result.name in lazy)
                    for reader in readers.get(value.name, [])
                )
            ):
                lazy.add(value.name)
    return frozenset(lazy)


_MOVES = (VIEWS | {"concat"}) - {"split"}


def folded_factors(function: Function) -> dict[str, float]:
    """The multiplications by a number that the compiler folds into the sum before them: op name -> factor.

    reduce_sum(x) -> s; mul(s, 1 / n) -> mean        where no other op reads s

    The factor then meets the total before that is rounded and bound to fp16's range. Evidence (M5): ANEForge's
    group_norm is right to 0.03 at 1x640x64x64 and 1x512x128x128 (32 groups), where a sum passes 65504 before it is
    multiplied by 1/N; and a factor of 0 after a reduction fails to compile. Assumed for every chip, and for
    reduce_mean too.
    """
    readers = Counter(v.name for op in function.ops for v in op.operands())
    sums = {op.result.name for op in function.ops if op.kind in _SUMS and op.result.type.dtype == "fp16"}
    found = {}
    for op in function.ops:
        if op.kind != "mul":
            continue
        (_, x), (_, y) = op.args[:2]
        value, number = (x, y) if isinstance(x, Value) else (y, x)
        if not isinstance(value, Value) or not isinstance(number, Literal) or number.type.size != 1:
            continue
        if value.name in sums and readers[value.name] == 1 and op.result.type == value.type:
            found[op.name] = float(literal_array(number).reshape(()))
    return found


_SUMS = ("reduce_sum", "reduce_mean")


def live_ops(function: Function) -> list[Op]:
    """The ops that an output depends on, in order."""
    needed = {value.name for value in function.outputs}
    kept: list[Op] = []
    for op in reversed(function.ops):
        if any(value.name in needed for value in op.results):
            kept.append(op)
            needed.update(value.name for value in op.operands())
    return kept[::-1]


def _fusable(op: Op) -> bool:
    """Pointwise on fp16 or bool; int32 and fp32 work runs on its own kernel."""
    types = [v.type.dtype for v in op.operands()] + [v.type.dtype for v in op.results]
    return (
        is_pointwise(op.kind)
        and all(t in ("fp16", "bool") for t in types)
        and any(True for _ in op.operands())
    )
