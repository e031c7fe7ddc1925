"""Batches with masks of minus infinity, and with things that are no tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ane_trainer import compile_forward, compile_step
from ane_trainer.ane.capture.batches import Structure, tensors_of
from ane_trainer.ane.errors import DataError


class Scores(nn.Module):
    """Attention-like: softmax of scores plus an additive mask, times a number that is compiled in."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(3, 4)

    def forward(self, x: Tensor, mask: Tensor, times: float, note: str | None = None) -> tuple[Tensor, None]:
        return torch.log_softmax(self.score(x) + mask, -1).exp() * times, None


def example(lowest: float) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(2, 4)
    mask[0, 1] = mask[1, 3] = lowest
    return (torch.randn(2, 3), mask, 0.5, None), torch.rand(2, 4)


def mean_square(output: tuple[Tensor, None], target: Tensor) -> Tensor:
    return ((output[0] - target) ** 2).mean()


@pytest.mark.parametrize("lowest", [-math.inf, -1e9, torch.finfo(torch.float32).min])
def test_masks_of_minus_infinity_are_taken(lowest: float) -> None:
    x, y = example(lowest)
    model = Scores()
    expected = float(mean_square(model(*x), y).detach())
    with compile_step(
        model, mean_square, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), fidelity="fast"
    ) as s:
        assert float(s(x, y)) == pytest.approx(expected, rel=3e-3)
        with pytest.raises(DataError, match=r"needs 0\.5, which is compiled in"):
            s((x[0], x[1], 0.25, None), y)
        with pytest.raises(DataError, match="needs finite numbers"):
            s((x[0], torch.full((2, 4), math.nan), 0.5, None), y)
        with pytest.raises(DataError, match="needs magnitudes up to 65504"):
            s((x[0], -x[1].clamp(min=-1e9), 0.5, None), y)


def test_data_beyond_fp16_is_no_mask() -> None:
    x, y = example(-1e5)
    model = Scores()
    step = compile_step(
        model, mean_square, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), fidelity="fast"
    )
    with pytest.raises(DataError, match="needs magnitudes up to 65504"):
        step(x, y)


def test_outputs_that_are_no_tensors_come_back() -> None:
    x, _ = example(0.0)
    model = Scores()
    output = compile_forward(model, x, fidelity="fast")(x)
    assert output[1] is None
    torch.testing.assert_close(output[0], model(*x)[0], rtol=0.01, atol=1e-3)


def test_a_structure_is_filled_in_order() -> None:
    nested = {"a": torch.ones(1), "b": [None, (3, torch.zeros(2))], "c": "x"}
    structure = Structure.of(nested)
    again = structure.filled([t + 1 for t in tensors_of(nested)])
    assert again["b"][0] is None
    assert again["b"][1][0] == 3
    assert again["c"] == "x"
    assert again["a"].tolist() == [2.0]
    assert again["b"][1][1].tolist() == [1.0, 1.0]
    assert structure.differing(nested) == []
    assert structure.differing({**nested, "c": "y"}) == [("x", "y")]
