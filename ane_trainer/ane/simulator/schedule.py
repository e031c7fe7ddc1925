"""The order of work: which ops run alone and which pointwise ops share one fused loop.

An entry may use only what earlier entries made, or, inside a fused entry, what the entry itself made. A
pointwise op joins the earliest fused entry of its shape for which that holds; otherwise it opens a new one.
"""

from __future__ import annotations

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
    constants: set[str] = set()
    factors = folded_factors(function)
    for op in live_ops(function):
        needs = max((made_by[v.name] for v in op.operands()), default=-1)
        constant = all(v.name in constants for v in op.operands())
        fusable = _fusable(op) and not constant
        index = _place(op, needs, entries) if fusable else None
        if op.name in factors and not constant:
            index, entries[needs].factor = needs, factors[op.name]
        if index is None:
            index = len(entries)
            entries.append(Entry([], fusable, constant=constant))
        entries[index].ops.append(op)
        entries[index].reads.update(v.name for v in op.operands())
        for value in op.results:
            made_by[value.name] = index
        if constant:
            constants.update(value.name for value in op.results)
    return entries


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


def _place(op: Op, needs: int, entries: list[Entry]) -> int | None:
    """The earliest fused entry of the same shape at or after `needs` (at `needs` only if it is fused)."""
    shape = op.result.type.shape
    for index in range(max(needs, 0), len(entries)):
        entry = entries[index]
        if entry.fused and entry.ops[0].result.type.shape == shape:
            return index
    return None
