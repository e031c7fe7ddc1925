"""Values that a power of two raises, that stand for minus infinity, or shrink on their way, in later batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at


def updates(
    model: nn.Module, loss: object, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """By parameter the relative error of what SGD adds in the last of the steps, which skips none."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = at.compile_step(model, loss, optimizer, batches[0], device="sim", fidelity="fast")  # type: ignore[arg-type]
    for x, y in batches[:-1]:
        step(x, y)
    step.sync()
    plain = copy.deepcopy(model).double()
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batches[-1]
    step(x, y)
    step.sync()
    assert step.skipped_steps == 0
    loss(plain(x.double()), y.double() if y.is_floating_point() else y).backward()  # type: ignore[operator]
    return {
        name: float(((p.detach() - b).double() / -0.1 - q.grad).norm() / q.grad.norm())
        for (name, p), b, q in zip(model.named_parameters(), before, plain.parameters(), strict=True)
        if q.grad is not None
    }


class Shifted(nn.Module):
    """x + b"""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b


def log_cosh(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    d = o - y
    return (d + F.softplus(-2 * d) - 0.6931471805599453).mean()


def test_a_sigmoid_that_the_example_saturates_is_read_where_a_later_batch_does_not() -> None:
    """1e-26 in the example was stored 2^73 times larger; 0.96 in the next batch then was 2^-57."""
    first = torch.full((4, 3), 30.0)
    second = first.clone()
    second[0, 2] = -1.589
    found = updates(Shifted(), log_cosh, [(first, torch.zeros(4, 3)), (second, torch.zeros(4, 3))])
    assert found["b"] < 0.01, found


class Masked(nn.Module):
    """Attention with scores near 1e-7 and a mask of infinities."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(8, 24, bias=False), nn.Linear(8, 3)
        with torch.no_grad():
            self.qkv.weight.mul_(0.01)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        shares = (q @ k.transpose(-1, -2) + self.mask.to(x.dtype)).softmax(-1)
        return self.head((shares @ v * 1e3).tanh().mean(1))


def test_small_scores_do_not_bring_a_mask_out_of_fp16() -> None:
    """The mask was raised by 2^16 beside them: saturated and taken back, minus infinity was -1."""
    torch.manual_seed(1)
    x, y = torch.randn(4, 5, 8) * 0.03, torch.tensor([0, 2, 1, 2])
    found = updates(Masked(), F.cross_entropy, [(x, y)])
    assert max(found.values()) < 0.02, found


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ELU(), nn.Linear(8, 3))


X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 3


@pytest.mark.parametrize("door", ["step", "torch.compile"])
def test_a_gradient_that_saturates_in_front_of_a_norm(door: str) -> None:
    """The head's weights become 7 times larger: what comes out of it leaves fp16, and the norm divides it again."""
    model = normed()
    head = model[3].weight  # type: ignore[union-attr]
    with torch.no_grad():
        head.mul_(50.0)
        model[0].weight.mul_(100.0)  # type: ignore[operator, union-attr]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    options = {"device": "sim", "fidelity": "fast"}
    if door == "step":
        step = at.compile_step(model, F.cross_entropy, optimizer, (X, Y), **options)  # type: ignore[arg-type]
        step(X, Y)
        step.sync()
    else:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="ane", options=options)
        F.cross_entropy(compiled(X), Y).backward()
    with torch.no_grad():
        head.mul_(7.0)
    optimizer.param_groups[0]["lr"] = 1e-3
    plain, before = copy.deepcopy(model), model[0].weight.detach().clone()  # type: ignore[union-attr]
    plain.zero_grad()
    F.cross_entropy(plain(X), Y).backward()
    if door == "step":
        step(X, Y)
        step.sync()
        assert step.skipped_steps == 0
        got = (model[0].weight.detach() - before) / -1e-3  # type: ignore[union-attr]
    else:
        model.zero_grad()
        F.cross_entropy(compiled(X), Y).backward()
        got = model[0].weight.grad  # type: ignore[union-attr]
    want = plain[0].weight.grad  # type: ignore[union-attr]
    assert float((got - want).norm()) < 0.02 * float(want.norm())


def test_a_variance_beyond_fp16_does_not_get_into_the_running_one() -> None:
    """The norm itself carries it; the buffer took 65,504 for 300,000 without a word."""
    scale = 30.0
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = at.compile_step(model, F.cross_entropy, optimizer, (scale * X, Y), device="sim", fidelity="fast")
    step(scale * X, Y)
    step.sync()
    variance = model[1].running_var.clone()  # type: ignore[union-attr, operator]
    with pytest.warns(at.NumericsWarning, match="^1.*left fp16"):
        step(1500 * X, Y)
    step.sync()
    assert torch.equal(model[1].running_var, variance)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_variance_far_beyond_the_example_s_is_told_and_its_update_kept(scale: float) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    plain = copy.deepcopy(model)
    optimizer, its = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, plain))
    step = at.compile_step(model, F.cross_entropy, optimizer, (scale * X, Y), device="sim")
    with pytest.warns(at.NumericsWarning, match=r"^1 \(running statistics\).*is right; the running variance"):
        step(1500 * X, Y)
    F.cross_entropy(plain(1500 * X), Y).backward()
    its.step()
    step.sync()
    assert step.skipped_steps == 0
    assert step.health["1"] == 1
    for got, want in zip(model[1].parameters(), plain[1].parameters(), strict=True):
        assert (got - want).norm() < 0.01 * want.norm()
