"""Convolutions with runtime weights: forward and all gradients against torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ane.compiler.lower.harness import check, gradients, lowered, normal

CONVS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    """A convolution's shapes and settings, at least one output element."""
    axes = draw(st.sampled_from([1, 2, 2, 2, 3]))
    small = st.integers(1, 3)

    def per_axis(strategy: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(strategy) for _ in range(axes))

    kernel, stride, pad, dilation = (
        per_axis(small),
        per_axis(small),
        per_axis(st.integers(0, 2)),
        per_axis(st.integers(1, 2)),
    )
    groups = draw(small)
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 4))
        for k, p, d in zip(kernel, pad, dilation, strict=True)
    )
    return {
        "axes": axes, "kernel": kernel, "stride": stride, "pad": pad, "dilation": dilation, "groups": groups,
        "size": size, "batch": draw(small), "cin": groups * draw(small), "cout": groups * draw(small),
    }  # fmt: skip


@settings(max_examples=25)
@given(geometries())
def test_convolution_and_its_gradients(geo: dict[str, Any]) -> None:
    x = normal(geo["batch"], geo["cin"], *geo["size"])
    w = normal(geo["cout"], geo["cin"] // geo["groups"], *geo["kernel"], seed=1)
    b = normal(geo["cout"], seed=2)

    def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return CONVS[geo["axes"]](x, w, b, geo["stride"], geo["pad"], geo["dilation"], geo["groups"])

    program = check(gradients(layer), [x, w, b], atol=1e-5)
    assert not any(op.kind == "conv" for op in program.program.main.ops)


@settings(max_examples=15)
@given(geometries(), st.data())
def test_transposed_convolution_and_its_gradients(geo: dict[str, Any], data: st.DataObject) -> None:
    extra = tuple(
        data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(geo["stride"], geo["dilation"], strict=True)
    )
    x = normal(geo["batch"], geo["cin"], *geo["size"])
    w = normal(geo["cin"], geo["cout"] // geo["groups"], *geo["kernel"], seed=1)
    outs = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(
            geo["size"], geo["stride"], geo["pad"], geo["dilation"], geo["kernel"], extra, strict=True
        )
    ]
    if min(outs) < 1:
        return

    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        function = TRANSPOSED[geo["axes"]]
        return function(x, w, None, geo["stride"], geo["pad"], extra, geo["groups"], geo["dilation"])

    check(gradients(layer), [x, w], atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    x, w = normal(2, 3, 7, 6), normal(4, 3, 4, 2, seed=1)
    check(gradients(lambda x, w: F.conv2d(x, w, padding=padding)), [x, w], atol=1e-5)


def test_a_constant_weight_uses_the_native_op() -> None:
    w = normal(4, 3, 3, 3, seed=1)
    program = check(lambda x: F.conv2d(x, w.to(x.dtype), stride=2, padding=1), [normal(2, 3, 7, 7)])
    assert [op.kind for op in program.program.main.ops] == ["conv"]


def test_no_slice_runs_over_the_last_axis() -> None:
    """Before A16 a last-axis slice with an offset clamps at 4094: convolution must not need one."""
    program = lowered(
        gradients(lambda x, w: F.conv2d(x, w, stride=2, padding=1)),
        [normal(2, 4, 8, 8).float(), normal(6, 4, 3, 3).float()],
    )
    for op in program.program.main.ops:
        if op.kind.startswith("slice"):
            begin = op.arg("begin")
            assert begin is not None
            assert begin.to_python()[-1] == 0  # type: ignore[union-attr, index]


def test_rows_beyond_a_matrix_axis_are_blocked() -> None:
    """[300 * 64, 9] rows do not fit 16384: the products run in equal blocks, and dW adds them."""
    x, w = torch.zeros(300, 1, 8, 8), torch.zeros(2, 1, 3, 3)
    program = lowered(gradients(lambda x, w: F.conv2d(x, w, padding=1)), [x, w])
    shapes = [op.result.type.shape for op in program.program.main.ops if op.kind == "matmul"]
    assert shapes
    assert all(max(shape) <= 16384 for shape in shapes)
    assert any(len(shape) == 3 for shape in shapes)
