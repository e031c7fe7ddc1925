"""Picking rows and columns of images at machine speed."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.compiled import Step
from ane_trainer.ane.simulator.loops.ir import Function
from ane_trainer.ane.simulator.loops.team import Stage, Team, addresses, divided

Array = NDArray[Any]


def picking(x: Array, rows: Array, columns: Array, out: Array, threads: int) -> Step:
    """The step that fills out `[..., H', W']` with these rows and columns of x `[..., H, W]`.

    Both contiguous, elements of four bytes; indices on the axis.
    """
    chosen = [np.ascontiguousarray(index, dtype=np.int64) for index in (rows, columns)]
    images = x.size // (x.shape[-1] * x.shape[-2])
    sizes = (x.shape[-2], x.shape[-1], out.shape[-2], out.shape[-1])
    arguments = addresses(*(a.ctypes.data for a in (x, out, *chosen)), *sizes)
    stage = Stage(jit.address(_loop()), ctypes.addressof(arguments))
    team = Team([stage], divided(images, out.size, threads), threads)
    memory = (x, out, chosen, arguments)

    def run(_memory: object = memory) -> None:
        team.run()

    return run


@cache
def _loop() -> Any:
    """A row that shows the same row as the one before is a copy of it."""
    f = Function("pick", [("ptr", "arguments"), ("i64", "first"), ("i64", "last")])
    x, out, across_rows, across_columns = (
        f.load("ptr", f.element("ptr", "%arguments", str(i)), 8) for i in range(4)
    )
    height, width, rows, columns = (
        f.load("i64", f.element("i64", "%arguments", str(i)), 8) for i in range(4, 8)
    )
    with f.loop("%first", "%last") as image:
        before = f.variable("i64", "-1")
        with f.loop("0", rows) as i:
            row = f.load("i64", f.element("i64", across_rows, i), 8)
            source = f.element("float", x, f.mul(f.add(f.mul(image, height), row), width))
            target = f.element("float", out, f.mul(f.add(f.mul(image, rows), i), columns))
            same = f.op(f"icmp eq i64 {row}, {f.load('i64', before, 8)}")
            with f.when(same):
                last = f.element("float", target, f.op(f"sub i64 0, {columns}"))
                f.do(
                    f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {last}, i64 {f.mul(columns, '4')}, i1 false)"
                )
            with f.when(f.negate(same)), f.loop("0", columns) as j:
                column = f.load("i64", f.element("i64", across_columns, j), 8)
                value = f.load("i32", f.element("i32", source, column))
                f.store("i32", value, f.element("i32", target, j))
            f.store("i64", row, before, 8)
    text = "declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)\n" + f.text()
    return jit.compile_ir(text, ["pick"])["pick"]
