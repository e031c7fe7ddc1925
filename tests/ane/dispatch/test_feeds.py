"""The batch as arrays of a program's ports."""

from __future__ import annotations

import torch
from torch import nn

import ane_trainer as at


def test_a_batch_of_more_axes_than_the_engine_has_is_fed_in_the_ports_shape() -> None:
    """Merged axes: `SIM103 write x: needs the shape (32, 2, 2, 2, 2)` before."""

    class Flips(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned: torch.Tensor = super().forward(x).permute(0, 6, 5, 4, 3, 2, 1)
            return turned.flip(3).flatten(1)

    model, x, y = Flips(2, 2), torch.randn(4, 2, 2, 2, 2, 2, 2), torch.randint(0, 64, (4,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = at.compile_step(model, "cross_entropy", sgd, example=(x, y), device="sim")
    step(x, y)
    assert step.feeds(x, y)["x"].ndim == 5
    assert step.agreement is not None
    assert step.agreement.agrees
