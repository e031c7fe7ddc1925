"""Models with one planted fault each, and the set-up that shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


class Base(nn.Module):
    """Two layers, between which something goes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)


class Fine(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


class Norm(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x) * 300
        return self.b(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


class Sum(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).abs() * 9000
        return self.b(h / h.sum(-1, keepdim=True))


class Exponentials(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.exp(self.a(x) * 12)
        return self.b(h / (h.amax(-1, keepdim=True) + h.mean(-1, keepdim=True)))


class Variance(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x) + 30
        mean = h.mean(-1, keepdim=True)
        variance = (h * h).mean(-1, keepdim=True) - mean**2
        return self.b((h - mean) / torch.sqrt(variance + 1e-5))


class Offset(Base):
    """A norm of numbers that fp16 does not tell apart beside 300, and whose squares leave it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x) + 300
        mean = h.mean(-1, keepdim=True)
        variance = (h * h).mean(-1, keepdim=True) - mean**2
        return self.b((h - mean) / torch.sqrt(variance + 1e-5))


class Heavy(Base):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.a.weight *= 1e6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) / 1e6)


class DeadScale(Base):
    """A branch whose scale is too small for its numbers to be more than noise in fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.down = nn.Parameter(torch.full((32,), 1e-7)), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(h + self.scale * self.down(h))


class Sines(Base):
    """Sines of thousands, which fp16 holds to whole numbers only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sin(self.a(x) * 5000))


@dataclass(frozen=True)
class Case:
    """A model, whether the range pass is on, and what `debug` has to find: rule, op, remedy, direction."""

    model: Callable[[], nn.Module]
    rewrites: bool
    rule: str
    op: str
    remedy: str
    phase: str = "forward"
    loss: object = "cross_entropy"


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A sum of squares that passes fp16's end."""
    return (F.one_hot(target, 4) * 300.0 - output).square().sum()


CASES = {
    "norm": Case(Norm, False, "overflow", "mul", "norm"),
    "sum": Case(Sum, False, "overflow", "reduce_sum", "rewrite powers"),
    "exponentials": Case(Exponentials, False, "table-end", "exp", "maximum"),
    "loss": Case(Fine, False, "overflow", "mul", "rewrite powers", "loss", squares),
    "variance": Case(Variance, True, "cancellation", "sub", "variance"),
    "offset": Case(Offset, True, "overflow", "mul", "offset"),
}
