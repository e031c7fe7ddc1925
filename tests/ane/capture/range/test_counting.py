"""Counts beyond 65,504 beside floats, through both front doors; comparisons keep the integers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ane_trainer as at

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dice": lambda o, y: 1 - (2 * (o.sigmoid() * y).sum() + 1) / (o.sigmoid().sum() + (y > 0).sum() + 1),
    "masked mean": lambda o, y: ((o - y) ** 2 * (y > 0)).sum() / (y > 0).sum().clamp(min=1),
    "count": lambda o, y: (o**2).sum() / torch.count_nonzero(y),
    "arithmetic": lambda o, y: (o**2).sum() / (2 * (y > 0).long().sum() + 7),
}


class WithLoss(nn.Module):
    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.loss = nn.Conv2d(1, 1, 1), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.layer(x), y)


@pytest.mark.parametrize("name", LOSSES)
def test_a_large_count_beside_floats(name: str) -> None:
    torch.manual_seed(0)
    whole = WithLoss(LOSSES[name])
    x, y = torch.randn(4, 1, 140, 140), (torch.rand(4, 1, 140, 140) > 0.1).float()
    loss = whole(x, y)
    loss.backward()
    want = whole.layer.weight.grad.clone()  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(whole.layer.parameters(), 0.1)
    step = at.compile_step(whole.layer, LOSSES[name], optimizer, (x, y), device="sim", fidelity="fast")
    assert float(step(x, y)) == pytest.approx(float(loss.detach()), rel=3e-3)
    assert step.agreement is not None
    assert step.agreement.agrees
    whole.zero_grad()
    if name == "dice":
        torch.manual_seed(0)
        whole = WithLoss(LOSSES[name])
        torch.compile(whole, backend="ane", options={"device": "sim"})(x, y).backward()
        torch.testing.assert_close(whole.layer.weight.grad, want, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("limit", [5, 1000])
def test_a_large_count_is_compared_exactly(limit: int) -> None:
    def loss(o: Tensor, y: Tensor) -> Tensor:
        many = (y > 0).sum()
        return o.square().mean() * torch.where(many > limit, 1.0, 2.0) * torch.where(many == limit, 3.0, 1.0)

    torch.manual_seed(0)
    layer, x = nn.Conv2d(1, 1, 1), torch.randn(1, 1, 280, 280)
    targets = [torch.ones(1, 1, 280, 280)]
    for count in (limit - 1, limit, limit + 1):
        targets.append((torch.randperm(78400) < count).float().reshape(1, 1, 280, 280))
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    step = at.compile_step(layer, loss, optimizer, (x, targets[0]), device="sim")
    for y in targets:
        assert float(step(x, y)) == pytest.approx(float(loss(layer(x), y).detach()), rel=5e-3)
