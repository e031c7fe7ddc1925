"""Interpolation along the two last axes at machine speed: rows in double precision, then columns, one rounding."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.compiled import Step
from ane_trainer.ane.simulator.loops.ir import Function
from ane_trainer.ane.simulator.loops.rounding import round64_text
from ane_trainer.ane.simulator.loops.team import Stage, Team, addresses, divided

Array = NDArray[Any]
F64 = NDArray[np.float64]

_NAMES = ("low", "high", "low_part", "high_part")


class Lines:
    """Along one axis: between which elements each result lies, and the weights of both."""

    def __init__(self, at: F64, size: int) -> None:
        self.low = np.floor(at).astype(np.int64)
        self.high = np.minimum(self.low + 1, size - 1)
        self.high_part = np.ascontiguousarray(at - self.low)
        self.low_part = 1 - self.high_part

    def addresses(self) -> tuple[int, ...]:
        return tuple(getattr(self, name).ctypes.data for name in _NAMES)


def interpolation(x: Array, rows: F64, columns: F64, out: Array, threads: int) -> Step:
    """The step that fills out `[..., H', W']` from x `[..., H, W]`, both contiguous, at positions on both axes."""
    down, across = Lines(rows, x.shape[-2]), Lines(columns, x.shape[-1])
    images = x.size // (x.shape[-1] * x.shape[-2])
    room = np.empty((images, x.shape[-1] + out.shape[-1]), np.float64)
    sizes = (x.shape[-2], x.shape[-1], out.shape[-2], out.shape[-1])
    pointers = (array.ctypes.data for array in (x, out, room))
    arguments = addresses(*pointers, *sizes, *down.addresses(), *across.addresses())
    stage = Stage(jit.address(_loop()), ctypes.addressof(arguments))
    team = Team([stage], divided(images, out.size, threads), threads)
    memory = (x, out, room, down, across, arguments)

    def run(_memory: object = memory) -> None:
        team.run()

    return run


@cache
def _loop() -> Any:
    f = Function("interpolate", [("ptr", "arguments"), ("i64", "first"), ("i64", "last")])

    def argument(kind: str, number: int) -> str:
        return f.load(kind, f.element("i64", "%arguments", str(number)), 8)

    x, out, room = (argument("ptr", i) for i in range(3))
    height, width, rows, columns = (argument("i64", 3 + i) for i in range(4))
    down = {name: argument("ptr", 7 + i) for i, name in enumerate(_NAMES)}
    across = {name: argument("ptr", 11 + i) for i, name in enumerate(_NAMES)}

    def mix(index: str, lines: dict[str, str], value: Any) -> str:
        """The two neighbours, weighted."""
        terms = []
        for side in ("low", "high"):
            place = f.load("i64", f.element("i64", lines[side], index), 8)
            part = f.load("double", f.element("double", lines[f"{side}_part"], index), 8)
            terms.append(f.op(f"fmul double {value(side, place)}, {part}"))
        return f.op(f"fadd double {terms[0]}, {terms[1]}")

    with f.loop("%first", "%last") as image:
        room_of = f.element("double", room, f.mul(image, f.add(width, columns)))
        line = f.element("double", room_of, width)
        with f.loop("0", rows) as i:
            _rows_between(f, x, f.mul(image, height), width, i, down, room_of)
            with f.loop("0", columns) as j:
                mixed = mix(j, across, lambda _, at: f.load("double", f.element("double", room_of, at), 8))
                f.store("double", mixed, f.element("double", line, j), 8)
            to = f.element("float", out, f.mul(f.add(f.mul(image, rows), i), columns))
            f.do(f"call void @round64(ptr {line}, ptr {to}, i64 {columns})")
    return jit.compile_ir(round64_text() + f.text(), ["interpolate"])["interpolate"]


def _rows_between(
    f: Function, x: str, above: str, width: str, i: str, down: dict[str, str], room: str
) -> None:
    """`room` = the two rows about result row i, weighted."""
    lines, parts = [], []
    for side in ("low", "high"):
        row = f.load("i64", f.element("i64", down[side], i), 8)
        lines.append(f.element("float", x, f.mul(f.add(above, row), width)))
        parts.append(f.load("double", f.element("double", down[f"{side}_part"], i), 8))
    with f.loop("0", width) as j:
        terms = []
        for at, part in zip(lines, parts, strict=True):
            value = f.op(f"fpext float {f.load('float', f.element('float', at, j))} to double")
            terms.append(f.op(f"fmul double {value}, {part}"))
        f.store("double", f.op(f"fadd double {terms[0]}, {terms[1]}"), f.element("double", room, j), 8)
