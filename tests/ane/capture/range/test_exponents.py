"""Powers of two beside values that fp16 loses: the rewrites in graphs, and updates against PyTorch in fp64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.capture.range import apply
from ane_trainer.ane.capture.range.calibration import Magnitude, magnitudes, measure
from ane_trainer.ane.capture.range.exponents import Exponents, scale_values
from ane_trainer.ane.capture.step import HEALTH, capture_training

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Small(nn.Module):
    """A layer whose input is multiplied by c, and its output divided by it."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c, self.a, self.o = c, nn.Linear(16, 16, bias=False), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.a(x * self.c) / self.c))


class Branch(nn.Module):
    """A residual branch under LayerScale."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.gamma, self.head = nn.Parameter(gamma * torch.ones(16)), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.gamma * self.branch(x))


def dice(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p = torch.sigmoid(o)
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def charbonnier(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((o - y) ** 2 + 1e-3).sqrt().mean()


def summed(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(o, y, reduction="sum")


def classes(n: int) -> torch.Tensor:
    return torch.randint(0, 3, (n,))


def case(name: str) -> tuple[nn.Module, Loss, torch.Tensor, torch.Tensor]:
    """Model, loss and batch: one of each kind that left the range."""
    torch.manual_seed(0)
    line = nn.Linear(8, 3)
    wide = (torch.rand(64, 2048) > 0.9).float()
    pixels = (torch.rand(4, 1, 192, 192) > 0.3).float()
    cases: dict[str, Callable[[], tuple[nn.Module, Loss, torch.Tensor, torch.Tensor]]] = {
        "products of 1e-5": lambda: (Small(1e-5), F.cross_entropy, torch.randn(16, 16), classes(16)),
        "products of 1e-3": lambda: (Small(1e-3), F.cross_entropy, torch.randn(16, 16), classes(16)),
        "inputs of 1e5": lambda: (line, F.cross_entropy, torch.randn(16, 8) * 1e5, classes(16)),
        "inputs of 1e-6": lambda: (
            nn.Sequential(nn.LayerNorm(8, eps=1e-14), line), F.cross_entropy, torch.randn(16, 8) * 1e-6, classes(16)
        ),
        "mean over 131072": lambda: (
            nn.Linear(64, 2048), F.binary_cross_entropy_with_logits, torch.randn(64, 64), wide
        ),
        "sums over 147456": lambda: (nn.Conv2d(1, 1, 3, padding=1), dice, torch.randn(4, 1, 192, 192), pixels),
        "targets of 1000": lambda: (line, F.mse_loss, torch.randn(16, 8), torch.randn(16, 3) * 1000),
        "loss of 1e8": lambda: (line, summed, torch.randn(16, 8), torch.randn(16, 3) * 2000),
        "loss of 1e-6": lambda: (line, lambda o, y: 1e-6 * F.mse_loss(o, y), torch.randn(16, 8), torch.randn(16, 3)),
        "roots of 1e6": lambda: (line, charbonnier, torch.randn(16, 8), torch.randn(16, 3) * 1000),
        "buffer of 1e6": lambda: (Shifted(), F.cross_entropy, torch.randn(16, 8), classes(16)),
        "scores of 1e-6": lambda: (
            line, lambda o, y: F.cross_entropy(o * 1e-6, y), torch.randn(16, 8), classes(16)
        ),
    }  # fmt: skip
    return cases[name]()


class Shifted(nn.Module):
    """A table of large numbers, not saved with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(1e5, 1e6, 8), persistent=False)
        self.o = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(x * self.table / 3e5)


NAMES = (
    "products of 1e-5", "products of 1e-3", "inputs of 1e5", "inputs of 1e-6", "mean over 131072",
    "sums over 147456", "targets of 1000", "loss of 1e8", "loss of 1e-6", "roots of 1e6", "buffer of 1e6",
    "scores of 1e-6",
)  # fmt: skip


def assert_follows(
    model: nn.Module, loss: Loss, x: torch.Tensor, y: torch.Tensor, bound: float = 0.02
) -> None:
    """The first step's loss is that of fp64 within 0.5 %, and each weight's update within `bound`."""
    exact, start = copy.deepcopy(model).double(), copy.deepcopy(model.state_dict())
    loss_value = loss(exact(x.double()), y.double() if y.is_floating_point() else y)
    loss_value.backward()
    want = float(loss_value.detach())
    rate = 0.1 / max(float(p.grad.abs().max()) for p in exact.parameters())
    step = at.compile_step(model, loss, torch.optim.SGD(model.parameters(), lr=rate), example=(x, y))
    got = float(step(x, y))
    assert step.skipped_steps == 0
    assert got == pytest.approx(want, rel=5e-3)
    for k, p in exact.named_parameters():
        moved = (start[k] - dict(model.named_parameters())[k].detach()).double() / rate
        assert float((moved - p.grad).norm()) < bound * float(p.grad.norm()), k


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_update_follow_fp64(name: str) -> None:
    assert_follows(*case(name))


@pytest.mark.parametrize("gamma", [1e-2, 1e-5])
def test_a_branch_under_layer_scale_moves(gamma: float) -> None:
    """Adam's first step of the branch's weights, whose gradients are gamma times the others'."""
    torch.manual_seed(0)
    model, x, y = Branch(gamma), torch.randn(32, 16), classes(32)
    exact, start = copy.deepcopy(model).double(), copy.deepcopy(model.state_dict())
    F.cross_entropy(exact(x.double()), y).backward()
    torch.optim.Adam(exact.parameters(), lr=1e-3).step()
    at.compile_step(model, "cross_entropy", torch.optim.Adam(model.parameters(), lr=1e-3), example=(x, y))(
        x, y
    )
    for k in ("branch.1.weight", "branch.3.weight"):
        want, got = (m.state_dict()[k].double() - start[k] for m in (exact, model))
        assert float((got - want).norm()) < 0.03 * float(want.norm()), k


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("buffer of 1e6", "inputs of 1e5")])
def test_the_rewrite_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result is that of the graph before, times its port's scale."""
    model, loss, x, y = case(name)
    found: list = []
    seen: list = []

    def calibrated(captured: object, examples: list) -> object:
        seen.extend(examples[:1])  # none of later states
        return apply.calibrated(captured, examples)

    def both(captured: object, sizes: object, buffers: object) -> object:
        before = copy.deepcopy(captured.graph)
        after = apply.scale_found(captured, sizes, buffers)
        found.append((captured, before, after, seen[0]))
        return after

    monkeypatch.setattr("ane_trainer.ane.capture.parts.calibrated", calibrated)
    monkeypatch.setattr("ane_trainer.ane.capture.parts.scale_found", both)
    capture_training(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (x, y))
    captured, before, after, values = found[0]
    values = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    old = Interpreter(before).run(*[values[p.name] for p in captured.inputs])
    fed = [
        values[p.name] * p.scale if p.role == "batch" and p.scale != 1 else values[p.name]
        for p in after.inputs
    ]
    new = Interpreter(after.graph).run(*fed)
    ports = (*captured.inputs, *captured.outputs), (*after.inputs, *after.outputs)
    rescaled = any(p.scale != q.scale for p, q in zip(*ports, strict=True))
    assert rescaled or len(after.graph.graph.nodes) > len(before.graph.nodes)
    for port, a, b in zip(after.outputs, old, new, strict=True):
        if "residual" not in port.target and port.target != "applied":
            scale = port.scale if port.role == "result" else 1.0
            b = b[: len(a)] if port.target == HEALTH else b  # guards of forward values come behind
            assert torch.allclose(a.double(), b.double() / scale, rtol=1e-5, atol=1e-12), port.name


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_networks_in_range_stay_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    seen: list[Exponents] = []

    def spy(*args: object) -> Exponents:
        seen.append(scale_values(*args))
        return seen[-1]

    scale_values = apply.scale_values
    monkeypatch.setattr(apply, "scale_values", spy)
    model = at.build_model(name, in_shape=(1, 28, 28), num_classes=10)
    batch = torch.rand(64, 1, 28, 28), torch.randint(0, 10, (64,))
    capture_training(model, "cross_entropy", torch.optim.Adam(model.parameters(), lr=1e-3), batch)
    assert seen[0].shifts == []


def test_a_mask_of_minus_infinity_is_no_magnitude() -> None:
    scores = torch.tensor([[1.0, -1e9], [-2.0, float("-inf")]])
    assert measure(scores).peak == 2.0
    assert measure(torch.tensor(torch.finfo(torch.float32).min)).peak == 0.0
    assert measure(torch.tensor([-2e4, 1.5e4])).peak == 2e4


def test_examples_are_joined() -> None:
    a, b = Magnitude(4.0, 1.0, 0.5), Magnitude(2.0, 0.25, 1.0)
    assert a.joined(b) == Magnitude(4.0, 0.25, 1.0)


def test_a_factor_that_the_power_of_a_sum_takes_up_stays_out_of_its_other_uses() -> None:
    """2^-8 of a norm's gradient and 2^8 of a sum over rows are one: the sum's own power must not stand beside it."""
    torch.manual_seed(0)
    model, x, y = nn.LayerNorm(256), 3.0 * torch.randn(512, 256), torch.randn(512, 256)
    step = at.compile_step(
        model, lambda o, y: torch.linalg.vector_norm(o - y), torch.optim.SGD(model.parameters(), 0.01), (x, y),
        fidelity="fast",
    )  # fmt: skip
    step(x, y)
    assert step.agreement is not None
    assert step.agreement.update < 0.01


#: Integers above 32,768 that floats are made of.
LARGE_INTEGERS = {
    "converted": lambda i: (3 * i + i.roll(1, 1)).float() / 5000,
    "multiplied": lambda i: i.cumsum(1) * 2e-4,
    "joined": lambda i: torch.cat((i * 7, torch.ones(8, 1)), 1) * 1e-4,
    "logarithm": lambda i: (i * 7 + 1).log(),
}


class OfIntegers(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.ones(1))

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return LARGE_INTEGERS[self.name](i) * self.weight


@pytest.mark.parametrize("name", LARGE_INTEGERS)
def test_large_integers_become_floats_in_both_front_doors(name: str) -> None:
    torch.manual_seed(0)
    model, i, target = OfIntegers(name), torch.randint(0, 30_000, (8, 8)), torch.zeros(1)
    want = model(i).detach()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        compiled = torch.compile(model, backend="ane", options={"device": "sim"})
        torch.testing.assert_close(compiled(i).detach(), want, rtol=2e-3, atol=1e-3)
        step = at.compile_step(
            model, lambda o, _: o.mean(), torch.optim.SGD(model.parameters(), 0.1), (i, target), device="sim"
        )
        assert float(step(i, target)) == pytest.approx(float(want.mean()), rel=2e-3)


def _joined(x: torch.Tensor, i: torch.Tensor, name: str) -> torch.Tensor:
    """Of small numbers, and of whole ones or a mask."""
    joined = {
        "add": lambda: x + i, "times": lambda: x * i * 1e-4, "over": lambda: x / i, "mask": lambda: x + (i > 300),
        "where": lambda: torch.where(i > 300, x, i), "compared": lambda: torch.where(x > i - 300, x, 2.0 * x),
    }  # fmt: skip
    return joined[name]()


@pytest.mark.parametrize("name", ["add", "times", "over", "mask", "where", "compared"])
def test_whole_numbers_beside_small_ones_have_their_power_of_two(name: str) -> None:
    """Operands of integers did not take the power of two that was given to them: the result was off by it."""
    torch.manual_seed(0)
    x, i = 1e-5 * torch.randn(64, 32), torch.randint(1, 600, (32,))
    graph = make_fx(lambda x, i: _joined(x, i, name))(x, i)
    (result,) = graph.graph.output_node().all_input_nodes
    first = next(iter(graph.graph.nodes))
    exponents = scale_values(graph.graph, magnitudes(graph, [[x, i]]))
    graph.recompile()
    assert exponents.of[first] < 0
    found = graph(x * 2.0 ** -exponents.of[first], i) * 2.0 ** exponents.of.get(result, 0)
    torch.testing.assert_close(found, _joined(x, i, name), rtol=1e-5, atol=0.0)


class Counted(nn.Module):
    """Small numbers by counts, and beside a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.randint(1, 600, (16,)))
        self.a, self.o = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.a(x) * 1e-5 / self.counts
        return self.o(share * 1e6 + (share * 1e-3 + (self.counts > 300)))


def test_small_numbers_by_counts_and_beside_masks_train_in_both_front_doors() -> None:
    torch.manual_seed(0)
    x, y, model = torch.randn(32, 16), torch.randint(0, 3, (32,)), Counted()
    plain, stepped = copy.deepcopy(model), copy.deepcopy(model)
    F.cross_entropy(plain(x), y).backward()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        F.cross_entropy(torch.compile(model, backend="ane")(x), y).backward()
        step = at.compile_step(
            stepped, nn.CrossEntropyLoss(), torch.optim.SGD(stepped.parameters(), 1.0), (x, y), device="sim"
        )
        step(x, y)
        step.sync()
    for name, p in plain.named_parameters():
        got, change = model.get_parameter(name), stepped.get_parameter(name).detach() - p.detach()
        assert p.grad is not None
        assert got.grad is not None
        assert float((got.grad - p.grad).norm() / p.grad.norm()) < 0.02, name
        assert float((change + p.grad).norm() / p.grad.norm()) < 0.02, name


def test_later_integers_that_leave_fp16_are_told() -> None:
    torch.manual_seed(0)
    model, target = OfIntegers("multiplied"), torch.zeros(1)
    small, large = torch.randint(0, 900, (8, 8)), torch.randint(20_000, 30_000, (8, 8))
    step = at.compile_step(
        model, lambda o, _: o.mean(), torch.optim.SGD(model.parameters(), 0.1), (small, target), device="sim"
    )
    step(small, target)
    with pytest.warns(at.NumericsWarning):
        step(large, target)
    assert step.skipped_steps == 1
