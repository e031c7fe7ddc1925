"""How the user's model is called: several arguments, modules with two names, tied parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ane_trainer as at


class TwoNames(nn.Module):
    """Layers kept by name and again in a Sequential, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.net = nn.Sequential(self.conv, nn.ReLU(), nn.Flatten())
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.net(x)))


def test_a_module_with_two_names_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    model = TwoNames()
    before = dict(model.named_parameters(remove_duplicate=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = torch.randn(4, 2, 6), torch.randint(0, 16, (4,))
    step = at.compile_step(model, "cross_entropy", optimizer, (x, y), fidelity="fast")
    losses = [float(step(x, y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[n] is before[n] for n in before)
    with torch.no_grad():
        assert float(nn.functional.cross_entropy(model(x), y)) < losses[-1] + 0.01


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)


class Pair(Takes):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer(pair[0]) - pair[1]


class Two(Takes):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.layer(x) - shift


def test_a_tuple_is_one_argument_where_the_model_takes_one() -> None:
    x = torch.randn(4, 3), torch.randn(4, 2)
    losses = []
    for kind in (Pair, Two):
        torch.manual_seed(0)
        model = kind()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = at.compile_step(model, "mse", optimizer, (x, torch.zeros(4, 2)), fidelity="fast")
        losses.append(float(step(x, torch.zeros(4, 2))))
    assert losses[0] == losses[1]
