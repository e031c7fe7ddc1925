"""Loop nests as LLVM IR: pointwise groups (`group.py`) over strided arrays, and folds of their values.

A nest is the function `void name(ptr arguments, i64 begin, i64 end)`: the arguments are the addresses of arrays,
tables, outputs and totals, the bounds those of the outermost loop.

Sums run in float64 and are handed out unrounded: a sum of decoded fp16 numbers is exact there while it stays
below 2^29, far above where results saturate, so the order of its terms does not matter. Where the total is
float32 (fast mode), sums run in float32; so do extremes. One result is always the work of one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from ane_trainer.ane.simulator.loops import lanes
from ane_trainer.ane.simulator.loops.group import Folds, Group, Instr, within_range
from ane_trainer.ane.simulator.loops.ir import (
    F32,
    F64,
    I8,
    I64,
    PTR,
    Definition,
    Function,
    Type,
    Value,
    Variable,
)
from ane_trainer.ane.simulator.loops.nest import Layout, Nest

#: What a loop repeats, given the indices of the loops around it.
Body = Callable[[list[Value]], None]


def pointwise_loop(name: str, group: Group, nest: Nest, width: int) -> Definition:
    """The nest that computes and stores a group; `nest.strides` covers the arrays and then the outputs."""
    return _pointwise_loop(name, group, nest, width, _signs(group))


def _signs(group: Group) -> tuple[float, ...]:
    """The signs of constants: 0.0 and -0.0 are equal, and not the same code."""
    return tuple(math.copysign(1.0, instr.value) for instr in group.code)


@lru_cache(maxsize=4096)
def _pointwise_loop(
    name: str, group: Group, nest: Nest, width: int, _of_constants: tuple[float, ...]
) -> Definition:
    loop = _Loop(name, group, nest, width)
    loop.nested(0, [], loop.element)
    return loop.function.definition()


def fold_loop(name: str, work: Folds, where: Layout, width: int) -> Definition:
    """The nest that gathers values of a group (and stores what it stores): loops over the kept axes around loops
    over the reduced ones.
    """
    return _fold_loop(name, work, where, width, _signs(work.group))


@lru_cache(maxsize=4096)
def _fold_loop(
    name: str, work: Folds, where: Layout, width: int, _of_constants: tuple[float, ...]
) -> Definition:
    loop = _FoldLoop(name, work, where, width)
    loop.kept(0, [])
    return loop.function.definition()


def vector_widths(most: int) -> list[int]:
    """The vector widths that a loop of up to `most` lanes uses, widest first."""
    return [*(most >> i for i in range(most.bit_length() - 2)), 1] if most > 2 else [most, 1][:most]


class _Loop:
    """A nest under construction; `width` is the number of lanes of the code being written."""

    def __init__(self, name: str, group: Group, nest: Nest, width: int, totals: int = 0) -> None:
        self.function = Function(name, arguments=PTR, begin=I64, end=I64)
        arguments, *self.bounds = self.function.parameters
        self.group, self.nest, self.widest, self.width = group, nest, width, width
        count = group.num_arrays + group.num_tables + len(group.stores) + totals
        self.pointers = [arguments.at(i, PTR).load(PTR) for i in range(count)]
        self.within = within_range(group.code)
        self.vector_axis = len(nest.extents) - 1  # lanes are neighbours along this axis

    def nested(self, depth: int, indices: list[Value], body: Body) -> None:
        """The loops over axis `depth` and the ones within, the last in vectors."""
        if depth == len(self.nest.extents) - 1:
            self.strips(depth, indices, body)
        else:
            self.one(depth, indices, partial(self.nested, depth + 1, body=body))

    def one(self, depth: int, indices: list[Value], body: Body) -> None:
        """The loop over axis `depth`, element by element."""
        first, last = self.bounds if depth == 0 else (0, self.nest.extents[depth])
        self.loop(indices, first, last, 1, body)

    def loop(
        self, indices: list[Value], first: Value | int, last: Value | int, step: int, body: Body
    ) -> None:
        """One loop around `body`."""
        with self.function.loop(first, last, step) as index:
            body([*indices, index])

    def strips(self, depth: int, indices: list[Value], body: Body) -> None:
        """The loop over axis `depth` in whole vectors, then what they leave: one by one, or, where the extent is
        known, in ever shorter vectors.
        """
        if depth > 0:
            position = 0
            for width in vector_widths(self.widest):
                end = position + (self.nest.extents[depth] - position) // width * width
                if end > position:
                    self.width = width
                    self.loop(indices, position, end, width, body)
                position = end
            return
        begin, end_ = self.bounds
        middle = begin + (end_ - begin & -self.widest)
        self.width = self.widest
        self.loop(indices, begin, middle, self.widest, body)
        if self.widest > 1:
            self.width = 1
            self.loop(indices, middle, end_, 1, body)

    def element(self, indices: list[Value]) -> None:
        """One vector (or element) of the computation."""
        self.values(indices)

    def values(self, indices: list[Value]) -> list[Value]:
        """Loads, code, then stores, so that in-place is safe; the value of every position."""
        values: list[Value] = []
        for instr in self.group.code:
            values.append(self.value(instr, [values[i] for i in instr.sources], indices))
        for number, position in enumerate(self.group.stores):
            kind, place = self.group.code[position], self.group.num_arrays + number
            value = values[position].to(I8) if kind.is_bool else values[position]
            pointer = self.pointers[place + self.group.num_tables]
            self.store(value, pointer, self.nest.strides[place], indices, self.vector_axis)
        return values

    def value(self, instr: Instr, s: list[Value], indices: list[Value]) -> Value:
        """The result of one instruction on its sources."""
        match instr.code:
            case "load":
                return self.load(instr.which, indices, F32)
            case "load_bool":
                return self.load(instr.which, indices, I8).compare("ne", 0)
            case "load_of_four":
                return self.load_of_four(instr.which, indices, int(instr.value))
            case "load_wide":
                return lanes.mean(self.load(instr.which, indices, F64), instr.value)
            case "const":
                return self.function.constant(F32.of(self.width), instr.value)
            case "scale":
                return lanes.saturated(s[0] * instr.value)
            case "lookup":
                return lanes.looked_up(s[0], self.pointers[self.group.num_arrays + instr.which])
        if instr.code in _LIMITED:
            found = _LIMITED[instr.code](*s)
            return found if all(self.within[i] for i in instr.sources) else lanes.saturated(found)
        return _PLAIN[instr.code](*s)

    def address(self, pointer: Value, strides: Sequence[int], indices: list[Value], element: Type) -> Value:
        """Where an element lies."""
        offset: Value | int = 0
        for index, stride in zip(indices, strides, strict=True):
            if stride:
                offset = offset + index * stride if isinstance(offset, Value) else index * stride
        return pointer.at(offset, element)

    def load(self, which: int, indices: list[Value], element: Type, offset: int = 0) -> Value:
        """Elements of an array, one a lane, `offset` after those of its strides."""
        strides, width = self.nest.strides[which], self.width
        pointer = self.address(self.pointers[which], strides, indices, element)
        pointer = pointer.at(offset, element) if offset else pointer
        step = strides[self.vector_axis]
        if width == 1 or step == 1:
            return pointer.load(element.of(width))
        if step == 0:
            return pointer.load(element).splat(width)
        return lanes.joined([pointer.at(lane * step, element).load(element) for lane in range(width)])

    def load_of_four(self, which: int, indices: list[Value], offset: int) -> Value:
        """The elements `offset` after those of an array that takes each fourth: four such share their loads."""
        strides, width = self.nest.strides[which], self.width
        if width == 1 or strides[self.vector_axis] != 4 or not 0 <= offset < 4:
            return self.load(which, indices, F32, offset)
        pointer = self.address(self.pointers[which], strides, indices, F32)
        return pointer.load(F32.of(4 * width)).each(offset, 4, width)

    def store(
        self, value: Value, pointer: Value, strides: Sequence[int], indices: list[Value], axis: int
    ) -> None:
        """Write the lanes of a value along `axis`."""
        element = value.type.of(1)
        place = self.address(pointer, strides, indices, element)
        if value.type.lanes == 1 or strides[axis] == 1:
            place.store(value)
            return
        for lane in range(value.type.lanes):
            place.at(lane * strides[axis], element).store(value.lane(lane))


#: Instructions whose result is within the engine's range if their sources are.
_LIMITED: dict[str, Callable[..., Value]] = {
    "floor": lambda x: x.call("floor"),
    "ceil": lambda x: x.call("ceil"),
    "abs": lambda x: x.call("fabs"),
    "max": lambda x, y: (x > y).choose(x, y),
    "min": lambda x, y: (x < y).choose(x, y),
}

#: What the other instructions compute.
_PLAIN: dict[str, Callable[..., Value]] = {
    "add": lambda x, y: lanes.rounded(x + y),
    "sub": lambda x, y: lanes.rounded(x - y),
    "mul": lambda x, y: lanes.rounded(x * y),
    "div": lanes.quotient,
    "affine": lanes.affine,
    "round": lanes.rounded,
    "copysign": lambda x, sign: x.call("copysign", sign),
    "partial": lambda x, y: lanes.to_11_bits(x + y),
    "product": lambda x, y: x * y,
    "fma": lambda total, x, y: total + x * y,
    "mac_round": lanes.mac_rounded,
    "mac_start": lanes.mac_start,
    "mac_add": lanes.mac_add,
    "mac_end": lanes.mac_end,
    "select": lambda condition, x, y: condition.choose(x, y),
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "not": lambda x: x.compare("eq", False),
    **{
        how: partial(lambda how, x, y: x.compare(how, y), how) for how in ("lt", "le", "gt", "ge", "eq", "ne")
    },
}


class _FoldLoop(_Loop):
    """Kept loops around reduced loops, with an accumulator for each fold."""

    def __init__(self, name: str, work: Folds, where: Layout, width: int) -> None:
        super().__init__(name, work.group, where.nest, width, len(work.folds))
        self.folds, self.where = work.folds, where
        self.sums: dict[int, list[Variable]] = {}  # by number of lanes
        if where.columns:
            self.vector_axis = where.kept - 1

    def kept(self, depth: int, indices: list[Value]) -> None:
        """The loops over kept axes."""
        if depth == self.where.kept:
            self.row(indices)
        elif self.where.columns and depth == self.where.kept - 1:
            self.strips(depth, indices, self.column)
        else:
            self.one(depth, indices, partial(self.kept, depth + 1))

    def column(self, indices: list[Value]) -> None:
        """Neighbouring results, a vector of them or one, each in its lane."""
        self.start(self.width)
        self.reduced(self.where.kept, indices)
        for number, total in enumerate(self.sums[self.width]):
            self.put(number, total.value, indices)

    def row(self, indices: list[Value]) -> None:
        """One result: vectors along the last reduced axis, their lanes joined at the end."""
        used = self.used_widths()
        for width in (1, *used):
            self.start(width)
        self.reduced(self.where.kept, indices)
        for number, (kind, _) in enumerate(self.folds):
            total = self.sums[1][number].value
            for width in used:
                total = _joined(kind, total, _across(kind, self.sums[width][number].value))
            self.put(number, total, indices)

    def used_widths(self) -> list[int]:
        """The vectors that a row is cut into, see `strips`."""
        rest, used = self.nest.extents[-1], []
        for width in vector_widths(self.widest)[:-1]:
            used += [width] * (rest >= width)
            rest %= width
        return used

    def reduced(self, depth: int, indices: list[Value]) -> None:
        """The loops over reduced axes."""
        if not self.where.columns:
            self.nested(depth, indices, self.element)
        else:
            last = depth == len(self.nest.extents) - 1
            self.one(depth, indices, self.element if last else partial(self.reduced, depth + 1))

    def element(self, indices: list[Value]) -> None:
        values = self.values(indices)
        for total, (kind, position) in zip(self.sums[self.width], self.folds, strict=True):
            total.set(_joined(kind, total.value, _term(kind, values[position])))

    def start(self, width: int) -> None:
        """Fresh accumulators."""
        first = {"max": float("-inf"), "min": float("inf")}
        self.sums[width] = [
            self.function.variable(self.function.constant(_kind(kind).of(width), first.get(kind, 0.0)))
            for kind, _ in self.folds
        ]

    def put(self, number: int, value: Value, indices: list[Value]) -> None:
        """Store a total, or a vector of totals, at its place."""
        place = self.group.num_arrays + len(self.group.stores) + number
        strides = self.nest.strides[place][: self.where.kept]
        self.store(value, self.pointers[place + self.group.num_tables], strides, indices, -1)


def _kind(fold: str) -> Type:
    """The type of an accumulator."""
    return F32 if fold in ("max", "min") or fold.endswith("32") else F64


def _term(fold: str, value: Value) -> Value:
    """A value as it enters the accumulator; the square of an fp16 number is exact in float32."""
    if fold in ("max", "min"):
        return value
    square = value * value if fold.startswith("sum_square") else value
    return square if fold.endswith("32") else square.to(F64)


def _joined(fold: str, old: Value, new: Value) -> Value:
    if fold in ("max", "min"):
        return (new > old if fold == "max" else new < old).choose(new, old)
    return old + new


def _across(fold: str, value: Value) -> Value:
    """All lanes of an accumulator as one number."""
    return value.reduce(f"f{fold}", "nnan ") if fold in ("max", "min") else value.reduce("fadd", "reassoc ")
