"""The proof of `torch.compile`: forward and backward are compared with fp32 as one."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at


class Embedded(nn.Module):
    """Sines of angles up to a million, which fp16 does not hold: the loss at first hardly depends on them."""

    def __init__(self, largest: float) -> None:
        super().__init__()
        self.largest = largest
        self.register_buffer("times", torch.rand(32, 1))
        self.register_buffer("frequencies", torch.logspace(0, -4, 16))
        self.time, self.a, self.b, self.c = (
            nn.Linear(32, 64),
            nn.Linear(16, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        angles = self.times * self.largest * self.frequencies
        h = F.silu(self.a(x) + self.time(torch.cat([angles.sin(), angles.cos()], -1)))
        return self.c(F.silu(self.b(h)))


class Branches(nn.Module):
    """Batch norm, ReLU, max pool, dropout of 0 and constants, of which forward and backward both have some."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2) * torch.tensor([[[[1.0, 0.5, 2.0, 0.25]]]])
        return self.head(h.flatten(1)).softmax(-1)


def told(model: nn.Module, x: Tensor, y: Tensor, calls: int = 1) -> list[str]:
    """What is said of calls with their loss inside, and of one backward pass through all."""
    fast = torch.compile(lambda x, y: F.mse_loss(model(x), y), backend="ane")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [fast(x, y) for _ in range(calls)]
        torch.stack(losses).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    return [str(w.message) for w in caught if issubclass(w.category, at.NumericsWarning)]


def test_gradients_of_values_that_the_forward_lost_are_announced() -> None:
    """The loss was right within 1 %, and the backward program right on what it was fed: updates 90 % off, silent."""
    torch.manual_seed(0)
    model, x, y = Embedded(1e6), torch.randn(32, 16), torch.randn(32, 16)
    plain = copy.deepcopy(model)
    (message,) = told(model, x, y)
    F.mse_loss(plain(x), y).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert max(float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs) > 0.5
    assert "(backward): departs from fp32 by" in message
    assert "beyond what fp16 holds" in message


def test_several_forwards_before_a_backward_are_compared_too() -> None:
    torch.manual_seed(0)
    model, x, y = Embedded(1e6), torch.randn(32, 16), torch.randn(32, 16)
    assert any("(backward): departs" in message for message in told(model, x, y, calls=3))


def test_what_fp16_holds_is_not_announced() -> None:
    torch.manual_seed(0)
    assert told(Embedded(10.0), torch.randn(32, 16), torch.randn(32, 16)) == []
    torch._dynamo.reset()
    assert told(Branches(), torch.randn(16, 3, 8, 8), torch.rand(16, 10), calls=2) == []
