"""Distances of many rows that are longer than they lie apart: torch's own a^2 + b^2 - 2ab leaves nothing of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ane_trainer as at


class Near(nn.Module):
    """Distances of rows from codes, all near 32."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.codes = nn.Parameter(32 + torch.randn(codes, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x + 32, self.codes)


@pytest.mark.parametrize(("rows", "codes"), [(40, 30), (1024, 320)])
@pytest.mark.parametrize("door", ["step", "torch.compile"])
def test_rows_nearer_than_they_are_long(door: str, rows: int, codes: int) -> None:
    """Of few as differences, of many about their middle."""
    model, x, y = Near(codes), torch.randn(rows, 8), torch.rand(rows, codes)
    plain = copy.deepcopy(model).double()
    loss = lambda o, t: (o * t).mean()  # noqa: E731
    want = loss(plain(x.double()), y)
    want.backward()
    before = model.codes.detach().clone()
    if door == "step":
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        step = at.compile_step(model, loss, optimizer, (x, y), device="sim", fidelity="fast")
        got = float(step(x, y))
        step.sync()
        gradient = before - model.codes.detach()
    else:
        torch._dynamo.reset()
        options = {"device": "sim", "fidelity": "fast"}
        value = loss(torch.compile(model, backend="ane", options=options)(x), y)
        value.backward()
        got, gradient = float(value.detach()), model.codes.grad  # type: ignore[assignment]
    assert got == pytest.approx(float(want.detach()), rel=0.005)
    assert float((gradient - plain.codes.grad).norm()) < 0.02 * float(plain.codes.grad.norm())  # type: ignore[arg-type, union-attr]
