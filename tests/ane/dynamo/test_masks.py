"""torch.compile with masks as indices, and of attention, that are inputs: in the program, as compile_step has them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at

SIM = {"device": "sim"}

Rows = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Masked(nn.Module):
    """A function of a layer's output and a mask, between two layers."""

    def __init__(self, function: Rows) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(8, 16), nn.Linear(16, 4), function

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.b(self.function(self.a(x), mask))


def doubled(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    h = h.clone()
    h[mask] *= 2
    return h


def chosen(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(h)
    out[mask] = torch.tanh(h[mask])
    return out


def whole_rows(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows, out = mask[:, 0], torch.zeros_like(h)
    out[rows] = h[rows] * 3
    return out


SELECTIONS: dict[str, Rows] = {
    "h[m] *= 2": doubled, "out[m] = f(h[m])": chosen, "rows": whole_rows, "h[m].mean()": lambda h, m: h * h[m].mean(),
    "masked_select": lambda h, m: h + h.masked_select(m).sum() / 64,
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_mask_as_an_index_stays_in_the_program(name: str) -> None:
    torch.manual_seed(0)
    model, x = Masked(SELECTIONS[name]), torch.randn(8, 8)
    exact = copy.deepcopy(model)
    fast = torch.compile(model, backend="ane", options=SIM)
    at.ane.dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            mask = torch.rand(8, 16) > 0.5
            model.zero_grad()
            exact.zero_grad()
            fast(x, mask).square().sum().backward()
            exact(x, mask).square().sum().backward()
            for p, q in zip(model.parameters(), exact.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                torch.testing.assert_close(p.grad, q.grad, rtol=0.02, atol=0.02 * float(q.grad.abs().max()))
    assert at.ane.dynamo.report().graph_breaks == []
    assert at.ane.dynamo.report().compiles == 2


def test_rows_that_a_mask_selects_in_a_loss() -> None:
    torch.manual_seed(0)
    o, y = torch.randn(8, 4, requires_grad=True), torch.randint(0, 4, (8,))
    loss = torch.compile(lambda o, y: F.cross_entropy(o[y > 1], y[y > 1]), backend="ane", options=SIM)
    torch.testing.assert_close(loss(o, y), F.cross_entropy(o[y > 1], y[y > 1]), rtol=0.01, atol=0.01)


def test_what_needs_the_number_of_rows_runs_on_the_cpu_and_says_so() -> None:
    model = Masked(lambda h, m: h * h[m].sort().values[0])
    x, mask = torch.randn(8, 8), torch.rand(8, 16) > 0.5
    fast = torch.compile(model, backend="ane", options=SIM)
    with pytest.warns(UserWarning, match="test_masks.py:.*depends on data"):
        got = fast(x, mask)
    torch.testing.assert_close(got, model(x, mask))
    assert at.ane.dynamo.report().on_cpu


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_an_encoder_takes_its_mask_as_an_input(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    mask = mask if kind == torch.float32 else mask < 0
    fast = torch.compile(model, backend="ane", options=SIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(fast(x, mask), model(x, mask), rtol=0.02, atol=0.02)
