"""Python numbers that change from call to call, arguments and attributes, are fed as scalars: one graph for all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ane_trainer.ane.dynamo import report


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.gain = nn.Linear(8, 3), 0.5

    def forward(self, x: Tensor, tau: float) -> Tensor:
        return self.layer(x) / tau * self.gain  # type: ignore[no-any-return]


def test_numbers_that_change_are_fed() -> None:
    model, x = Scaled(), torch.ones(2, 8)
    fast = torch.compile(model, backend="ane", options={"device": "sim"})
    for number, tau in enumerate((1.0, 0.5, 0.25, 3.0, 0.125, 1.5)):
        model.gain = 0.5 + number
        model.zero_grad()
        found = fast(x, tau)
        found.sum().backward()
        gradient = model.layer.weight.grad
        assert gradient is not None
        torch.testing.assert_close(found, model(x, tau), rtol=3e-3, atol=1e-3)
        torch.testing.assert_close(
            gradient, torch.full_like(gradient, 2.0 * model.gain / tau), rtol=3e-3, atol=1e-3
        )
    assert report().graphs == 2
