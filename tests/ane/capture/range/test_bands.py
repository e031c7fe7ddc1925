"""Noise that rounding leaves in sums by place is no value that a power of two would bring near 1."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at

NODES = 50


class Attention(nn.Module):
    """Graph attention whose softmax over the edges of a node subtracts their largest score, with its gradient of 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.values, self.scores, self.last = nn.Linear(16, 16), nn.Linear(32, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = self.values(x)
        scores = F.leaky_relu(self.scores(torch.cat([h[edges[0]], h[edges[1]]], 1)).squeeze(1), 0.2)
        largest = torch.full((NODES,), -torch.inf).scatter_reduce(0, edges[1], scores, "amax")
        shares = (scores - largest[edges[1]]).exp()
        total = torch.zeros(NODES).index_add_(0, edges[1], shares)
        weights = shares / (total[edges[1]] + 1e-16)
        return self.last(torch.zeros_like(h).index_add_(0, edges[1], weights[:, None] * h[edges[0]]).relu())  # type: ignore[no-any-return]


def test_a_cancelled_sum_over_edges_stays_small() -> None:
    model = Attention()
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    x, y = (torch.randn(NODES, 16), torch.randint(0, NODES, (2, 200))), torch.randint(0, 4, (NODES,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        step = at.compile_step(model, "cross_entropy", optimizer, example=(x, y), chip="m1", device="sim")
        step(x, y)
    step.sync()
    own = torch.optim.SGD(twin.parameters(), 0.5)
    F.cross_entropy(twin(*x), y).backward()
    own.step()
    for p, q, before in zip(model.parameters(), twin.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < 0.03 * (q - before).norm()
