"""Evaluation: the mean over batches is PyTorch's loss of all examples at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ane_trainer import Reporter, Trainer
from ane_trainer.ane.errors import Diverged
from ane_trainer.training.folder.results import Metrics

X = torch.randn(38, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3] + 0.3).argmax(1)


def evaluated(loss: nn.Module | str, y: torch.Tensor, size: int = 16) -> tuple[nn.Module, Metrics]:
    torch.manual_seed(1)
    model = nn.Linear(6, 3)
    trainer = Trainer(
        model, loss, torch.optim.SGD(model.parameters(), lr=0.1), device="cpu", report=Reporter()
    )
    return model, trainer.evaluate([(X[i : i + size], y[i : i + size]) for i in range(0, len(X), size)])


@pytest.mark.parametrize(("loss", "left_out"), [
    (nn.CrossEntropyLoss(), []),
    (nn.CrossEntropyLoss(), [*range(0, 16), 20]),
    (nn.CrossEntropyLoss(ignore_index=1), []),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.25])), [3, 30]),
    (nn.CrossEntropyLoss(label_smoothing=0.1), []),
    (nn.MultiMarginLoss(), []),
])  # fmt: skip
def test_the_loss_is_that_of_all_examples_at_once(loss: nn.Module, left_out: list[int]) -> None:
    y = Y.clone()
    y[left_out] = -100
    model, found = evaluated(loss, y)
    with torch.no_grad():
        output = model(X)
        counts = y != getattr(loss, "ignore_index", -100)
        assert found.loss == pytest.approx(float(loss(output, y)), rel=1e-5)
        assert found.accuracy == pytest.approx(float((output.argmax(1) == y)[counts].float().mean()))
    assert found.examples == len(X)


def test_a_loss_by_name_leaves_out_minus_100_as_pytorch_does() -> None:
    y = Y.clone()
    y[:5] = -100
    _, by_class = evaluated(nn.CrossEntropyLoss(), y)
    _, by_name = evaluated("cross_entropy", y)
    assert by_name == by_class


def test_nothing_that_counts_has_no_loss() -> None:
    torch.manual_seed(1)
    model = nn.Linear(6, 3)
    trainer = Trainer(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), device="cpu", report=Reporter()
    )
    with pytest.raises(Diverged, match="nan on the validation data"):
        trainer.fit([(X, Y)], val=[(X, torch.full_like(Y, -100))])
