"""The first step against fp32: what it says of steps that agree, and of one whose norms overflow."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.capture import parts
from ane_trainer.ane.capture.range.departure import Rounded
from ane_trainer.ane.dispatch import training
from ane_trainer.ane.dispatch.agreement import Agreement, Reference, compare, explained
from tests.ane.dispatch.test_host_optimizer import Drawing

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def batch(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 8) * scale, torch.randint(0, 3, (16,))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Dropout(0.2), nn.Linear(32, 3))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_a_step_in_range_agrees(optimizer: type[torch.optim.Optimizer]) -> None:
    model, (x, y) = net(), batch()
    step = at.compile_step(model, "cross_entropy", optimizer(model.parameters(), lr=1e-2), (x, y))
    assert step.agreement is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, y)
    agreement = step.agreement
    assert agreement.agrees
    assert agreement.loss < 5e-3
    assert agreement.update < 0.02
    assert set(agreement.updates) == {name for name, _ in model.named_parameters()}
    assert str(agreement).startswith("agrees with fp32: loss ")
    assert json.loads(json.dumps(agreement.to_json()))["step"] == 1


def test_a_step_that_leaves_the_range_is_announced_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "scale_rows", lambda graph: 0)
    monkeypatch.setattr(parts, "scale_found", lambda captured, found, buffers: captured)
    model, (x, y) = net(), batch(3000.0)
    step = at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=1e-2), (x, y))
    with pytest.warns(
        at.NumericsWarning, match=r"departs from fp32.* First 1: mul reaches .* beyond what fp16"
    ):
        step(x, y)
    assert not step.agreement.agrees


def test_gradients_that_vanish_are_no_cost_of_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch under 1e-7 without its powers of two: what rounding to eleven bits costs excuses nothing of it."""
    monkeypatch.setattr(parts, "scale_found", lambda captured, found, buffers: captured)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Faint(), nn.Tanh(), nn.Linear(16, 3))
    x, y = batch()
    step = at.compile_step(
        model, "cross_entropy", torch.optim.Adam(model.parameters()), (x, y), fidelity="fast"
    )
    with pytest.warns(at.NumericsWarning, match=r"departs from fp32.* too small for fp16"):
        step(x, y)
    assert step.agreement.fp16 < 0.01


class Faint(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 1e-5) * 1e-3 * 1e8


@pytest.mark.parametrize(("limit", "agrees"), [(3e-4, True), (1e-6, False)])
def test_what_a_weight_cannot_resolve_is_told_from_what_is_wrong(limit: float, agrees: bool) -> None:
    """Clipping to 3e-4 moves weights by the last bits of two fp16 numbers (and fp32's own next ones)."""
    torch.manual_seed(3)
    model, x, y = (
        nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)),
        torch.randn(16, 4),
        torch.arange(16) % 3,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    step = at.compile_step(model, "cross_entropy", optimizer, (x, y), clip_grad_norm=limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if agrees else "ignore", at.NumericsWarning)
        step(x, y)
    assert step.agreement.agrees is agrees
    assert step.agreement.update > 0.005


@pytest.mark.parametrize(("verify", "compared"), [("first", [1]), ("off", []), (2, [1, 3])])
def test_verify_says_which_steps_are_compared(verify: str | int, compared: list[int]) -> None:
    model, (x, y) = net(), batch()
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=1e-2), (x, y), verify=verify
    )
    seen = []
    for _ in range(4):
        step(x, y)
        number = step.agreement.step if step.agreement else None
        seen += [number] if number is not None and number not in seen else []
    assert seen == compared
    assert step.agreement is None or step.agreement.agrees


def test_verify_must_be_a_rhythm() -> None:
    model, example = net(), batch()
    with pytest.raises(at.AneTrainerError, match="verify"):
        at.compile_step(
            model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=1e-2), example, verify=0
        )


def test_clipping_and_the_host_optimizer_are_compared() -> None:
    for options in ({"clip_grad_norm": 0.1}, {"clip_grad_value": 0.01}, {"optimizer_on": "host"}):
        model, (x, y) = net(), batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        step = at.compile_step(model, "cross_entropy", optimizer, (x, y), **options)
        step(x, y)
        assert step.agreement.agrees, options
        assert step.agreement.update > 0.0


def test_the_sign_of_small_gradients_is_not_held_against_adam_but_that_of_large_ones_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A ReLU near zero opens for one sample more: ten of 25,088 entries move the other way, 3.3 % of the norm."""
    kept = []
    make = training.reference
    monkeypatch.setattr(training, "reference", lambda *a: kept.append(make(*a)) or kept[-1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = torch.rand(128, 1, 28, 28), torch.arange(128) % 10
    step = at.compile_step(model, "cross_entropy", torch.optim.Adam(model.parameters(), lr=1e-3), (x, y))
    step(x, y)
    assert step.agreement.agrees
    (found,) = kept
    wrong = {name: change.clone() for name, change in found.changes.items()}
    assert compare(1, found.loss, wrong, found).update == 0.0
    wrong["1.weight"][0] *= -1.0  # one unit of 32
    assert not compare(1, found.loss, wrong, found).agrees


def test_an_optimizer_that_draws_is_compared_by_its_loss_and_draws_what_it_would() -> None:
    ends = []
    for verify in ("first", "off"):
        model, (x, y) = net(), batch()
        step = at.compile_step(model, "cross_entropy", Drawing(model.parameters()), (x, y), verify=verify)
        torch.manual_seed(4)
        step(x, y)
        ends.append([p.detach().clone() for p in model.parameters()])
        if verify == "first":
            assert step.agreement.agrees
            assert step.agreement.updates == {}
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_later_steps_are_compared_from_the_engines_state() -> None:
    """Weights and moments that were not copied back, and those of a loaded state."""
    model, (x, y) = net(), batch()
    options = {"verify": 2, "sync": "lazy"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = at.compile_step(model, "cross_entropy", optimizer, (x, y), **options)
    for _ in range(4):
        step(x, y)
    assert step.agreement.step == 3
    assert step.agreement.agrees
    other = net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    again = at.compile_step(other, "cross_entropy", optimizer, (x, y), state=step.state_dict(), **options)
    again(x, y)
    assert again.agreement.step == 5
    assert again.agreement.agrees
    assert again.agreement.update < 0.01


def test_the_mode_of_each_module_is_the_captured_one() -> None:
    """A model in evaluation mode is trained in training mode; a norm frozen in a training model stays frozen."""
    for frozen in (False, True):
        torch.manual_seed(0)
        model, (x, y) = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)), batch(30.0)
        model[1].eval() if frozen else model.eval()
        step = at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=1e-2), (x, y))
        step(x, y)
        assert step.agreement.agrees, frozen


def test_exponentials_beside_their_sum_are_told_of_softmax() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(8, 6), torch.randn(8, 8), torch.randn(8)

    def loss(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        e = torch.exp(12 * o)
        return ((e / (e.sum(-1, keepdim=True) + 1e-3))[:, 0] * y).sum()  # without 1e-3: a softmax

    step = at.compile_step(model, loss, torch.optim.SGD(model.parameters(), 0.01), (x, y), fidelity="fast")
    with pytest.warns(at.NumericsWarning, match="loses the small ones of exponentials; softmax"):
        step(x, y)


class Renamed(torch.nn.Module):
    """Its copy calls its layer otherwise, as that of a Keras model does after `compile`."""

    def __init__(self, name: str = "layer") -> None:
        super().__init__()
        self.add_module(name, torch.nn.Linear(4, 3))

    def __deepcopy__(self, memo: dict[int, object]) -> Renamed:
        copy = Renamed("copied")
        for old, new in zip(self.parameters(), copy.parameters(), strict=True):
            new.data.copy_(old)
            memo[id(old)] = new
        return copy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.children())(x)


def test_of_a_copy_with_other_names_the_loss_alone_is_compared() -> None:
    model = Renamed()
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), (x, y), threads=1
    )
    step(x, y)
    assert step.agreement is not None
    assert step.agreement.agrees


def test_a_mean_over_labels_that_are_all_left_out_is_told() -> None:
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = at.compile_step(model, "cross_entropy", optimizer, (x, torch.arange(8) % 3), device="sim")
    left_out = torch.full((8,), -100)
    step(x, torch.arange(8) % 3)
    with pytest.warns(
        at.NumericsWarning, match="step 2: .* is nan in plain PyTorch .*labels that are all left out"
    ):
        step(x, left_out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, left_out)


def test_a_model_in_bfloat16_is_compared_with_fp32() -> None:
    """PyTorch's own update of such weights is rounded to eight bits, the engine's is not."""
    model, (x, y) = net().bfloat16(), batch()
    model[2].p = 0.0
    step = at.compile_step(
        model, lambda out, target: nn.functional.cross_entropy(out.float(), target),
        torch.optim.SGD(model.parameters(), lr=0.1), (x.bfloat16(), y),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        step(x.bfloat16(), y)
    assert step.agreement.agrees


def test_a_step_without_an_update_claims_none() -> None:
    """Skipped or accumulated: `updates 0.0 %` before."""
    assert str(Agreement(1, 0.001, 0.0, {})) == "agrees with fp32: loss 1e-3, no update to compare"


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda out, _: -torch.log(torch.relu(out)).mean(), "the loss of this batch is not finite in plain PyTorch"),
        (lambda out, _: torch.where(out > 0, out.sqrt(), out).mean(), "the update of weight is not finite in plain"),
        (lambda out, _: (out[:, None] - out).square().sum(-1).sqrt().mean(), "the update of weight is not finite"),
    ],
)  # fmt: skip
def test_what_is_infinite_in_pytorch_is_told(loss: Loss, told: str) -> None:
    """The engine has no infinities, and computes finite numbers that look right."""
    model, (x, y) = nn.Linear(8, 3), batch()
    step = at.compile_step(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), device="sim")
    with pytest.warns(at.NumericsWarning, match=told):
        step(x, y)
    assert step.agreement is None


@pytest.mark.parametrize(("error", "made"), [(0.001, 4), (0.008, 2), (0.02, 1)])
def test_as_many_runs_are_rounded_at_random_as_explain_a_difference(error: float, made: int) -> None:
    """An update 5 % off that rounding explains at 1.7 %, in runs whose errors grow by `error`."""
    changes, wanted = {"w": torch.tensor([1.05])}, {"w": torch.tensor([1.0])}
    expected = Reference(1.0, wanted, lambda noise, lost: {"w": torch.ones(1)})
    found = compare(1, 1.0, changes, expected)
    taken: list[float] = []

    def at_random() -> Iterator[float]:
        for number in range(1, 5):
            taken.append(error * number)
            yield error * number + 0.001

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = explained(found, changes, expected, 1.0, lambda: Rounded(0.0, None), at_random())
    assert (len(taken), result.agrees) == (made, error > 0.001)
    assert result.fp16 == pytest.approx(error * made + 0.001)


def test_what_tables_cost_is_tried_before_the_step_runs_again() -> None:
    changes, wanted = {"w": torch.tensor([1.03])}, {"w": torch.tensor([1.0])}
    weights = {0.01: torch.zeros(1)}  # the entry is undetermined where gradients may be 1 % off
    expected = Reference(1.0, wanted, lambda noise, lost: {"w": weights.get(noise, torch.ones(1))})
    found = compare(1, 1.0, changes, expected)
    assert not found.agrees

    def again() -> Rounded:
        pytest.fail("the step ran again")

    assert explained(found, changes, expected, 1.0, again, ()).agrees


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0, 30.0, 300.0, 3000.0), (1.0,) * 6])
def test_gradients_too_far_apart_for_fp16_are_told(sizes: tuple[float, ...]) -> None:
    """The columns of a table as they are: of the small ones Adam's squares leave fp16, and the weights stay behind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
    twin = copy.deepcopy(model)
    x, y = torch.randn(64, 6) * torch.tensor(sizes), torch.randn(64, 1)
    step = at.compile_step(model, "mse", torch.optim.Adam(model.parameters()), (x, y), fidelity="fast")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step(x, y)
    step.sync()
    start = twin[0].weight.detach().clone()
    nn.functional.mse_loss(twin(x), y).backward()
    torch.optim.Adam(twin.parameters()).step()
    off = (model[0].weight - twin[0].weight).norm() / (twin[0].weight - start).norm()
    assert (off > 0.2) == (max(sizes) > 1.0)
    assert [bool(re.search(r"update is missing, most in 0\.weight", str(w.message))) for w in told] == [
        True
    ] * (max(sizes) > 1.0)
