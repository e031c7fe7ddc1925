"""`x.data = value` within what is compiled: a write, as PyTorch's own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ane_trainer.ane.dynamo import torch_private


class Momentum(nn.Module):
    """A second layer that follows the first one, as momentum encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.slow = nn.Linear(8, 8), nn.Linear(8, 8)
        self.slow.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, own in zip(self.slow.parameters(), self.own.parameters(), strict=True):
                slow.data = slow.data * 0.5 + own.data * 0.5
        return (self.own(x) * self.slow(x)).mean()


def test_an_assignment_of_data_is_kept() -> None:
    torch.manual_seed(0)
    model, x = Momentum(), torch.randn(16, 8)
    plain = copy.deepcopy(model)
    fast = torch.compile(model, backend="ane")
    for _ in range(2):
        loss, expected = fast(x), plain(x)
        assert torch.allclose(loss, expected, atol=2e-3)
        for found, wanted in zip(model.slow.parameters(), plain.slow.parameters(), strict=True):
            assert torch.allclose(found, wanted, rtol=2e-3, atol=1e-4)


def test_data_is_what_dynamo_s_graphs_call() -> None:
    x = torch.ones(2, requires_grad=True)
    assert torch_private.data_of(x).data_ptr() == x.data.data_ptr()
