"""Pooling with overlap, padding, ceil_mode and ties: forward and gradient against torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import check, gradients, lowered, normal

MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    axes = draw(st.sampled_from([1, 2, 2, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    pad = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    stride = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    size = tuple(k + draw(st.integers(0, 5)) for k in kernel)
    return {
        "axes": axes,
        "kernel": kernel,
        "stride": stride,
        "pad": pad,
        "size": size,
        "ceil": draw(st.booleans()),
    }


@settings(max_examples=30)
@given(pools(), st.integers(0, 1000))
def test_max_pool_gives_ties_to_the_first(pool: dict[str, Any], seed: int) -> None:
    """Values from three numbers make ties in nearly every window."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 3, (2, 2, *pool["size"]), generator=generator).double()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return MAX[pool["axes"]](x, pool["kernel"], pool["stride"], pool["pad"], ceil_mode=pool["ceil"])

    check(gradients(layer), [x])
    check(layer, [x])


@pytest.mark.parametrize("dilation", [2, (1, 3)])
def test_dilated_max_pool(dilation: Any) -> None:
    x = torch.randint(0, 3, (2, 2, 9, 9), generator=torch.Generator().manual_seed(1)).double()
    check(gradients(lambda x: F.max_pool2d(x, 3, 2, 1, dilation=dilation)), [x])


@settings(max_examples=30)
@given(pools(), st.booleans())
def test_average_pool(pool: dict[str, Any], include: bool) -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        function = AVERAGE[pool["axes"]]
        return function(x, pool["kernel"], pool["stride"], pool["pad"], pool["ceil"], include)

    check(gradients(layer), [normal(2, 2, *pool["size"])])


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (4, 6), (3, 4), (5, 7)])
def test_adaptive_average_pool(size: tuple[int, int]) -> None:
    check(gradients(lambda x: F.adaptive_avg_pool2d(x, size)), [normal(2, 3, 4, 6)])


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (3, 4), (5, 2), (4, 6)])
def test_adaptive_max_pool(size: tuple[int, int]) -> None:
    """Sizes that do not divide too: windows of several lengths that overlap, with ties."""
    x = torch.randint(0, 4, (2, 3, 7, 6), generator=torch.Generator().manual_seed(2)).double()
    check(gradients(lambda x: F.adaptive_max_pool2d(x, size)), [x])
    check(lambda x: F.adaptive_max_pool2d(x, size, return_indices=True), [x])


def test_adaptive_max_pool_of_other_ranks() -> None:
    check(gradients(lambda x: F.adaptive_max_pool1d(x, 3)), [normal(2, 3, 7)])
    check(gradients(lambda x: F.adaptive_max_pool3d(x, (2, 3, 2))), [normal(2, 2, 5, 4, 3)])


def test_forward_only_uses_the_native_op() -> None:
    program = lowered(lambda x: F.max_pool2d(x, 3, 2, 1), [torch.zeros(1, 1, 6, 6)])
    assert [op.kind for op in program.program.main.ops] == ["max_pool"]


def test_indices_are_numbers_up_to_2048() -> None:
    x = torch.randint(0, 3, (2, 2, 45, 45), generator=torch.Generator().manual_seed(3)).double()
    check(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[1], [x])
    with pytest.raises(UnsupportedModel, match="at most 2048 places"):
        lowered(lambda x: F.max_pool2d(x, 2, return_indices=True)[1] * 2, [torch.zeros(1, 1, 46, 46)])


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (60, 50)])
def test_unpooling(size: tuple[int, int]) -> None:
    """As SegNet does it; large images too, for the indices' numbers are not needed."""

    def pool_and_back(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y, places = F.max_pool2d(x, 2, 2, return_indices=True)
        return F.max_unpool2d(y * w, places, 2, 2, output_size=x.shape[-2:])

    x = torch.randint(0, 4, (2, 3, *size), generator=torch.Generator().manual_seed(4)).double()
    check(gradients(pool_and_back), [x, normal(2, 3, size[0] // 2, size[1] // 2)])


def test_unpooling_of_other_ranks() -> None:
    def line(x: torch.Tensor) -> torch.Tensor:
        y, places = F.max_pool1d(x, 2, 2, return_indices=True)
        return F.max_unpool1d(y * y, places, 2, 2)

    def volume(x: torch.Tensor) -> torch.Tensor:
        y, places = F.max_pool3d(x, 2, 2, return_indices=True)
        return F.max_unpool3d(y * y, places, 2, 2)

    check(gradients(line), [normal(2, 2, 8)])
    check(gradients(volume), [normal(1, 2, 4, 4, 6)])


def test_unpooling_to_another_size() -> None:
    """By the indices' numbers where fp16 holds them, else refused."""

    def layer(x: torch.Tensor) -> torch.Tensor:
        y, places = F.max_pool2d(x, 2, 2, return_indices=True)
        return F.max_unpool2d(y, places, 2, 2)

    check(layer, [normal(1, 2, 5, 6)])
    with pytest.raises(UnsupportedModel, match="Pass output_size"):
        lowered(layer, [torch.zeros(1, 1, 51, 50)])


def test_divisor_override() -> None:
    check(gradients(lambda x: F.avg_pool2d(x, 2, divisor_override=3)), [normal(1, 2, 4, 4)])
