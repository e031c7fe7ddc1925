"""Products with int8 weights lose activations beyond 4094; other products do not."""

from __future__ import annotations

import numpy as np
import pytest

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, TensorType, Value
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import make_context, prepare

WEIGHT = np.array([[1, 0, -2], [1, 3, 0]], np.int8)  # [K, N], a scale for each row


def product(*, stored: bool, transposed: bool = False) -> Function:
    b = Builder()
    x = b.input("x", TensorType("fp16", (2, 2)))
    data = np.ascontiguousarray(WEIGHT.T) if transposed else WEIGHT
    weight: Value | object = from_array(data.astype(np.float16) / 64)
    if stored:
        weight = b.op(
            "constexpr_affine_dequantize",
            quantized_data=from_array(data),
            scale=from_array(np.full(len(data), 1 / 64, np.float16)),
            zero_point=from_array(np.zeros(len(data), np.int8)),
            axis=0,
        )
    return b.finish((b.op("matmul", x=x, y=weight, transpose_x=False, transpose_y=transposed, name="y"),))


def run(function: Function, *rows: tuple[float, float], chip: str = "m5") -> list[list[float]]:
    result = prepare(function, make_context(chip)).run({"x": np.array(rows, np.float16)})
    return np.asarray(result[function.outputs[0].name], np.float64).tolist()


@pytest.mark.parametrize("chip", ["m1-max", "m2-pro", "m5-pro"])
def test_4094_is_kept_and_4096_is_not(chip: str) -> None:
    function = product(stored=True)
    assert run(function, (4094, 1), (1, -4094), chip=chip)[0] == [64, 0.046875, -127.9375]
    got = run(function, (4096, 1), (1, -30000), chip=chip)
    assert got == [[np.inf, 0.046875, -np.inf], [-np.inf, -np.inf, -0.03125]]


def test_weights_of_rows_as_aneforge_stores_them() -> None:
    assert run(product(stored=True, transposed=True), (5000, 1), (2, 2)) == [
        [np.inf, 0.046875, -np.inf],
        [0.0625, 0.09375, -0.0625],
    ]


def test_fp16_weights_take_every_activation() -> None:
    assert run(product(stored=False), (4096, 0), (0, 30000)) == [[64, 0, -128], [468.75, 1406, 0]]
