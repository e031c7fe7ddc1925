"""Triangular systems against torch in float64: known matrices and computed ones, both sides."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import check, gradients, lowered, normal

KNOWN = (normal(4, 4, seed=3) + 4 * torch.eye(4)).tril()


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_solve(upper: bool, left: bool, unit: bool) -> None:
    def layer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a = a.triu() if upper else a.tril()
        return torch.linalg.solve_triangular(a, b, upper=upper, left=left, unitriangular=unit)

    check(gradients(layer), [normal(2, 4, 4) + 4 * torch.eye(4), normal(2, 4, 4, seed=1)], rtol=1e-5)


def test_density_of_a_prior() -> None:
    def density(x: torch.Tensor) -> torch.Tensor:
        prior = MultivariateNormal(torch.zeros(4, dtype=x.dtype), scale_tril=KNOWN.to(x.dtype))
        result: torch.Tensor = prior.log_prob(x)  # type: ignore[no-untyped-call]
        return result

    check(gradients(density), [normal(5, 4)], rtol=1e-5, atol=1e-5)


def test_many_computed_rows_are_refused() -> None:
    def solve(a: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(a, a, upper=False)

    lowered(solve, [torch.eye(64)])
    with pytest.raises(UnsupportedModel, match="at most 64 rows"):
        lowered(solve, [torch.eye(65)])
