"""`Trainer.predict` and `evaluate` on models with several inputs and outputs, and parts that are no batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at


class Output(NamedTuple):
    score: Tensor
    extra: dict[str, Tensor]


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Output:
        return Output(self.left(a) + self.right(b), {"mean": a.mean(), "rows": b * 2})


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.layer(x).index_add(0, edges[1], x[edges[0]][:, :2])


def make(model: nn.Module, loss: object) -> at.Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return at.Trainer(model, loss=loss, optimizer=optimizer, device="sim", fidelity="fast")  # type: ignore[arg-type]


def test_structures_come_back_with_the_examples_that_were_given() -> None:
    torch.manual_seed(0)
    model = Several()
    trainer = make(model, lambda output, y: F.mse_loss(output.score, y))
    batch = (torch.randn(4, 3), torch.randn(4, 4)), torch.zeros(4, 2)
    trainer.fit([batch], epochs=1)
    x = torch.randn(10, 3), torch.randn(10, 4)  # two whole batches and a half
    found, wanted = trainer.predict(x), model(*x)
    assert isinstance(found, Output)
    torch.testing.assert_close(found.score, wanted.score.detach(), atol=4e-3, rtol=0)
    torch.testing.assert_close(found.extra["rows"], wanted.extra["rows"], atol=4e-3, rtol=0)
    part = (x[0][:2], x[1][:2]), torch.zeros(2, 2)  # fewer examples than outputs
    expected = float(F.mse_loss(model(*part[0]).score, part[1]).detach())
    assert abs(trainer.evaluate([part]).loss - expected) < 1e-2


def test_parts_that_are_no_batch_stay_whole() -> None:
    torch.manual_seed(0)
    model = Graph()
    trainer = make(model, "mse")
    x = torch.randn(5, 3), torch.tensor([[0, 1, 2, 4], [1, 2, 3, 0]])
    trainer.fit([(x, torch.zeros(5, 2))], epochs=1)
    torch.testing.assert_close(trainer.predict(x), model(*x).detach(), atol=4e-3, rtol=0)
