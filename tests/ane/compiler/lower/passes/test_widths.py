"""Axes longer than the engine takes, that only a reshape made: Dice over whole images, norms over all channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ane_trainer as at
from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import check, gradients, normal


def dice(o: Tensor, y: Tensor) -> Tensor:
    p, y = torch.sigmoid(o).flatten(1), y.flatten(1)
    return (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).mean()


def test_dice_over_an_image_of_147456_elements() -> None:
    x, y = normal(2, 1, 384, 384), normal(2, 1, 384, 384, seed=1)
    program = check(gradients(dice, of=[0]), [x, y.round()])
    assert max(n for op in program.program.main.ops for v in op.results for n in v.type.shape) <= 384


def test_comparisons_and_extrema() -> None:
    def clipped(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return torch.where(flat > 0.5, flat, flat.amax(1, keepdim=True)).reshape(x.shape)

    check(clipped, [normal(2, 1, 300, 301)])


def test_a_group_norm_over_a_channel_of_65792_elements_compiles_and_an_odd_axis_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1))
    x = torch.randn(1, 1, 257, 256)
    at.compile_step(model, "mse", torch.optim.SGD(model.parameters(), lr=0.1), (x, x), fidelity="fast")
    line, prime = nn.Linear(65_537, 1), torch.randn(1, 65_537)
    with pytest.raises(UnsupportedModel, match="needs a width"):
        at.compile_step(
            line,
            "mse",
            torch.optim.SGD(line.parameters(), lr=0.1),
            (prime, torch.zeros(1, 1)),
            fidelity="fast",
        )


def test_the_largest_of_a_long_axis_is_refused_in_words() -> None:
    x = torch.randn(4, 90_300)
    line = nn.Linear(1, 1)
    with pytest.raises(UnsupportedModel, match="needs"):
        at.compile_step(
            line,
            lambda o, t: (o[:, :1] * x - t).square().flatten().topk(3).values.mean(),
            torch.optim.SGD(line.parameters(), lr=0.1),
            (torch.randn(4, 1), x),
            fidelity="fast",
        )
