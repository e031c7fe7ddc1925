"""`grid_sample` and its gradients against torch in float64: modes, paddings, points outside and on pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import check, gradients, lowered, normal


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_grid_sample(mode: str, padding: str, aligned: bool) -> None:
    def layer(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(x, grid, mode, padding, aligned)

    check(gradients(layer), [normal(2, 3, 5, 4), normal(2, 3, 4, 2, seed=1) * 1.3])


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_volumes(padding: str) -> None:
    def layer(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)

    check(gradients(layer), [normal(2, 2, 3, 4, 5), normal(2, 2, 3, 2, 3, seed=1)])


def test_the_identity_has_torchs_gradient() -> None:
    """Points on pixels, where the interpolation has a kink: torch takes the slope to the right."""

    def layer(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        grid = F.affine_grid(theta, [2, 3, 5, 5], align_corners=True)
        return F.grid_sample(x, grid, align_corners=True)

    theta = torch.eye(2, 3).double().repeat(2, 1, 1)
    check(gradients(layer), [normal(2, 3, 5, 5), theta])


def test_bicubic_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="grid_sampler_2d"):
        lowered(
            lambda x, g: F.grid_sample(x, g, "bicubic", align_corners=False),
            [torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 2, 2)],
        )
