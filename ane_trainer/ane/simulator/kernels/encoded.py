"""Products whose weight is stored as affine int8: the engine encodes the other operand as 16 times its value in fp16.

constexpr_affine_dequantize(data int8, scale) -> w; matmul(x, w) -> y

An element of x beyond 65504 / 16 = 4094 becomes infinite, and with it every sum that it enters with a weight other
than 0: 4094 is the largest value kept, 4096 is not, on M1 Max, M2 Pro and M5 Pro alike, whatever the size or the
weights (ANEForge issues 115 and 153, `_targets.Q4_X16_SAT`). Which sign a sum of infinities of both signs has is
not published: here the one that more of them have, plus in a tie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import bind
from ane_trainer.ane.mil.program import Function, Op, Value
from ane_trainer.ane.simulator.memory.fp16 import INF

Array = NDArray[Any]
Step = Callable[[], None]

LARGEST = 65504 / 16
"""The largest magnitude that the encoding keeps."""


def encoded_products(function: Function) -> frozenset[str]:
    """The matrix products of a function whose right operand is stored as affine int8, by name."""
    stored = {
        op.result.name for op in function.ops if op.kind == "constexpr_affine_dequantize"
    }  # fmt: skip
    return frozenset(
        op.name
        for op in function.ops
        if op.kind == "matmul" and isinstance(y := op.arg("y"), Value) and y.name in stored
    )


def with_encoding(op: Op, step: Step, x: Array, y: Array, out: Array) -> Step:
    """The product `step`, then infinity where an element of x beyond the encoding entered a sum."""
    call = bind(op.kind, dict(op.args))
    left = np.swapaxes(x, -1, -2) if call.flag("transpose_x") else x
    right = np.swapaxes(y, -1, -2) if call.flag("transpose_y") else y

    def product() -> None:
        step()
        if np.abs(left).max(initial=0) > LARGEST:
            lost = np.where(np.abs(left) > LARGEST, np.sign(left), np.float32(0))
            signs = np.sign(right)
            entered = np.abs(lost) @ np.abs(signs)
            out[...] = np.where(entered > 0, np.where(lost @ signs < 0, -INF, INF), out)

    return product
