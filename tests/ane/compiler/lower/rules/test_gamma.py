"""The logarithm of the gamma function, its derivative, and the densities that use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ane_trainer.ane.compiler.lower import lower
from tests.ane.compiler.lower.harness import captured, check, gradients, lowered, normal, run

POSITIVE = torch.tensor([0.05, 0.3, 0.99, 1.0, 1.5, 2.0, 3.7, 7.99, 8.0, 8.01, 25.0, 300.0]).double()
distributions: Any = torch.distributions


@pytest.mark.parametrize("function", [torch.lgamma, torch.digamma])
def test_stirlings_series(function: Any) -> None:
    check(function, [POSITIVE], rtol=1e-5, atol=3e-5)


def test_the_derivative_of_lgamma_is_digamma() -> None:
    check(gradients(torch.lgamma), [POSITIVE], rtol=1e-4, atol=1e-4)


def test_fp16_holds_what_lies_between() -> None:
    """No value on the way is beyond 65504, and the results are right to fp16's digits."""
    program = lowered(lambda x: torch.lgamma(x), [POSITIVE.float()], "fp16")
    (found,) = run(program, [POSITIVE])
    np.testing.assert_allclose(found, torch.lgamma(POSITIVE).numpy(), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    "density",
    [
        lambda x: distributions.Beta(x.exp(), 2 * x.exp(), validate_args=False).log_prob(torch.sigmoid(x)),
        lambda x: distributions.StudentT(x.exp() + 2, x, x.exp(), validate_args=False).log_prob(x + 1),
        lambda x: distributions.NegativeBinomial(x.exp(), logits=x, validate_args=False).log_prob(
            x.exp().round()
        ),
    ],
)
def test_densities_and_their_gradients(density: Any) -> None:
    check(gradients(density), [normal(6)], rtol=1e-4, atol=1e-4)


def test_gather_of_several_elements_at_rank_four() -> None:
    x, index = (
        normal(2, 3, 4, 5),
        torch.randint(0, 5, (2, 3, 4, 6), generator=torch.Generator().manual_seed(0)),
    )
    program = check(gradients(lambda x, i: x.gather(-1, i)), [x, index])
    assert (
        max(v.type.rank for op in program.program.main.ops if op.kind == "matmul" for v in op.operands()) <= 4
    )
    check(gradients(lambda x, i: x.gather(1, i)), [normal(2, 5, 4, 3), index[:, :, :, :3] % 5])
    assert lower(captured(lambda x, i: x.gather(-1, i), [x.float(), index]), dtype="fp16")
