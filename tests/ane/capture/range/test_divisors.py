"""Divisors with small entries beside large ones, whose reciprocals leave fp16, through both front doors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ane_trainer as at

COUNTS = torch.tensor([0.0, 0.5, 1.28, 0.0, 0.78, 25.0])

QUOTIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as given": lambda h, c: h / (c + 1e-5),
    "smoothed": lambda h, c: h / ((c + 1e-5) / (c.sum() + 6e-5) * c.sum()),
    "rows": lambda h, c: h / ((c + 1e-5) / (c.sum() + 6e-5) * c.sum()).unsqueeze(0).expand(4, 6),
    "inverse": lambda h, c: h * (0.1 / (c + 1e-5)),
}


class Divided(nn.Module):
    def __init__(self, quotient: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.quotient = nn.Parameter(torch.full((4, 6), 0.1)), quotient
        self.register_buffer("counts", COUNTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.quotient(self.weight, self.counts) * x  # type: ignore[arg-type]


@pytest.mark.parametrize("name", QUOTIENTS)
def test_quotients_of_small_divisors_are_fp32s(name: str) -> None:
    model, x = Divided(QUOTIENTS[name]), torch.ones(4, 6)
    want = model(x).detach()
    got = torch.compile(model, backend="ane", options={"device": "sim", "fidelity": "fast"})(x).detach()
    torch.testing.assert_close(got, want, rtol=0.02, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 1e-12)
    loss = lambda o, y: (o * y).abs().mean()  # noqa: E731
    step = at.compile_step(model, loss, optimizer, (x, 1.0 / want), device="sim", fidelity="fast")
    assert float(step(x, 1.0 / want)) == pytest.approx(1.0, rel=0.02)
