"""Ops on tensors of six and more axes come out with five, and compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ane_trainer.ane.mil.program import MAX_RANK
from tests.ane.compiler.lower.harness import check, gradients, normal


def minibatch_deviation(x: Tensor) -> Tensor:
    """StyleGAN's: statistics over groups of samples."""
    y = x.reshape(2, -1, 1, 3, 4, 5)
    y = (
        torch.sqrt((y - y.mean(0, keepdim=True)).square().mean(0) + 1e-8)
        .mean([2, 3, 4], keepdim=True)
        .squeeze(2)
    )
    return torch.cat([x, y.repeat(2, 1, 4, 5)], 1)


def involution(x: Tensor) -> Tensor:
    """A kernel per place: [batch, group, channels, taps, height, width]."""
    kernel = x[:, :1].repeat(1, 9, 1, 1).view(4, 1, 1, 9, 4, 5)
    columns = F.unfold(x, 3, padding=1).view(4, 1, 3, 9, 4, 5)
    return (kernel * columns).sum(3).view(4, 3, 4, 5)


def parts(x: Tensor) -> Tensor:
    y = x.view(2, 2, 3, 2, 2, 5)
    y = torch.cat([y[:, 1:] * 2, y[:, :1, :, :]], 1)
    y = F.pad(y, (1, 0, 0, 1))[..., ::2]
    return y.amax((1, 4)) - y.expand(2, 2, 3, 2, 3, 3).min()


def choices(x: Tensor) -> Tensor:
    y = x.view(2, 2, 3, 2, 2, 5)
    y = torch.where(y > y.mean((0, 3), keepdim=True), y, torch.tanh(y) * 0.5)
    return y.masked_fill(y.abs() < 0.1, 0.0).clamp(-1, 1)[0]


@pytest.mark.parametrize("layer", [minibatch_deviation, involution, parts, choices])
def test_six_axes(layer: Callable[[Tensor], Tensor]) -> None:
    program = check(gradients(layer), [normal(4, 3, 4, 5)])
    ranks = [r.type.rank for op in program.program.main.ops for r in op.results]
    assert max(ranks) <= MAX_RANK


def test_inputs_and_outputs_of_six_axes() -> None:
    program = check(lambda x: x.tanh() * 2, [normal(2, 1, 3, 2, 2, 2)])
    assert {p.shape for p in (*program.inputs, *program.outputs)} == {(2, 3, 2, 2, 2)}
    assert all(r.type.rank <= MAX_RANK for op in program.program.main.ops for r in op.results)
