# ruff: noqa: E501  (MIL text as it is printed)
"""The printer: exact text of a small program, what goes to the blob, names, numbers, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Literal, Program, TensorType, literal
from ane_trainer.ane.mil.text.printer import goes_to_blob, literal_text, number_text, print_program, quote
from ane_trainer.ane.mil.weights import from_array

LINEAR = """\
program(1.3)
[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3520.4.1"}, {"coremlc-version", "3520.5.1"}})]
{
    func main<ios18>(tensor<fp16, [2, 3]> x) {
        bool t0_transpose_x = const()[name = string("t0_transpose_x"), val = bool(false)];
        tensor<fp16, [3, 2]> fc_weight = const()[name = string("fc_weight"), val = tensor<fp16, [3, 2]>(BLOBFILE(path = string("@model_path/weights.bin"), offset = uint64(64)))];
        tensor<fp16, [2, 2]> t0 = matmul(transpose_x = t0_transpose_x, x = x, y = fc_weight)[name = string("t0")];
        tensor<fp16, [1, 2]> t1_y = const()[name = string("t1_y"), val = tensor<fp16, [1, 2]>(BLOBFILE(path = string("@model_path/weights.bin"), offset = uint64(192)))];
        tensor<fp16, [2, 2]> t1 = add(x = t0, y = t1_y)[name = string("t1")];
        fp16 t2_y = const()[name = string("t2_y"), val = fp16(0x1.8p+0)];
        tensor<fp16, [2, 2]> t2 = mul(x = t1, y = t2_y)[name = string("t2")];
        tensor<int32, [2]> t3_perm = const()[name = string("t3_perm"), val = tensor<int32, [2]>([1, 0])];
        tensor<fp16, [2, 2]> t3 = transpose(perm = t3_perm, x = t2)[name = string("t3")];
    } -> (t3, t2);
}
"""


def test_text_of_a_linear_layer() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (2, 3)))
    weight = from_array(np.arange(6, dtype=np.float16).reshape(3, 2), name="fc.weight")
    y = b.op("matmul", x=x, y=weight, transpose_x=False)
    y = b.op("mul", x=b.op("add", x=y, y=from_array(np.ones((1, 2), np.float16))), y=1.5)
    text, blob = print_program(Program((b.finish((b.op("transpose", x=y, perm=[1, 0]), y)),)))
    assert text == LINEAR
    assert len(blob) == 64 + 2 * 128
    assert blob[128:140] == np.arange(6, dtype=np.float16).tobytes()


@pytest.mark.parametrize(
    ("array", "dtype", "expected"),
    [
        (np.ones(1), "fp16", True), (np.ones(()), "fp16", False), (np.ones(64), "int32", False),
        (np.ones(65), "int32", True),
        (np.ones(65), "bool", False), (np.ones(65), "int64", False), (np.ones((4, 20)), "uint4", True),
        (np.array(np.nan), "fp16", False),
    ],
)  # fmt: skip
def test_what_goes_to_the_blob(array: np.ndarray, dtype: str, expected: bool) -> None:
    """As ANEForge: floating tensors, not scalars or short integer vectors; bool and int64 have no blob code."""
    assert goes_to_blob(from_array(array, dtype=dtype)) is expected


def test_a_nan_with_a_payload_goes_to_the_blob() -> None:
    assert goes_to_blob(Literal(TensorType("fp16"), b"\x01\x7e"))


@given(st.floats(width=32))
def test_numbers_are_hexadecimal_and_exact(value: float) -> None:
    text = number_text(value)
    again = float.fromhex(text)
    assert again == value or (math.isnan(again) and math.isnan(value))
    assert math.copysign(1, again) == math.copysign(1, value) or math.isnan(value)


def test_numbers() -> None:
    assert [number_text(v) for v in (True, -3, 1.0, 0.0, -0.0, 2.0**-24, math.inf)] == [
        "true", "-3", "0x1p+0", "0x0p+0", "-0x0p+0", "0x1p-24", "inf",
    ]  # fmt: skip
    assert literal_text(from_array(np.arange(6).reshape(2, 3), dtype="int32")) == (
        "tensor<int32, [2, 3]>([[0, 1, 2], [3, 4, 5]])"
    )
    assert literal_text(literal(("a", 'b"'), "string")) == 'tensor<string, [2]>(["a", "b\\""])'
    assert quote("é\n") == '"é\\n"'


def test_constants_of_one_name_and_value_are_written_once() -> None:
    b = Builder()
    x, w = b.input("x", TensorType("fp16", (2, 2))), from_array(np.ones((2, 2), np.float16), name="w")
    other = from_array(np.zeros((2, 2), np.float16), name="w")
    y = b.op("add", x=b.op("mul", x=b.op("mul", x=x, y=w), y=w), y=other)
    text, _ = print_program(Program((b.finish((y,)),)))
    assert text.count("w = const()") == 1
    assert text.count("w_1 = const()") == 1


@pytest.mark.parametrize("name", ["x", "_1", "a.b", "1x", "tensor", "fp16", "", "x\n"])
def test_names_that_cannot_be_written_are_refused(name: str) -> None:
    b = Builder()
    x = b.input(name, TensorType("fp16", (2,)))
    program = Program((b.finish((b.op("relu", x=x),)),))
    if name in ("x", "_1"):
        assert f"> {name})" in print_program(program)[0]
    else:
        with pytest.raises(ProgramError, match="Rename the value"):
            print_program(program)


def test_another_blob_path() -> None:
    b = Builder()
    value = b.op("add", x=b.input("x", TensorType("fp16", (2,))), y=from_array(np.ones(2, np.float16)))
    text, _ = print_program(Program((b.finish((value,)),)), blob_path="@model_path/weights/weight.bin")
    assert 'BLOBFILE(path = string("@model_path/weights/weight.bin"), offset = uint64(64))' in text
