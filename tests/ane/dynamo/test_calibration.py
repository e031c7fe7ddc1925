"""Values of any size through `torch.compile` and `compile_forward`: calibrated at the first call, followed later."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane import dynamo

WITHIN = 0.02


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def gradients_off(model: nn.Module, reference: nn.Module) -> float:
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(off(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None)


class WithLoss(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.factor = (
            nn.Linear(16, 32),
            nn.LayerNorm(32),
            nn.Linear(32, 10),
            factor,
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * F.cross_entropy(self.b(F.gelu(self.norm(self.a(x)))), y)


@pytest.mark.parametrize("factor", [1e5, 1.0, 1e-3, 1e-6])
def test_a_loss_inside_has_its_gradients_from_the_first_call_on(factor: float) -> None:
    torch.manual_seed(0)
    x, y, model = torch.randn(64, 16), torch.randint(0, 10, (64,)), WithLoss(factor)
    reference = copy.deepcopy(model)
    fast = torch.compile(model, backend="ane")
    for _ in range(2):
        model.zero_grad()
        reference.zero_grad()
        loss, expected = fast(x, y), reference(x, y)
        loss.backward()
        expected.backward()
        assert off(loss, expected) < WITHIN
        assert gradients_off(model, reference) < WITHIN


@pytest.mark.parametrize(
    "mean", [lambda d: (d**2).sum() / d.numel(), lambda d: d.abs().mean((1, 2, 3)).mean()]
)
def test_a_mean_inside_over_more_numbers_than_fp16_counts(mean: Callable[[Tensor], Tensor]) -> None:
    """The number of values was cut to 65,504 where nothing else asked for a power of two."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 3, padding=1)
    reference, x = copy.deepcopy(model), torch.randn(1, 3, 160, 160)
    assert x.numel() > 65504
    fast = torch.compile(lambda x: mean(model(x) - x), backend="ane")
    fast(x).backward()
    mean(reference(x) - x).backward()
    assert gradients_off(model, reference) < WITHIN


class Norm(nn.Module):
    """Lengths: squares of large numbers leave fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) ** 2).sum(-1).sqrt()


@pytest.mark.parametrize("size", [1e-5, 1e3, 1e6])
def test_inputs_of_any_size_through_both(size: float) -> None:
    torch.manual_seed(0)
    model, x = Norm(), torch.randn(4, 16) * size
    with torch.no_grad():
        model.a.bias.zero_()
    assert off(at.compile_forward(model, x)(x), model(x)) < WITHIN
    reference = copy.deepcopy(model)
    got = torch.compile(model, backend="ane")(x)
    got.sum().backward()
    reference(x).sum().backward()
    assert off(got, reference(x)) < WITHIN
    assert gradients_off(model, reference) < WITHIN


def train(model: nn.Module, sizes: Iterable[float]) -> list[float]:
    reference = copy.deepcopy(model)
    fast, found = torch.compile(model, backend="ane"), []
    for size in sizes:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)) * size
        model.zero_grad()
        reference.zero_grad()
        got, expected = fast(x), reference(x)
        got.square().mean().backward()
        expected.square().mean().backward()
        found += [off(got, expected), gradients_off(model, reference)]
    return found


def test_later_batches_of_other_sizes_are_followed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    assert max(train(model, (1.0, 1e4, 1e-4, 1.0, 1e6))) < WITHIN


def test_batches_of_one_size_are_calibrated_once() -> None:
    torch.manual_seed(0)
    train(nn.Linear(16, 4), (1.0, 2.0, 0.5, 1.0))
    assert dynamo.report().compiles == 2


def test_a_branch_that_begins_at_zero_is_followed() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * 1e-3)

    torch.manual_seed(0)
    model, x = Lora(), torch.randn(8, 16)
    reference, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), 1e-3)
    other, fast = torch.optim.SGD(reference.parameters(), 1e-3), torch.compile(model, backend="ane")
    for _ in range(3):
        for call, optim in ((fast, optimizer), (reference, other)):
            optim.zero_grad()
            (call(x) - x).square().mean().backward()
            optim.step()
    assert off(model.b.weight, reference.b.weight) < WITHIN
    assert gradients_off(model, reference) < WITHIN


def test_what_stays_beyond_the_range_is_told() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumprod(x, 0)

    with pytest.warns(at.NumericsWarning, match=r"test_calibration.py:\d+.* needs values below 65504"):
        torch.compile(Products(), backend="ane")(torch.full((4,), 90.0))


class Codes(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1) + self.first


@pytest.mark.parametrize("first", [2000, 4001])
def test_integers_that_come_out_rounded_are_told(first: int) -> None:
    x, model = torch.eye(3, 10), Codes(first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [at.compile_forward(model, x)(x), torch.compile(model, backend="ane")(x)]
    told = [w for w in caught if "integers below 2048" in str(w.message)]
    assert len(told) == (1 if first > 2048 else 0)  # torch.compile's leave in two numbers
    assert all(torch.equal(got.long(), model(x)) for got in found[len(told) :])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: nn.functional.softplus(x * 1e5).mean(), "departs from fp32"),
        (lambda x: (x + 1e4 - 1e4).mean(), "departs from fp32"),
    ],
)
def test_the_first_call_is_compared_with_full_precision(
    function: Callable[..., torch.Tensor], words: str
) -> None:
    torch.manual_seed(0)
    with pytest.warns(at.NumericsWarning, match=rf"test_calibration.py:\d+.*{words}"):
        torch.compile(function, backend="ane", options={"device": "sim"})(torch.rand(16, 8))


def test_masked_scores_of_a_log_softmax_are_not_told() -> None:
    """Their logarithms, -1e9, are kept for the backward pass; what they stand for is 0."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(6, 8), torch.randn(8, 6), (torch.arange(8) + 4) % 8

    def contrast(x: Tensor) -> Tensor:
        z = F.normalize(layer(x), dim=-1)
        return F.cross_entropy((z @ z.T / 0.07).masked_fill(torch.eye(8).bool(), -1e9), y)

    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        loss = torch.compile(contrast, backend="ane")(x)
        loss.backward()
    assert layer.weight.grad is not None
    found, layer.weight.grad = layer.weight.grad.clone(), None
    contrast(x).backward()
    assert (found - layer.weight.grad).norm() < 0.02 * layer.weight.grad.norm()


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
@pytest.mark.parametrize("layer", [nn.LayerNorm(16), nn.InstanceNorm1d(4), nn.BatchNorm1d(4)])
def test_rows_that_are_nearly_constant_are_told(layer: nn.Module) -> None:
    """What fp16's rounding of the input leaves of their differences; the forward alone agreed within its own cost."""
    x = 1 + 1e-3 * torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with pytest.warns(at.NumericsWarning, match="near it from an input.* % of what is left"):
        torch.compile(layer, backend="ane")(x)


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
def test_so_is_a_bias_in_front_of_a_norm_that_hides_the_rest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with torch.no_grad():
        model[0].bias.fill_(300.0)  # type: ignore[union-attr, operator]
    torch._dynamo.reset()
    with pytest.warns(at.NumericsWarning, match="subtracts a mean .* % of what is left"):
        torch.compile(model, backend="ane")(torch.randn(16, 8))


def test_ordinary_differences_are_not() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.LayerNorm(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        (torch.compile(model, backend="ane")(5 + torch.randn(16, 8)) * torch.randn(16, 8)).sum().backward()
