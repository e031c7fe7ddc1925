"""Epsilons that fp16 does not hold keep their purpose, and empty tensors are left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.ane.compiler.lower.harness import check, gradients, lowered, normal, run


@pytest.mark.parametrize("epsilon", [1e-12, 1e-9, 1e-8, 1e-7])
def test_the_logarithm_of_an_epsilon_is_kept(epsilon: float) -> None:
    x = torch.tensor([0.0, 0.25, 1.0]).double()
    for function in (lambda x: torch.log(x + epsilon), lambda x: torch.log(x.clamp(min=epsilon))):
        (found,) = run(lowered(function, [x.float()], "fp16"), [x])
        np.testing.assert_allclose(found, [math.log(epsilon), math.log(0.25), 0.0], rtol=1e-3, atol=1e-6)


def test_an_epsilon_that_fp16_holds_is_added() -> None:
    program = lowered(lambda x: torch.log(x + 1e-4), [torch.ones(3)], "fp16")
    assert [op.kind for op in program.program.main.ops if op.kind != "const"] == ["add", "log"]


def test_a_divisor_keeps_its_epsilon() -> None:
    zeros = torch.zeros(2, 3).double()
    for function in (lambda x: x / (x.abs().sum(1, keepdim=True) + 1e-9), lambda x: F.normalize(x, dim=1)):
        (found,) = run(lowered(function, [zeros.float()], "fp16"), [zeros])
        assert not found.any()


def test_factors_below_fp16_are_no_epsilons() -> None:
    (found,) = run(lowered(lambda x: x * 1e-9, [torch.ones(2)], "fp16"), [torch.ones(2).double()])
    assert not found.any()


def test_empty_parts_are_left_out() -> None:
    """Rotary embeddings of all channels: the part that is not rotated has none."""

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :4], x[..., 4:]
        return torch.cat([turned * 2, rest], -1)

    check(gradients(rotated), [normal(2, 4)])
