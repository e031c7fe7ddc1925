"""`weight_norm`, old and new, trains: its fused forward and backward come apart into plain operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ane.compiler.lower.harness import check, gradients, normal


@pytest.mark.parametrize("dim", [0, 2])
def test_weight_norm(dim: int) -> None:
    v = normal(3, 4, 5)
    g = v.abs().amax([d for d in range(3) if d != dim], keepdim=True) + 0.5

    def layer(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return F.conv1d(torch.ones(1, 4, 9, dtype=v.dtype), torch._weight_norm(v, g, dim))

    check(gradients(layer), [v, g])
