"""Comparisons with constants that fp16 lacks answer as with the constant itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ane.compiler.lower.harness import lowered, run

COMPARISONS: list[Callable[..., torch.Tensor]] = [torch.gt, torch.ge, torch.lt, torch.le]


@given(st.sampled_from(COMPARISONS), st.floats(-70000, 70000, width=32) | st.just(0.9999))
def test_every_neighbour_compares_as_the_constant(
    compare: Callable[..., torch.Tensor], constant: float
) -> None:
    nearest = torch.tensor(constant).half()
    ends = [torch.nextafter(nearest, torch.tensor(e).half()) for e in (-torch.inf, torch.inf)]
    x = torch.stack([ends[0], nearest, ends[1]]).clamp(-65504, 65504)
    program = lowered(lambda x: compare(x, constant).float(), [x.float()], dtype="fp16")
    assert run(program, [x])[0].tolist() == compare(x.double(), constant).double().tolist()


@pytest.mark.parametrize("first", [True, False])
def test_constant_tensors(first: bool) -> None:
    """Also on the left."""
    limits = torch.tensor([0.9999, 0.1, 1e-9])
    x = torch.tensor([1.0, 0.1, 0.0]).half()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ((limits > x) if first else (x > limits)).float()

    program = lowered(layer, [x.float()], dtype="fp16")
    assert run(program, [x])[0].tolist() == layer(x.double()).double().tolist()
