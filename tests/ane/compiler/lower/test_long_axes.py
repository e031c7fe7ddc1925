"""Order, extrema and places along an axis of more than 2,048 elements, and integers that leave a program so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer import compile_step

Function = Callable[[torch.Tensor], object]
SIZE = 2100

FUNCTIONS: dict[str, Function] = {
    "sort": lambda x: torch.sort(x, dim=1, stable=True),
    "top": lambda x: torch.topk(x, 20, dim=1)[0],
    "top of few": lambda x: torch.topk(x, 3, dim=1)[0],
    "kth": lambda x: torch.kthvalue(x, 1040, dim=1)[0],
    "kth of few": lambda x: torch.kthvalue(x, 2, dim=1)[0],
    "median": lambda x: torch.median(x),
    "cummax": lambda x: torch.cummax(x, 1),
    "cummin": lambda x: torch.cummin(x, 0),
    "argmax": lambda x: (x.argmax(1), x.argmin()),
    "max": lambda x: torch.max(x, dim=1),
    "bucketize": lambda x: torch.bucketize(x, torch.arange(-1050.0, 1050.0)),
    "searchsorted": lambda x: torch.searchsorted(torch.arange(-1050.0, 1050.0), x, right=True),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_places_are_exact(name: str) -> None:
    """Of numbers of which each comes four times."""
    torch.manual_seed(0)
    function = FUNCTIONS[name]
    call = torch.compile(function, backend="ane", options={"device": "sim", "fidelity": "fast"})
    x = torch.floor((torch.randperm(SIZE).float()[None] - SIZE // 2) / 4)
    x = x.T if name == "cummin" else x
    got, want = call(x), function(x)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True):
        assert torch.equal(a, b)


class Largest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.layer(x)[..., 0]
        return scores.topk(40)[0] + scores.gather(1, scores.argmax(1, keepdim=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_go_to_the_places(compiled: bool) -> None:
    torch.manual_seed(0)
    model, x = Largest(), torch.randn(1, SIZE, 2)
    y = torch.randn(1, 40)
    value = F.mse_loss(model(x), y)
    want = torch.autograd.grad(value, model.layer.weight)[0]
    if compiled:
        call = torch.compile(model, backend="ane", options={"device": "sim", "fidelity": "fast"})
        got = torch.autograd.grad(F.mse_loss(call(x), y), model.layer.weight)[0]
    else:
        before = model.layer.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = compile_step(model, F.mse_loss, optimizer, (x, y), device="sim", fidelity="fast")
        step(x, y)
        step.sync()
        got = (before - model.layer.weight.detach()) / 0.1
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.01)


def test_a_sort_beyond_what_fits_is_refused() -> None:
    with pytest.raises(Exception, match="in parts, or take at most 16"):
        torch.compile(lambda x: x.sort(1)[0], backend="ane", options={"device": "sim"})(torch.randn(64, 4000))
