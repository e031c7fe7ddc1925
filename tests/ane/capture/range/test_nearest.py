"""Codes far beyond those that are chosen, as VQ-VAEs of running averages have them, through both front doors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.capture.range import cut_far_codes

Distances = Callable[[Tensor, Tensor], Tensor]

CHOICES: dict[str, Distances] = {
    "written out": lambda x, e: (x.pow(2).sum(1, keepdim=True) - 2 * x @ e.t() + e.pow(2).sum(1)).argmin(1),
    "squares first": lambda x, e: ((x**2).sum(1, keepdim=True) + (e**2).sum(1) - 2 * torch.matmul(x, e.t())).argmin(1),
    "negative": lambda x, e: (-(x.pow(2).sum(1, keepdim=True) - 2 * x @ e.t() + e.pow(2).sum(1))).max(-1).indices,
    "root": lambda x, e: (x.pow(2).sum(1, True) + e.pow(2).sum(1) - 2 * x @ e.T).clamp(min=0).sqrt().argmin(-1),
}  # fmt: skip


class Coded(nn.Module):
    def __init__(self, choose: Distances, far: float) -> None:
        super().__init__()
        self.layer, self.choose = nn.Linear(8, 8), choose
        codes = torch.randn(32, 8)
        codes[::4] *= far
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        chosen = F.one_hot(self.choose(h, self.codes), 32).to(h.dtype) @ self.codes  # type: ignore[arg-type]
        return h + (chosen - h).detach()


@pytest.mark.parametrize("far", [1.0, 1e5])
@pytest.mark.parametrize("name", CHOICES)
def test_the_nearest_code_is_chosen(name: str, far: float) -> None:
    torch.manual_seed(0)
    model, x = Coded(CHOICES[name], far), torch.randn(64, 8)
    want = model(x).detach()
    got = torch.compile(model, backend="ane", options={"device": "sim", "fidelity": "fast"})(x).detach()
    assert (
        (got - want).abs().amax(1) < 0.02
    ).double().mean() > 0.95  # two codes may be as near but for rounding
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = at.compile_step(model, "mse", optimizer, (x, want), device="sim", fidelity="fast")
    assert float(step(x, want)) < 0.1


@pytest.mark.parametrize(
    "distances",
    [
        lambda x, e: (x.pow(2).sum(1, True) - x @ e.t() + e.pow(2).sum(1)).argmin(1),  # no distances
        lambda x, e: (x.pow(2).sum(1, True) - 2 * x @ e.t() + e.pow(2).sum(1)).argmax(1),  # the farthest
        lambda x, e: (x.pow(2).sum(1, True) - 2 * x @ e.t() + e.pow(2).sum(1)).argmin(0),  # rows near a code
        lambda x, e: (2 * x @ x.t() - x.pow(2).sum(1)).argmax(1),  # among the rows themselves
    ],
)
def test_what_is_no_choice_of_the_nearest_stays(distances: Distances) -> None:
    module = make_fx(distances, tracing_mode="fake")(torch.randn(6, 8), torch.randn(6, 8))
    assert cut_far_codes(module.graph) == 0


def test_a_product_that_something_else_reads_stays() -> None:
    def both(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        found = x.pow(2).sum(1, True) - 2 * x @ e.t() + e.pow(2).sum(1)
        return found.argmin(1), found.softmax(1)

    module = make_fx(both, tracing_mode="fake")(torch.randn(6, 8), torch.randn(5, 8))
    assert cut_far_codes(module.graph) == 0
