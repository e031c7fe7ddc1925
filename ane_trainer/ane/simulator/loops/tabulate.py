"""Chains of one variable become one table.

A value that depends on a single fp16 array and constants has only 65,536 possible results. When its chain
costs more than a gather, the group reads it from a table instead; the table holds what the chain computes, so
no bit changes. The derivative of gelu, for example, is fourteen ops and becomes one gather.

    before: load x; mul; lookup erf; add; mul; mul; lookup exp; mul; ...; store
    after:  load x; lookup table; store
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.loops.group import Group, Instr
from ane_trainer.ane.simulator.numbers.fp16 import INF, decode, encode, round_half_away, to_11_bits

#: Cost of an instruction relative to an addition with its rounding (200,000 elements, AVX-512: add 28 us,
#: lookup 104 us in cache; rows `add` and `exp` of bench/ops.py measure both).
_COST = {"add": 1.0, "sub": 1.0, "mul": 1.0, "div": 2.0, "affine": 2.0, "lookup": 3.5, "mac_round": 1.3}
_CHEAP = 0.2


def evaluate(instr: Instr, sources: Sequence[Array], tables: Sequence[Array]) -> Array:
    """One instruction on arrays of decoded values: the definition that fused loops must match bit for bit."""
    s = sources
    match instr.code:
        case "const":
            return np.full((), instr.value, np.float32)
        case "add":
            return round_half_away(s[0] + s[1])
        case "sub":
            return round_half_away(s[0] - s[1])
        case "mul":
            return round_half_away(s[0] * s[1])
        case "scale":
            return np.clip(s[0] * np.float32(instr.value), -INF, INF)
        case "floor" | "ceil":
            return np.clip((np.floor if instr.code == "floor" else np.ceil)(s[0]), -INF, INF)
        case "copysign":
            return np.copysign(*s)
        case "div":
            divisor = np.copysign(np.maximum(np.abs(s[1]), np.float32(2.0**-16)), s[1] + np.float32(0))
            return round_half_away(s[0] / divisor)
        case "round":
            return round_half_away(s[0])
        case "partial":
            return to_11_bits(s[0] + s[1])
        case "product":
            return np.asarray(s[0] * s[1])
        case "fma":
            return np.asarray(s[0] + s[1] * s[2])
        case "affine":
            return round_half_away(s[0].astype(np.float64) * s[1] + s[2])
        case "max":
            return np.clip(np.where(s[0] > s[1], s[0], s[1]), -INF, INF)
        case "min":
            return np.clip(np.where(s[0] < s[1], s[0], s[1]), -INF, INF)
        case "abs":
            return np.minimum(np.abs(s[0]), INF)
        case "lookup":
            return np.asarray(tables[instr.which][encode(s[0]).view(np.uint16)])
        case "mac_round":
            clipped = np.where(np.abs(s[0]) >= 32768, np.copysign(INF, s[0]), round_half_away(s[0]))
            return np.asarray(clipped + np.float32(0), dtype=np.float32)
        case "select":
            return np.where(s[0], s[1], s[2])
        case _:
            return np.asarray(_BOOLEAN[instr.code](*s))


_BOOLEAN = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": np.not_equal, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
    "not": np.logical_not,
}  # fmt: skip


@dataclass(frozen=True)
class _Chain:
    """A value's origin: the one load it depends on (None: none, -1: several), and its instructions."""

    root: int | None
    members: frozenset[int]


def tabulate(group: Group, tables: Sequence[Array]) -> tuple[Group, list[Array]]:
    """The group with every worthwhile one-variable chain as a lookup, and the tables it then needs."""
    chains = _chains(group)
    replaced = _worthwhile(group, chains)
    found = list(tables)
    code = list(group.code)
    values = _Values(group, tables)
    for position in sorted(replaced):
        root = chains[position].root
        assert root is not None
        found.append(np.ascontiguousarray(values.of(position), dtype=np.float32))
        code[position] = Instr("lookup", (root,), len(found) - 1)
    return _without_dead(replace(group, code=tuple(code), num_tables=len(found)), found)


def _chains(group: Group) -> list[_Chain]:
    chains: list[_Chain] = []
    for position, instr in enumerate(group.code):
        if instr.code == "load":
            chains.append(_Chain(position, frozenset()))
        elif instr.code in ("load_bool", "mac_round"):
            chains.append(_Chain(-1, frozenset()))
        else:
            roots = {chains[s].root for s in instr.sources} - {None}
            root = None if not roots else roots.pop() if len(roots) == 1 else -1
            members = frozenset().union(*(chains[s].members for s in instr.sources), {position})
            chains.append(_Chain(root, members if root != -1 else frozenset()))
    return chains


def _worthwhile(group: Group, chains: list[_Chain]) -> set[int]:
    """Positions where a one-variable chain ends and costs more than the gather that replaces it.

    What the end of another chain has worked out costs nothing: the derivative of sigmoid is two ops behind it.
    """
    ends = set(group.stores)
    for position, instr in enumerate(group.code):
        if chains[position].root == -1:
            ends.update(instr.sources)
    ends = {p for p in ends if chains[p].root not in (None, -1)}
    found, there = set[int](), set[int]()
    for end in sorted(ends):
        more = _more_work(group, end, there)
        if not group.code[end].is_bool and _costs(group, more) > _COST["lookup"]:
            found.add(end)
            there.add(end)
        else:
            there |= more
    return found


def _costs(group: Group, members: Iterable[int]) -> float:
    return sum(_COST.get(group.code[m].code, _CHEAP) for m in members)


def _more_work(group: Group, end: int, there: set[int]) -> set[int]:
    """The instructions that a value needs besides those that are there."""
    found, left = set[int](), [end]
    while left:
        p = left.pop()
        if p not in found and p not in there and group.code[p].code != "load":
            found.add(p)
            left += group.code[p].sources
    return found


class _Values:
    """Results of one-variable chains over every pattern: kept for the ends of chains, others while they are needed."""

    def __init__(self, group: Group, tables: Sequence[Array]) -> None:
        self.group, self.tables = group, tables
        self.known: dict[int, Array] = {}

    def of(self, position: int) -> Array:
        """The value at a position; a chain may have thousands of instructions before it."""
        order = self._missing(position)
        last = {source: p for p in order for source in self.group.code[p].sources}
        values: dict[int, Array] = {}
        for p in order:
            values[p] = self._value(p, values)
            for source in self.group.code[p].sources:
                if last[source] == p:
                    values.pop(source, None)
        if order:
            self.known[position] = values[position]
        return self.known[position]

    def _value(self, position: int, values: dict[int, Array]) -> Array:
        instr = self.group.code[position]
        if instr.code == "load":
            return decode(np.arange(1 << 16, dtype=np.uint16))
        sources = [self.known[s] if s in self.known else values[s] for s in instr.sources]
        return np.broadcast_to(evaluate(instr, sources, self.tables), (1 << 16,))

    def _missing(self, position: int) -> list[int]:
        """What has to be worked out for a position, sources first."""
        found: set[int] = set()
        left = [position]
        while left:
            p = left.pop()
            if p not in self.known and p not in found:
                found.add(p)
                left += self.group.code[p].sources
        return sorted(found)


def _without_dead(group: Group, tables: list[Array]) -> tuple[Group, list[Array]]:
    """Drop instructions and tables that no store depends on; array numbers stay as they are."""
    live = set(group.stores)
    for position in reversed(range(len(group.code))):
        if position in live:
            live.update(group.code[position].sources)
    order = sorted(live)
    place = {old: new for new, old in enumerate(order)}
    kept = sorted({group.code[p].which for p in order if group.code[p].code == "lookup"})
    number = {old: new for new, old in enumerate(kept)}
    code = tuple(
        replace(
            group.code[p],
            sources=tuple(place[s] for s in group.code[p].sources),
            which=number[group.code[p].which] if group.code[p].code == "lookup" else group.code[p].which,
        )
        for p in order
    )
    stores = tuple(place[s] for s in group.stores)
    return Group(code, group.num_arrays, len(kept), stores), [tables[i] for i in kept]
