"""Tensors that forwards and losses keep from call to call are refused by name, where the loss depends on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ane_trainer as at
from ane_trainer.ane.errors import UnsupportedModel

X, Y = torch.linspace(-1, 1, 64).reshape(16, 4), torch.arange(16) % 3
Made = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.average = nn.Linear(4, 3), torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x) - self.average
        self.average = 0.5 * self.average + output.detach().mean(0)
        return output  # type: ignore[no-any-return]


class Last(nn.Module):
    """What the batch before had: the same for the same batch again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 3), [torch.zeros(4)]

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x - self.seen[0])
        self.seen[0] = x.mean(0) * 2 + 1
        return output  # type: ignore[no-any-return]


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.center: Tensor
        self.register_buffer("center", torch.zeros(3))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(output - self.center, y)
        self.center = 0.9 * self.center + output.detach().mean(0)
        return loss


def in_place() -> Made:
    center = torch.zeros(3)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(output - center, y)
        center.mul_(0.9).add_(output.detach().mean(0))
        return value

    return nn.Linear(4, 3), loss


def in_dictionary() -> Made:
    state = {"center": torch.zeros(3)}

    def loss(output: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(output - state["center"], y)
        state["center"] = 0.9 * state["center"] + output.detach().mean(0)
        return value

    return nn.Linear(4, 3), loss


KEPT: dict[str, Callable[[], Made]] = {
    "Average.average": lambda: (Average(), F.cross_entropy),
    "Last.seen[0]": lambda: (Last(), F.cross_entropy),
    "buffer": lambda: (nn.Linear(4, 3), Centred()),
    "loss: center": in_place,
    "loss: state.center": in_dictionary,
}


def compiled(model: nn.Module, loss: object) -> at.TrainingStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return at.compile_step(model, loss, optimizer, example=(X, Y), device="sim")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", KEPT)
def test_what_a_later_loss_depends_on_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="register_buffer") as caught:
        compiled(*KEPT[name]())
    assert name in str(caught.value)


class InModel(nn.Module):
    """The way that the refusal names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        output = self.layer(x)
        loss = F.cross_entropy(output - self.center, y)
        self.center.mul_(0.9).add_(output.detach().mean(0))
        return {"loss": loss}


def test_the_way_that_is_named_works() -> None:
    torch.manual_seed(0)
    model, plain = InModel(), InModel()
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    step = at.compile_step(
        model,
        "model",
        torch.optim.SGD(model.parameters(), lr=0.1),
        example=({"x": X, "y": Y}, ()),
        device="sim",
    )
    for _ in range(3):
        optimizer.zero_grad()
        expected = plain(X, Y)["loss"]
        expected.backward()
        optimizer.step()
        assert float(step({"x": X, "y": Y}, ())) == pytest.approx(float(expected.detach()), rel=2e-3)
    step.sync()
    assert torch.allclose(model.center, plain.center, rtol=5e-3, atol=1e-3)


def test_notes_that_no_loss_reads_are_left_alone() -> None:
    seen = [torch.zeros(())]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        seen[0] = output.detach().std()
        return F.cross_entropy(output, y)

    assert compiled(nn.Linear(4, 3), loss)(X, Y) is not None
