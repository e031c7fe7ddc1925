"""Runs of rows times a matrix each, as the mixtures of experts of `transformers` compute them."""

from __future__ import annotations

import pytest
import torch

from ane_trainer.ane.capture.rewrites.ragged import grouped_mm, grouped_mm_backward, histc
from tests.ane.compiler.lower.harness import normal

ROWS, WEIGHTS = normal(7, 4), normal(3, 4, 5, seed=1)


@pytest.mark.parametrize("ends", [[2, 5, 7], [0, 7, 7], [7, 7, 7]])
def test_runs_are_multiplied_with_their_matrix(ends: list[int]) -> None:
    rows, weights = ROWS.clone().requires_grad_(), WEIGHTS.clone().requires_grad_()
    runs = zip([0, *ends[:-1]], ends, strict=True)
    expected = torch.cat([rows[a:b] @ weights[e] for e, (a, b) in enumerate(runs)])
    offs = torch.tensor(ends)
    torch.testing.assert_close(grouped_mm(ROWS, WEIGHTS, offs), expected.detach())
    ramp = normal(7, 5, seed=2)
    wanted = torch.autograd.grad(expected, [rows, weights], ramp)
    torch.testing.assert_close(grouped_mm_backward(ROWS, WEIGHTS, offs, ramp), wanted)


def test_rows_behind_the_last_run_are_zero() -> None:
    assert not grouped_mm(ROWS, WEIGHTS, torch.tensor([2, 4, 5]))[5:].any()


@pytest.mark.parametrize(("bins", "low", "high"), [(4, 0, 3), (6, 0, 5), (3, -1, 1), (8, 0, 7)])
def test_histograms_count_as_torch_does(bins: int, low: int, high: int) -> None:
    numbers = torch.tensor([0.0, 3, 1, 1, 5, -2, 2, 3, 7, 0])
    torch.testing.assert_close(histc(numbers, bins, low, high), torch.histc(numbers, bins, low, high))
