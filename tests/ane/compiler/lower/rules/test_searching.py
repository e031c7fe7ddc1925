"""Searches among boundaries, running extrema, and look-ups that count their rows, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import check, gradients, lowered, normal
from tests.ane.compiler.lower.indices.test_arithmetic import run

EDGES = torch.tensor([-1.0, 0.0, 0.5, 2.0])


@pytest.mark.parametrize("right", [False, True])
def test_boundaries_are_counted(right: bool) -> None:
    x = torch.cat([normal(3, 4).flatten(), EDGES.double()])
    check(lambda v: torch.bucketize(v, EDGES.to(v.dtype), right=right).to(v.dtype) * v, [x])
    rows = normal(3, 6, seed=1).sort(1).values
    check(lambda v, s: torch.searchsorted(s, v, right=right).to(v.dtype) * v, [normal(3, 2), rows])


def test_at_most_2048_boundaries() -> None:
    lowered(lambda v: torch.bucketize(v, torch.arange(2048.0)).float(), [torch.zeros(3)], "fp16")
    with pytest.raises(UnsupportedModel, match="at most 2048 boundaries; got 2049"):
        lowered(lambda v: torch.bucketize(v, torch.arange(2049.0)).float(), [torch.zeros(3)], "fp16")


@pytest.mark.parametrize("dim", [0, 1])
def test_running_extrema_and_their_gradients(dim: int) -> None:
    x = normal(4, 7).round()  # with equal ones
    check(gradients(lambda v: torch.cummax(v, dim).values), [x])
    check(gradients(lambda v: torch.cummin(v * 1.5, dim).values), [x])


def test_a_gradient_divided_by_how_often_a_row_is_looked_up() -> None:
    ids = torch.tensor([[0, 2, 2], [4, 2, 0]])

    def rows(w: Tensor, i: Tensor) -> Tensor:
        return F.embedding(i, w, scale_grad_by_freq=True)

    check(gradients(rows, of=[0]), [normal(5, 3), ids])


def test_places_beyond_2048_are_found() -> None:
    t = torch.zeros(2, 5000, dtype=torch.long)
    t[0, 4321], t[1, 2050], t[1, 2051] = 7, 9, 9
    codes = torch.arange(97)
    (got,) = run([lambda v: (v.argmax(1).unsqueeze(1) % 97 == codes).float()], t)
    assert got.argmax(1).tolist() == [4321 % 97, 2050 % 97]
