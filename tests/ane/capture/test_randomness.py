"""Every random draw of a model becomes a port that the host feeds, and the step is torch's with those draws."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.capture.randomness import HostRandomMode, drawn_by


class Noisy(nn.Module):
    """Dropout inside attention and between LSTM layers, noise and stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, 2, dropout=0.3, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(12, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(x)
        x = x + self.attention(x, x, x)[0]
        depth = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.7)
        return self.head((x + 0.1 * torch.randn_like(x) * depth)[:, -1])


def test_all_draws_are_fed_and_the_step_is_torchs() -> None:
    torch.manual_seed(0)
    model = Noisy()
    twin = copy.deepcopy(model)
    x, y = torch.randn(4, 6, 5), torch.randint(0, 3, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = at.compile_step(model, "cross_entropy", optimizer, (x, y), fidelity="fast", seed=5)
    targets = [p.target for p in step.compiled.inputs if p.target.startswith(("dropout/", "random/"))]
    assert targets == ["dropout/0.3", "dropout/0.2", "random/bernoulli:0.7", "random/normal"]
    loss = step(x, y)
    with drawn_by(torch.Generator().manual_seed(5)):
        expected = F.cross_entropy(twin(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-3, atol=0)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        wanted = theirs.detach() - 0.1 * theirs.grad
        bound = 0.02 * 0.1 * float(theirs.grad.abs().max())  # fp16 gradients: two hundredths of the largest
        assert float((mine.detach() - wanted).abs().max()) < bound + 1e-6, name


class Drawing(nn.Module):
    """The rarer draws: dropouts for SELU, random slopes, integers and orders."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.drop, self.channels, self.slopes = nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.3), nn.RReLU()
        self.register_buffer("table", torch.linspace(0.5, 1.5, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.selu(self.first(x)))
        x = self.channels(x.unsqueeze(-1)).squeeze(-1)
        time = torch.randint(0, 10, (x.shape[0],), device=x.device)
        x = self.slopes(x * self.table[time][:, None])
        x = 0.7 * x + 0.3 * x[torch.randperm(x.shape[0])]
        return self.second(x)


def test_rarer_draws() -> None:
    torch.manual_seed(0)
    model = Drawing()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 6), torch.randn(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = at.compile_step(model, "mse", optimizer, (x, y), fidelity="fast", seed=5)
    targets = [p.target for p in step.compiled.inputs if p.target.startswith("random/")]
    assert targets == [
        "random/bernoulli:0.8", "random/bernoulli:0.7", "random/integer:0:10", "random/uniform",
        "random/permutation",
    ]  # fmt: skip
    loss = step(x, y)
    with drawn_by(torch.Generator().manual_seed(5)):
        expected = F.mse_loss(twin(x), y)
    torch.testing.assert_close(loss, expected.detach(), rtol=3e-3, atol=0)


def test_alpha_dropout_is_torchs() -> None:
    x = torch.linspace(-2, 3, 400).reshape(20, 20)
    torch.manual_seed(1)
    wanted = F.alpha_dropout(x, 0.3, training=True)
    dropped = wanted == wanted.flatten().mode().values
    mode = HostRandomMode([(~dropped).float()])
    with mode:
        torch.testing.assert_close(F.alpha_dropout(x, 0.3, training=True), wanted)
