"""Reductions as LLVM loops: pointwise code (see `fuse.py`) whose values are summed or compared on the way.

Sums run in float64 and are handed out unrounded: a sum of decoded fp16 numbers is exact there while it stays
below 2^29, far above where results saturate, so the order of its terms does not matter. Where the total is
float32 (fast mode), sums run in float32; so do extremes. One result is always the work of one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ane_trainer.ane.simulator.loops.fuse import Emitter, Group, widths
from ane_trainer.ane.simulator.loops.geometry import Nest, nest

#: What can be gathered from values: their sum, the sum of their squares (unrounded), their extremes.
FOLDS = ("sum", "sum_square", "sum32", "sum_square32", "max", "min")


@dataclass(frozen=True)
class Folds:
    """Pointwise code and what is gathered: pairs of a name in `FOLDS` and a position in the code."""

    group: Group
    folds: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Layout:
    """Loops over kept axes, then over reduced axes; `columns`: the last kept axis runs in vectors."""

    nest: Nest
    kept: int
    columns: bool


def layout(shape: tuple[int, ...], axes: Sequence[int], strides: Sequence[tuple[int, ...]]) -> Layout:
    """Order the loops so that vectors run along the axis where the first array lies densest.

    `strides` has a row of element strides per array, output and total (0 along the reduced axes of a total).
    """
    steps = [abs(step) for step in strides[0]]
    order = sorted(range(len(shape)), key=lambda axis: -steps[axis])
    reduced = [a for a in order if a in axes and shape[a] > 1]
    kept = [a for a in order if a not in axes and shape[a] > 1]
    parts = [
        nest(tuple(shape[a] for a in chosen), [tuple(row[a] for a in chosen) for row in strides])
        for chosen in (kept, reduced)
    ]
    dense = [a for a in kept + reduced if steps[a]]
    columns = bool(kept) and (not reduced or (bool(dense) and min(dense, key=lambda a: steps[a]) in kept))
    if not kept:
        parts[0] = Nest((1,), tuple((0,) for _ in strides))
    both = tuple(a + b for a, b in zip(parts[0].strides, parts[1].strides, strict=True))
    outer = tuple(kept[i] for i in parts[0].outer)
    return Layout(Nest(parts[0].extents + parts[1].extents, both, outer), len(parts[0].extents), columns)


def emit(name: str, work: Folds, where: Layout, width: int) -> str:
    """LLVM IR of a loop whose arguments are the addresses of arrays, tables, outputs and totals."""
    return _FoldEmitter(name, work, where, width).function()


def declarations(*most: int) -> str:
    """The intrinsics that emitted functions call besides those of `fuse.declarations`."""
    lines = []
    for w in sorted({w for m in most for w in widths(m)} - {1}):
        lines += [
            f"declare {t} @llvm.vector.reduce.fadd.v{w}f{bits}({t}, <{w} x {t}>)"
            for t, bits in (("float", 32), ("double", 64))
        ]
        lines += [f"declare float @llvm.vector.reduce.{op}.v{w}f32(<{w} x float>)" for op in ("fmax", "fmin")]
    return "\n".join(lines) + "\n"


class _FoldEmitter(Emitter):
    """Kept loops around reduced loops; accumulators are stack slots, which LLVM keeps in registers."""

    def __init__(self, name: str, work: Folds, where: Layout, width: int) -> None:
        super().__init__(name, work.group, where.nest, width)
        self.folds, self.where = work.folds, where
        if where.columns:
            self.vector_axis = where.kept - 1

    def function(self) -> str:
        counts = self.group.num_arrays + self.group.num_tables + len(self.group.stores) + len(self.folds)
        self.head(counts)
        for width in widths(self.vector_width):
            for number, (kind, _) in enumerate(self.folds):
                self.lines.append(f"  %s{number}_{width} = alloca {_kind(kind, width)}")
        self.kept(0, [], "entry")
        self.lines.append("  ret void\n}")
        return "\n".join(self.lines) + "\n"

    def kept(self, depth: int, indices: list[str], came_from: str) -> str:
        """The loops over kept axes."""
        if depth == self.where.kept:
            return self.row(indices, came_from)
        if self.where.columns and depth == self.where.kept - 1:
            return self.strips(depth, indices, came_from, self.column)
        return self.one_loop(depth, indices, came_from, *self.bounds(depth), 1, partial(self.kept, depth + 1))

    def column(self, indices: list[str], block: str) -> str:
        """Neighbouring results, a vector of them or one, each in its lane."""
        self.start(self.width)
        block = self.reduced(self.where.kept, indices, block)
        for number, (kind, _) in enumerate(self.folds):
            self.put(number, self.held(number, kind, self.width), indices, self.width)
        return block

    def row(self, indices: list[str], block: str) -> str:
        """One result: vectors along the last reduced axis, their lanes joined at the end."""
        used = self.used_widths()
        for width in {*used, 1}:
            self.start(width)
        block = self.reduced(self.where.kept, indices, block)
        for number, (kind, _) in enumerate(self.folds):
            total = self.held(number, kind, 1)
            for width in used:
                lanes = self.held(number, kind, width)
                total = self.join(kind, total, self.across(kind, lanes, width), 1)
            self.put(number, total, indices, 1)
        return block

    def used_widths(self) -> list[int]:
        """The vectors that a row is cut into, see `static_strips`."""
        rest, used = self.nest.extents[-1], []
        for width in widths(self.vector_width)[:-1]:
            used += [width] * (rest >= width)
            rest %= width
        return used

    def reduced(self, depth: int, indices: list[str], came_from: str) -> str:
        """The loops over reduced axes."""
        last = depth == len(self.nest.extents) - 1
        if last and not self.where.columns:
            return self.strips(depth, indices, came_from, self.element)
        body = self.element if last else partial(self.reduced, depth + 1)
        return self.one_loop(depth, indices, came_from, *self.bounds(depth), 1, body)

    def body(self, indices: list[str]) -> None:
        values = self.values(indices)
        for number, (kind, position) in enumerate(self.folds):
            old = self.held(number, kind, self.width)
            new = self.join(kind, old, self.term(kind, values[position]), self.width)
            self.hold(number, kind, new, self.width)

    def start(self, width: int) -> None:
        for number, (kind, _) in enumerate(self.folds):
            first = {"max": "0xFFF0000000000000", "min": "0x7FF0000000000000"}.get(kind, "0.0")
            element = _kind(kind, 1)
            vector = first if width == 1 else "<" + ", ".join([f"{element} {first}"] * width) + ">"
            self.hold(number, kind, vector, width)

    def held(self, number: int, kind: str, width: int) -> str:
        return self.fresh(f"load {_kind(kind, width)}, ptr %s{number}_{width}")

    def hold(self, number: int, kind: str, value: str, width: int) -> None:
        self.lines.append(f"  store {_kind(kind, width)} {value}, ptr %s{number}_{width}")

    def term(self, kind: str, value: str) -> str:
        """A value as it enters the accumulator; the square of an fp16 number is exact in float32."""
        if kind in ("max", "min"):
            return value
        f = _kind("max", self.width)
        square = self.fresh(f"fmul {f} {value}, {value}") if kind.startswith("sum_square") else value
        return (
            square if kind.endswith("32") else self.fresh(f"fpext {f} {square} to {_kind(kind, self.width)}")
        )

    def join(self, kind: str, old: str, new: str, width: int) -> str:
        t = _kind(kind, width)
        if kind not in ("max", "min"):
            return self.fresh(f"fadd {t} {old}, {new}")
        better = self.fresh(f"fcmp {'ogt' if kind == 'max' else 'olt'} {t} {new}, {old}")
        truth = "i1" if width == 1 else f"<{width} x i1>"
        return self.fresh(f"select {truth} {better}, {t} {new}, {t} {old}")

    def across(self, kind: str, lanes: str, w: int) -> str:
        t = _kind(kind, w)
        if kind in ("max", "min"):
            return self.fresh(f"call nnan float @llvm.vector.reduce.f{kind}.v{w}f32({t} {lanes})")
        e, suffix = _kind(kind, 1), "f32" if kind.endswith("32") else "f64"
        return self.fresh(f"call reassoc {e} @llvm.vector.reduce.fadd.v{w}{suffix}({e} 0.0, {t} {lanes})")

    def put(self, number: int, value: str, indices: list[str], width: int) -> None:
        """Store a total, or a vector of totals, at its place."""
        kind = self.folds[number][0]
        first = self.group.num_arrays + len(self.group.stores)
        pointer = first + self.group.num_tables + number
        strides = self.nest.strides[first + number][: self.where.kept]
        element = _kind(kind, 1)
        address = self.address(pointer, strides, indices, element)
        align = 4 if element == "float" else 8
        if width == 1 or strides[-1] == 1:
            self.lines.append(f"  store {_kind(kind, width)} {value}, ptr {address}, align {align}")
            return
        for lane in range(width):
            to = self.fresh(f"getelementptr {element}, ptr {address}, i64 {lane * strides[-1]}")
            scalar = self.fresh(f"extractelement {_kind(kind, width)} {value}, i32 {lane}")
            self.lines.append(f"  store {element} {scalar}, ptr {to}, align {align}")


def _kind(kind: str, width: int) -> str:
    """The LLVM type of an accumulator."""
    element = "float" if kind in ("max", "min") or kind.endswith("32") else "double"
    return element if width == 1 else f"<{width} x {element}>"
