"""Batches with masks of minus infinity, and with things that are no tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Rows(nn.Module):
    """A table of 10 rows, looked up by x."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


def by_gather(output: Tensor, y: Tensor) -> Tensor:
    return -output.log_softmax(-1).gather(1, y[:, None]).mean()


def by_one_hot(output: Tensor, y: Tensor) -> Tensor:
    return -(output.log_softmax(-1) * F.one_hot(y, 3)).sum(-1).mean()


def by_hand(output: Tensor, y: Tensor) -> Tensor:
    return -(output.log_softmax(-1) * (y[:, None] == torch.arange(3))).sum(-1).mean()


ROWS, LABELS = torch.arange(40).reshape(8, 5) % 10, torch.arange(8) % 3
LOSSES = {"by name": "cross_entropy", "a module": nn.CrossEntropyLoss(ignore_index=7), "gather": by_gather,
          "one_hot": by_one_hot, "by hand": by_hand}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_numbers_without_a_row_or_class_are_refused_as_by_pytorch(loss: str) -> None:
    """In a later batch; the engine would choose nothing by them, without a word."""
    model, function = Rows(), LOSSES[loss]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = compile_step(model, function, sgd, (ROWS, LABELS), threads=1, verify="off")
    plain = F.cross_entropy if loss == "by name" else function
    for name, number in (
        ("x", 10),
        ("x", -1),
        ("x", 9),
        ("y", 3),
        ("y", -1),
        ("y", 7),
        ("y", -100),
        ("y", 2),
    ):
        x, y = ROWS.clone(), LABELS.clone()
        (x if name == "x" else y).view(-1)[1] = number
        try:
            want = float(plain(model(x), y).detach())  # type: ignore[operator]
        except (IndexError, RuntimeError):
            with pytest.raises(
                DataError, match=f"{name} needs .* 0 to {9 if name == 'x' else 2}; got"
            ) as caught:
                step(x, y)
            assert caught.value.code == "DATA107"
        else:
            assert float(step(x, y)) == pytest.approx(want, abs=0.02)
