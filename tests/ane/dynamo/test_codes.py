"""Integers that only the host can compute: torch.compile takes what follows from a batch's integers out of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.dynamo import report

CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "product beyond two million": lambda i: (i * 2_654_435 + 12_345) % 97,
    "congruence twice": lambda i: ((i * 421 + 1_663) % 7_875 * 13 + 5) % 97,
    "floats cut": lambda i: (i.float() / 3.0).floor().long() % 97,
    "rounded logarithm": lambda i: i.clamp(min=1).float().log2().round().long(),
    "mean": lambda i: (i.float().mean(1, keepdim=True).long() + i) % 97,
}


class Coded(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.table, self.head = name, nn.Embedding(97, 4), nn.Linear(5, 3)

    def forward(self, i: Tensor) -> Tensor:
        codes = CODES[self.name](i)
        found: Tensor = self.head(torch.cat((self.table(codes), (codes.float() / 97)[..., None]), -1).sum(1))
        return found


@pytest.mark.parametrize("name", CODES)
def test_integers_of_the_batch_are_computed_exactly(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, y = Coded(name), torch.randint(0, 3, (4,))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="ane", options={"device": "sim"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        for most in (50, 5_000):
            i = torch.randint(0, most, (4, 6))
            model.zero_grad()
            twin.zero_grad()
            F.cross_entropy(compiled(i), y).backward()
            F.cross_entropy(twin(i), y).backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=0.02, atol=2e-3)
    assert any("of integers computed" in note for program in report().programs for note in program.host)
