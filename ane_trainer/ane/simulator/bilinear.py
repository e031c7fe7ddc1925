"""Interpolation along the two last axes at machine speed: rows in double precision, then columns, one rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator import jit
from ane_trainer.ane.simulator.ir import Function
from ane_trainer.ane.simulator.rounding import round64_text

Array = NDArray[Any]
F64 = NDArray[np.float64]

_ALONE = 1 << 16
"""Results below which one thread is faster than two."""


class Lines:
    """Along one axis: between which elements each result lies, and the weights of both."""

    def __init__(self, at: F64, size: int) -> None:
        self.low = np.floor(at).astype(np.int64)
        self.high = np.minimum(self.low + 1, size - 1)
        self.high_part = np.ascontiguousarray(at - self.low)
        self.low_part = 1 - self.high_part

    def addresses(self) -> tuple[int, ...]:
        return tuple(a.ctypes.data for a in (self.low, self.high, self.low_part, self.high_part))


def interpolate_into(x: Array, rows: F64, columns: F64, out: Array, threads: int) -> None:
    """out `[..., H', W']` from contiguous x `[..., H, W]` at positions on both axes."""
    down, across = Lines(rows, x.shape[-2]), Lines(columns, x.shape[-1])
    images = x.size // (x.shape[-1] * x.shape[-2])
    parts = min(threads, images) if out.size >= _ALONE else 1
    room = np.empty((parts, x.shape[-1] + out.shape[-1]), np.float64)
    sizes = (x.shape[-2], x.shape[-1], out.shape[-2], out.shape[-1])
    pieces = [
        (
            x.ctypes.data,
            out.ctypes.data,
            line.ctypes.data,
            *sizes,
            *down.addresses(),
            *across.addresses(),
            a,
            b,
        )
        for line, (a, b) in zip(room, pairwise(images * i // parts for i in range(parts + 1)), strict=True)
    ]
    jit.run_parallel(_loop(), pieces, threads)


@cache
def _loop() -> Callable[..., None]:
    names = ("low", "high", "low_part", "high_part")
    pointers = ["x", "out", "room"], [f"{axis}_{name}" for axis in ("down", "across") for name in names]
    sizes = ("height", "width", "rows", "columns")
    f = Function(
        "interpolate",
        [("ptr", n) for n in pointers[0]] + [("i64", n) for n in sizes] + [("ptr", n) for n in pointers[1]]
        + [("i64", "first"), ("i64", "last")],
    )  # fmt: skip
    line = f.element("double", "%room", "%width")
    with f.loop("%first", "%last") as image, f.loop("0", "%rows") as i:
        lines, parts = [], []
        for side in ("low", "high"):
            row = f.load("i64", f.element("i64", f"%down_{side}", i), 8)
            lines.append(f.element("float", "%x", f.mul(f.add(f.mul(image, "%height"), row), "%width")))
            parts.append(f.load("double", f.element("double", f"%down_{side}_part", i), 8))
        with f.loop("0", "%width") as j:
            terms = []
            for at, part in zip(lines, parts, strict=True):
                value = f.op(f"fpext float {f.load('float', f.element('float', at, j))} to double")
                terms.append(f.op(f"fmul double {value}, {part}"))
            f.store("double", f.op(f"fadd double {terms[0]}, {terms[1]}"), f.element("double", "%room", j), 8)
        with f.loop("0", "%columns") as j:
            terms = []
            for side in ("low", "high"):
                column = f.load("i64", f.element("i64", f"%across_{side}", j), 8)
                value = f.load("double", f.element("double", "%room", column), 8)
                part = f.load("double", f.element("double", f"%across_{side}_part", j), 8)
                terms.append(f.op(f"fmul double {value}, {part}"))
            f.store("double", f.op(f"fadd double {terms[0]}, {terms[1]}"), f.element("double", line, j), 8)
        to = f.element("float", "%out", f.mul(f.add(f.mul(image, "%rows"), i), "%columns"))
        f.do(f"call void @round64(ptr {line}, ptr {to}, i64 %columns)")
    text = f.text().replace(
        "ptr %x, ptr %out, ptr %room", "ptr noalias %x, ptr noalias %out, ptr noalias %room"
    )
    return jit.compile_ir(round64_text() + text, ["interpolate"])["interpolate"]
