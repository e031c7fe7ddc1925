"""Losses and forwards that hold parameters themselves: their gradients are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ane_trainer as at

X, Y = torch.linspace(-1, 1, 64).reshape(16, 4), torch.arange(16) % 3
Made = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def penalised(penalty: Callable[[nn.Sequential], Tensor]) -> Callable[[], Made]:
    def make() -> Made:
        model = net()
        return model, lambda output, y: F.cross_entropy(output, y) + 0.1 * penalty(model)

    return make


def squares(model: nn.Module) -> Tensor:
    return torch.stack([p.pow(2).sum() for p in model.parameters()]).sum()


def gradient_penalty(model: nn.Module) -> Tensor:
    z = X.flip(0).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def proximal() -> Made:
    model = net()
    old = [p.detach() + 0.1 for p in model.parameters()]
    distance = lambda: sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), old, strict=True))  # noqa: E731
    return model, lambda output, y: F.cross_entropy(output, y) + 0.5 * distance()


class Held:
    def __init__(self, model: nn.Sequential) -> None:
        self.model = model

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) + 0.1 * squares(self.model)


def an_object() -> Made:
    model = net()
    return model, Held(model)


def a_hook() -> Made:
    model = net()
    first = model[0]
    assert isinstance(first, nn.Linear)
    first.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ first.weight.T)
    return model, F.cross_entropy


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 3))
        self.both = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.both:
            x = torch.tanh(x @ weight)
        return x


CASES: dict[str, Callable[[], Made]] = {
    "l2": penalised(squares),
    "l1": penalised(lambda m: torch.cat([p.abs().flatten() for p in m.parameters()]).sum()),
    "vector": penalised(lambda m: nn.utils.parameters_to_vector(m.parameters()).norm()),
    "orthogonal": penalised(lambda m: (m[0].weight.T @ m[0].weight - torch.eye(4)).square().sum()),  # type: ignore[operator]
    "model again": penalised(lambda m: m(X.flip(0) * 2).square().mean()),
    "gradient penalty": penalised(gradient_penalty),
    "proximal": proximal,
    "object": an_object,
    "hook": a_hook,
    "list": lambda: (Listed(), F.cross_entropy),
}


def stepped(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(X), Y).backward()
        optimizer.step()
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error::ane_trainer.NumericsWarning")
def test_their_gradients_are_pytorch_s(name: str) -> None:
    torch.manual_seed(0)
    expected = stepped(*CASES[name](), 2)
    torch.manual_seed(0)
    model, loss = CASES[name]()
    before = [p.detach().clone() for p in model.parameters()]
    step = at.compile_step(
        model, loss, torch.optim.SGD(model.parameters(), lr=0.1), example=(X, Y), device="sim"
    )
    for _ in range(2):
        step(X, Y)
    step.sync()
    for parameter, old, want in zip(model.parameters(), before, expected, strict=True):
        assert (parameter.detach() - old - want).norm() < 0.02 * want.norm()
