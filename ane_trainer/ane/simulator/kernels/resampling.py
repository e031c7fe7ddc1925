"""Resampling of images along the two last axes at machine speed: rows and columns picked, or interpolated in double
precision (rows, then columns) with one rounding.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.compiled import Step
from ane_trainer.ane.simulator.loops.convert import round64
from ane_trainer.ane.simulator.loops.ir import F32, F64, I32, I64, PTR, Function, Value, module
from ane_trainer.ane.simulator.loops.jit import Stage, Team, addresses, divided

Doubles = NDArray[np.float64]

_NAMES = ("low", "high", "low_part", "high_part")


class Lines:
    """Along one axis: between which elements each result lies, and the weights of both."""

    def __init__(self, at: Doubles, size: int) -> None:
        self.low = np.floor(at).astype(np.int64)
        self.high = np.minimum(self.low + 1, size - 1)
        self.high_part = np.ascontiguousarray(at - self.low)
        self.low_part = 1 - self.high_part

    def addresses(self) -> tuple[int, ...]:
        return tuple(getattr(self, name).ctypes.data for name in _NAMES)


def interpolation(x: Array, rows: Doubles, columns: Doubles, out: Array, threads: int) -> Step:
    """The step that fills out `[..., H', W']` from x `[..., H, W]`, both contiguous, at positions on both axes."""
    down, across = Lines(rows, x.shape[-2]), Lines(columns, x.shape[-1])
    images = x.size // (x.shape[-1] * x.shape[-2])
    room = np.empty((images, x.shape[-1] + out.shape[-1]), np.float64)
    sizes = (x.shape[-2], x.shape[-1], out.shape[-2], out.shape[-1])
    pointers = (array.ctypes.data for array in (x, out, room))
    arguments = addresses(*pointers, *sizes, *down.addresses(), *across.addresses())
    stage = Stage(jit.address(_interpolation_loop()), ctypes.addressof(arguments))
    team = Team([stage], divided(images, out.size, threads), threads)
    memory = (x, out, room, down, across, arguments)

    def run(_memory: object = memory) -> None:
        team.run()

    return run


@cache
def _interpolation_loop() -> Any:
    f = Function("interpolate", arguments=PTR, first=I64, last=I64)
    arguments, first, last = f.parameters
    x, out, room = (arguments.at(i, PTR).load(PTR) for i in range(3))
    height, width, rows, columns = (arguments.at(3 + i, I64).load(I64) for i in range(4))
    down, across = (
        {name: arguments.at(start + i, PTR).load(PTR) for i, name in enumerate(_NAMES)} for start in (7, 11)
    )
    with f.loop(first, last) as image:
        room_of = room.at(image * (width + columns), F64)
        line = room_of.at(width, F64)
        with f.loop(0, rows) as i:
            lines = [x.at((image * height + row) * width, F32) for row, _ in _sides(down, i)]
            parts = [part for _, part in _sides(down, i)]
            with f.loop(0, width) as j:
                above, below = (at.at(j, F32).load(F32).to(F64) for at in lines)
                room_of.at(j, F64).store(above * parts[0] + below * parts[1])
            with f.loop(0, columns) as j:
                left, right = (room_of.at(at, F64).load(F64) * part for at, part in _sides(across, j))
                line.at(j, F64).store(left + right)
            f.invoke("round64", line, out.at((image * rows + i) * columns, F32), columns)
    return jit.compile_ir(module([round64(), f.definition()]), ["interpolate"])["interpolate"]


def _sides(lines: dict[str, Value], index: Value) -> list[tuple[Value, Value]]:
    """Where both neighbours of a result lie, and their weights."""
    return [
        (lines[side].at(index, I64).load(I64), lines[f"{side}_part"].at(index, F64).load(F64))
        for side in ("low", "high")
    ]


def picking(x: Array, rows: Array, columns: Array, out: Array, threads: int) -> Step:
    """The step that fills out `[..., H', W']` with these rows and columns of x `[..., H, W]`.

    Both contiguous, elements of four bytes; indices on the axis.
    """
    chosen = [np.ascontiguousarray(index, dtype=np.int64) for index in (rows, columns)]
    images = x.size // (x.shape[-1] * x.shape[-2])
    sizes = (x.shape[-2], x.shape[-1], out.shape[-2], out.shape[-1])
    arguments = addresses(*(a.ctypes.data for a in (x, out, *chosen)), *sizes)
    stage = Stage(jit.address(_picking_loop()), ctypes.addressof(arguments))
    team = Team([stage], divided(images, out.size, threads), threads)
    memory = (x, out, chosen, arguments)

    def run(_memory: object = memory) -> None:
        team.run()

    return run


@cache
def _picking_loop() -> Any:
    """A row that shows the same row as the one before is a copy of it."""
    f = Function("pick", arguments=PTR, first=I64, last=I64)
    arguments, first, last = f.parameters
    x, out, across_rows, across_columns = (arguments.at(i, PTR).load(PTR) for i in range(4))
    height, width, rows, columns = (arguments.at(i, I64).load(I64) for i in range(4, 8))
    with f.loop(first, last) as image:
        before = f.variable(f.constant(I64, -1))
        with f.loop(0, rows) as i:
            row = across_rows.at(i, I64).load(I64)
            source = x.at((image * height + row) * width, F32)
            target = out.at((image * rows + i) * columns, F32)
            same = row.compare("eq", before.value)
            with f.when(same):
                f.copy(target, target.at(f.constant(I64, 0) - columns, F32), columns * 4)
            with f.when(~same), f.loop(0, columns) as j:
                column = across_columns.at(j, I64).load(I64)
                target.at(j, I32).store(source.at(column, I32).load(I32))
            before.set(row)
    return jit.compile_ir(module([f.definition()]), ["pick"])["pick"]
