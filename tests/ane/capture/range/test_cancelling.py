"""Gradients that are 0 by algebra: found in any form of norm, and only where they are 0; through both front doors."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.capture import parts
from ane_trainer.ane.capture.range import drop_cancelled
from ane_trainer.ane.capture.step import capture_training

X, Y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)


class ByHand(nn.Module):
    """A norm over the batch as formulas, behind a bias for all features together."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 16), nn.Linear(16, 10)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x.flatten(1)) + self.shift
        d = h - h.mean(0)
        return self.two((d / ((d**2).mean(0) + 1e-5).sqrt()).relu())  # type: ignore[no-any-return]


class Attention(nn.Module):
    """The bias of the keys adds one number to all scores of a row."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.mask = torch.ones(8, 8).tril().bool() if masked else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x[:, 0]).view(8, 8, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(
            q, k, v, None if self.mask is None else self.mask & (x[0, 0] > -9)
        )
        return found.transpose(1, 2).flatten(1)


class Positions(nn.Module):
    """One score a position, a softmax over the positions: the bias adds one number to all."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.score(x[:, 0]).split(1, dim=-1)
        return first.squeeze(-1) + second.squeeze(-1)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two ways into one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.side = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(1, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norms[0](self.one(x)))
        return F.relu(self.norms[1](self.two(h) + self.side(x))).flatten(1)


def behind_convolution(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 10))


def on_features(*norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *norm, nn.Linear(16, 10))


FOUND = {
    "batch norm": (lambda: behind_convolution(nn.BatchNorm2d(4)), ["0.bias"]),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
        ["0.bias"],
    ),
    "instance norm": (lambda: behind_convolution(nn.InstanceNorm2d(4, affine=True)), ["0.bias"]),
    "a channel a group": (lambda: behind_convolution(nn.GroupNorm(4, 4)), ["0.bias"]),
    "two channels a group": (lambda: behind_convolution(nn.GroupNorm(2, 4)), []),
    "features, then dropout": (lambda: on_features(nn.BatchNorm1d(16), nn.Dropout(0.2)), ["1.bias"]),
    "layer norm": (lambda: on_features(nn.LayerNorm(16)), []),
    "no norm": (lambda: on_features(nn.ReLU()), []),
    "an activation between": (lambda: on_features(nn.ReLU(), nn.BatchNorm1d(16)), []),
    "by hand": (ByHand, ["shift", "one.bias"]),
    "keys": (Attention, ["k.bias"]),
    "masked keys": (lambda: Attention(masked=True), ["k.bias"]),
    "positions": (Positions, ["score.bias"]),
    "residual": (Residual, ["one.bias", "two.bias", "side.bias"]),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_dropped_is_zero_in_double_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(parts, "drop_cancelled", lambda graph: dropped.append(drop_cancelled(graph)))
    torch.manual_seed(0)
    make, zero = FOUND[name]
    model = make()
    capture_training(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), (X, Y))
    model.double()
    F.cross_entropy(model(X.double()), Y).backward()
    sizes = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    least = 1e-12 * max(sizes.values())
    assert [n for n, size in sizes.items() if size < least] == zero
    assert dropped == [len(zero)]


@pytest.mark.parametrize("on", ["engine", "host"])
def test_the_bias_keeps_its_place_and_its_decay(on: str) -> None:
    torch.manual_seed(0)
    model = behind_convolution(nn.BatchNorm2d(4))
    before = model[0].bias.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    step = at.compile_step(model, "cross_entropy", optimizer, (X, Y), device="sim", optimizer_on=on)
    for _ in range(3):
        step(X, Y)
    step.sync()
    assert step.agreement is not None
    assert step.agreement.agrees
    assert step.skipped_steps == 0
    torch.testing.assert_close(model[0].bias.detach(), before * 0.995**3, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: behind_convolution(nn.BatchNorm2d(4)), "0.bias"), (Attention, "k.bias"),
        (lambda: Attention(masked=True), "k.bias"), (Positions, "score.bias"),
    ],
)  # fmt: skip
def test_torch_compile_gives_a_gradient_of_zeros(make: Callable[[], nn.Module], name: str) -> None:
    torch.manual_seed(0)
    model = make()
    compiled = torch.compile(
        lambda x, y: F.cross_entropy(model(x), y), backend="ane", options={"device": "sim"}
    )
    compiled(X, Y).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert gradients[name] is not None
    assert [n for n, g in gradients.items() if g is not None and not g.any()] == [name]
