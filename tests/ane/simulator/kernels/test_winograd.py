"""M5's 3x3 convolution: equal to the direct one where nothing rounds, published errors in test_fidelity.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import simulate

Array = NDArray[Any]


def convolve(
    x: Array,
    w: Array,
    bias: Array | None,
    chip: str,
    *,
    runtime: bool = False,
    fidelity: str = "exact",
    **args: Any,
) -> Array:
    b = Builder()
    feeds = {"x": x}
    value = b.input("x", TensorType("fp16", x.shape))
    weight: Any = from_array(w)
    if runtime:
        weight, feeds["w"] = b.input("w", TensorType("fp16", w.shape)), w
    start = {} if bias is None else {"bias": from_array(bias)}
    result = b.op("conv", x=value, weight=weight, pad_type="custom", **start, **args)
    program = Program((b.finish((result,)),))
    return simulate(program, feeds, chip=chip, fidelity=fidelity, path=None)[result.name]


def integers(rng: np.random.Generator, *shape: int, least: int = -8) -> Array:
    return rng.integers(least, 9, shape).astype(np.float16)


@given(
    seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), inputs=st.integers(1, 5), outputs=st.integers(1, 5),
    height=st.integers(3, 9), width=st.integers(3, 9), pad=st.tuples(*[st.integers(0, 2)] * 4),
    biased=st.booleans(), runtime=st.booleans(),
)  # fmt: skip
@settings(max_examples=40)
def test_small_integers_come_out_as_from_the_direct_form(
    seed: int, batch: int, inputs: int, outputs: int, height: int, width: int, pad: tuple[int, ...], biased: bool,
    runtime: bool,
) -> None:  # fmt: skip
    """Sums of two integers below 2048 and halves of sums below 1024 are fp16 numbers: no operand is rounded."""
    rng = np.random.default_rng(seed)
    x, w = integers(rng, batch, inputs, height, width), integers(rng, outputs, inputs, 3, 3)
    bias = integers(rng, outputs) if biased else None
    by_m5, by_m4 = (convolve(x, w, bias, chip, runtime=runtime, pad=list(pad)) for chip in ("m5", "m4"))
    np.testing.assert_array_equal(by_m5, by_m4)


def test_operands_are_rounded_on_m5_and_not_on_m4() -> None:
    """2048 + 1 is no fp16 number: half away it becomes 2050."""
    x, w = np.zeros((1, 1, 3, 4), np.float16), np.zeros((1, 1, 3, 3), np.float16)
    x[0, 0, 0], w[0, 0, 0] = (0, 2048, 1, 0), (0, 1, 0)
    assert convolve(x, w, None, "m4", pad=[0] * 4).tolist() == [[[[2048, 1]]]]
    # t = -1, 2050, -2047, 2048 and u = 0, 1/2, -1/2, 0: 4097 / 2, which rounds to 2048, and 3 / 2
    assert convolve(x, w, None, "m5", pad=[0] * 4).tolist() == [[[[2048, 1.5]]]]


@pytest.mark.parametrize(
    ("shape", "kernel", "args"),
    [
        ((1, 4, 8, 8), (4, 4, 3, 3), {"strides": [2, 2], "pad": [1] * 4}),
        ((1, 4, 8, 8), (4, 4, 3, 3), {"dilations": [2, 2], "pad": [2] * 4}),
        ((1, 4, 8, 8), (4, 2, 3, 3), {"groups": 2, "pad": [1] * 4}),
        ((1, 4, 8, 8), (4, 4, 5, 5), {"pad": [2] * 4}),
        ((1, 4, 8), (4, 4, 3), {"pad": [1] * 2}),
    ],
)
def test_other_convolutions_are_direct_on_m5(shape: Any, kernel: Any, args: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float16) for s in (shape, kernel))
    np.testing.assert_array_equal(convolve(x, w, None, "m5", **args), convolve(x, w, None, "m4", **args))


@pytest.mark.parametrize("chip", ["m5", "m5-pro", "m6"])
def test_errors_stay_within_the_operands_roundings(chip: str) -> None:
    """Three products of a row, each operand within 2^-11 of itself, all sums below the norm of what is summed."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 32, 12, 13)).astype(np.float16)
    w = (rng.standard_normal((16, 32, 3, 3)) / 17).astype(np.float16)
    got = convolve(x, w, None, chip, pad=[1] * 4)
    wide = [torch.from_numpy(a.astype(np.float64)) for a in (x, w)]
    want = torch.conv2d(*wide, padding=1).numpy()
    assert 3e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 6e-4
    direct = convolve(x, w, None, "m4", pad=[1] * 4)
    assert not np.array_equal(got, direct)


def test_fast_is_the_machines_own_convolution_on_every_chip() -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float16) for s in ((1, 4, 8, 8), (4, 4, 3, 3)))
    got = [convolve(x, w, None, chip, fidelity="fast", pad=[1] * 4) for chip in ("m5", "m4")]
    np.testing.assert_array_equal(*got)
