"""Picking rows and columns of images at machine speed."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.compiled import Step
from ane_trainer.ane.simulator.loops.ir import F32, I32, I64, PTR, Function, module
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
