"""A forward value that leaves fp16 later in training: no weight sees it, and its module is named at that step."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.capture.step import capture_training


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 4))


X, Y = 300 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_a_later_batch_that_saturates_is_told_at_its_step(fidelity: str) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = at.compile_step(model, "cross_entropy", optimizer, (X, Y), device="sim", fidelity=fidelity)
    step(X, Y)
    scale = step.loss_scale
    step.sync()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(at.NumericsWarning, match=r"^0.*left fp16.*The update was skipped"):
        step(X * 60, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(X * 60, Y)
    step.sync()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert (step.skipped_steps, step.health) == (2, {"0": 2})
    assert step.loss_scale == scale
    step(X, Y)
    step.sync()
    assert step.skipped_steps == 2
    assert not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class Masked(nn.Module):
    """Scores in the thousands beside numbers that stand for minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.one(x)
        hidden = scores.masked_fill(torch.arange(8) > 5, -1e9) * 2 + torch.tensor([0.0] * 7 + [-60000.0])
        return self.two(hidden.softmax(-1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("model", "scale", "places"), [(net, 300.0, 2), (net, 1.0, 0), (Masked, 300.0, 1)])
def test_only_values_near_the_end_of_the_range_are_watched(
    model: type[nn.Module], scale: float, places: int
) -> None:
    made = model()
    captured = capture_training(
        made, F.cross_entropy, torch.optim.SGD(made.parameters(), 0.1), (X / 300 * scale, Y)
    ).captured
    assert len(captured.guarded) == places, captured.guarded


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
def test_what_is_infinite_in_full_precision_is_not_watched() -> None:
    """The derivative of a root at 0, which a relu in front masks: LPPool2d behind a ReLU skipped every step."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0.0
        layer.bias[:2] = torch.tensor([-10.0, 8e-4])  # type: ignore[index]  # zeros, and small numbers
    model = nn.Sequential(layer, nn.ReLU(), nn.LPPool2d(2.0, 2), nn.Flatten(), nn.Linear(16, 4))
    x, y = 0.3 * torch.randn(8, 1, 6, 6), torch.arange(8) % 4
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1), (x, y), device="sim"
    )
    step(x, y)
    assert step.skipped_steps == 0
    assert not step.health


class Gram(nn.Module):
    """Of a layer with weights near 0 every row's product with every other one, or of its two halves."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.halves = nn.Linear(16, 16, bias=False), nn.Linear(8, 4), halves
        with torch.no_grad():
            self.a.weight.copy_((1e-4 if halves else 1e-5) * torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.b(h[:, :8] * h[:, 8:] if self.halves else h @ h.T)  # type: ignore[no-any-return]


@pytest.mark.parametrize("halves", [False, True])
def test_a_product_of_a_value_with_itself_is_told_before_it_is_wrong(halves: bool) -> None:
    """It grows twice as fast; a loss of 1.45 stood for 3.35, an update was 56 % off, without a word."""
    model, x = Gram(halves), X[:8] / 300
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1), (x, Y), device="sim", verify="off"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, Y)
    with pytest.warns(at.NumericsWarning, match=r"Gram .* left fp16"):
        step(x * 2000, Y)
    assert step.skipped_steps == 1


class Rms(nn.Module):
    """Rows by the root mean square of their positive entries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        taken = (h > 0).to(h.dtype)
        mean = (h.pow(2) * taken).sum(1, keepdim=True) / (taken.sum(1, keepdim=True) + 1)
        return self.b(h / (mean + 1e-4).sqrt())  # type: ignore[no-any-return]


def test_a_square_of_ordinary_size_is_told_when_its_argument_has_grown() -> None:
    """Of 2 in the example; ten times larger rows and weights: a loss of 14.3 stood for 6.6, without a word."""
    model, x = Rms(), X[:8] / 300
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1), (x, Y), device="sim", verify="off"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, Y)
        step(x * 20, Y)
    with pytest.warns(at.NumericsWarning, match=r"Rms .* left fp16"):
        step(x * 1000, Y)
    assert step.skipped_steps == 1
