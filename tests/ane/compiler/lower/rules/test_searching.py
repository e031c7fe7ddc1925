"""Searches among boundaries, running extrema, and look-ups that count their rows, against PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from tests.ane.compiler.lower.harness import check, gradients, normal
from tests.ane.compiler.lower.indices.test_arithmetic import run

EDGES = torch.tensor([-1.0, 0.0, 0.5, 2.0])


@pytest.mark.parametrize("right", [False, True])
def test_boundaries_are_counted(right: bool) -> None:
    x = torch.cat([normal(3, 4).flatten(), EDGES.double()])
    check(lambda v: torch.bucketize(v, EDGES.to(v.dtype), right=right).to(v.dtype) * v, [x])
    rows = normal(3, 6, seed=1).sort(1).values
    check(lambda v, s: torch.searchsorted(s, v, right=right).to(v.dtype) * v, [normal(3, 2), rows])


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


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_rows_above_a_norm_are_shrunk_and_stay_so(norm: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.5, norm_type=norm), nn.Flatten(), nn.Linear(12, 3))
    twin, ids, y = copy.deepcopy(model), torch.randint(0, 6, (4, 3)), torch.randint(0, 3, (4,))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin)]
    step = at.compile_step(model, "cross_entropy", optimizers[0], (ids, y), fidelity="fast")
    for _ in range(2):
        loss = F.cross_entropy(twin(ids), y)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        torch.testing.assert_close(step(ids, y), loss.detach(), rtol=5e-3, atol=0)
    step.sync()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.01, atol=3e-3)


def test_places_beyond_2048_are_found() -> None:
    t = torch.zeros(2, 5000, dtype=torch.long)
    t[0, 4321], t[1, 2050], t[1, 2051] = 7, 9, 9
    codes = torch.arange(97)
    (got,) = run([lambda v: (v.argmax(1).unsqueeze(1) % 97 == codes).float()], t)
    assert got.argmax(1).tolist() == [4321 % 97, 2050 % 97]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(3, 5), (9, 4)])
def test_antialiased_resizing(mode: str, size: tuple[int, int]) -> None:
    def resized(x: Tensor) -> Tensor:
        return F.interpolate(x, size=size, mode=mode, antialias=True)

    check(gradients(resized), [normal(2, 3, 8, 7)])
    check(lambda x: F.interpolate(x, scale_factor=0.4, mode=mode, antialias=True), [normal(1, 2, 8, 9)])
