"""Gradients of any size under every optimizer: units chosen from the example, moved while training, counted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer import compile_step
from ane_trainer.ane.capture.optimizers.table import plain
from ane_trainer.ane.capture.unit_bounds import unit_bounds
from ane_trainer.ane.dispatch import TrainingStep
from tests.ane.dispatch.test_gradients import batches, distance, mlp
from tests.ane.dispatch.test_optimizers import Lamb, Lion

Make = Callable[[Any], torch.optim.Optimizer]
optim = torch.optim

#: Each with a gradient that it is right for: the steps of SGD, and RAdam's first, are as long as the gradient.
OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "sgd": lambda p, size: optim.SGD(p, lr=0.1 / size, momentum=0.9),
    "adam": lambda p, size: optim.Adam(p),
    "adamw": lambda p, size: optim.AdamW(p),
    "amsgrad": lambda p, size: optim.Adam(p, amsgrad=True),
    "adamax": lambda p, size: optim.Adamax(p),
    "nadam": lambda p, size: optim.NAdam(p),
    "radam": lambda p, size: optim.RAdam(p, lr=1e-3 / size),
    "rmsprop": lambda p, size: optim.RMSprop(p, lr=1e-3),
    "rmsprop-all": lambda p, size: optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "adagrad": lambda p, size: optim.Adagrad(p),
    "adadelta": lambda p, size: optim.Adadelta(p),
    "adafactor": lambda p, size: optim.Adafactor(p, eps=(2.0**-23, 1e-3)),
    "lion": lambda p, size: Lion(p),
    "lamb": lambda p, size: Lamb(p),
}


class Known(nn.Module):
    """Gradients that are the batch: entries from the largest to 1e-4 of it, in both signs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(0.3 * torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w

    @staticmethod
    def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        signs = (torch.randint(0, 2, (count, 6, 8), generator=generator) * 2 - 1) * torch.logspace(0, -4, 8)
        return [(x, torch.zeros(6, 8)) for x in signs]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_fp32s_for_gradients_of_any_size(name: str, size: float) -> None:
    """Exact arithmetic; each column of entries, 1 to 1e-4 of the largest, within 2 % of fp64's way, or
    within 1e-7: what fp32 weights of this size round off.
    """
    if (name, size) in {("sgd", 1e-6), ("radam", 1e-6)}:
        size = 1e-5  # the least of which the rates are numbers of fp16
    root, model = size**0.5, Known()
    twin, start, data = copy.deepcopy(model).double(), copy.deepcopy(model), Known.batches(3)
    step = compile_step(
        model,
        lambda output, zero: ((output * root) * (1 + zero)).sum() * root,
        OPTIMIZERS[name](model.parameters(), size),
        data[0],
        sync="lazy",
    )
    reference = OPTIMIZERS[name](twin.parameters(), size)
    for x, y in data:
        step(x, y)
        reference.zero_grad()
        (twin(x.double()) * size).sum().backward()
        reference.step()
    step.sync()
    assert (step.optimizer_on, step.skipped_steps, step.compiles) == ("engine", 0, 1)
    moved = twin.w.detach() - start.w.detach().double()
    error = (model.w.detach().double() - twin.w.detach()).norm(dim=0) / moved.norm(dim=0).clamp(min=5e-6)
    assert float(error.max()) < 0.02, error


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e4])
def test_health_is_the_size_of_true_gradients(size: float) -> None:
    """Also where the range pass carries a power of two beside them: fp32's peaks are the witness."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 5))
    x, y, root = torch.randn(32, 32), torch.randint(0, 5, (32,)), size**0.5

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target) * root * root

    loss(model(x), y).backward()
    peaks = [float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None]
    step = compile_step(model, loss, optim.Adam(model.parameters()), (x, y))
    health = step._loaded.session.run(step.feeds(x, y))["health"]
    found = [float(own) / unit for own, unit in zip(health, step._units.values, strict=False)]
    assert found == pytest.approx(peaks, rel=0.03)
    assert float(health[len(step._units.values)]) == 1.0


def sized(make: Make, sizes: Sequence[float], **options: Any) -> tuple[float, TrainingStep]:
    """(distance to fp32; step): batch i's loss is times sizes[i]."""
    model, labels = mlp(), torch.arange(16) % 5
    twin, start = copy.deepcopy(model), copy.deepcopy(model)

    def loss(output: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(output, labels, reduction="none") * size).mean()

    data = [(x, torch.full((16,), size)) for (x, _), size in zip(batches(len(sizes)), sizes, strict=True)]
    step = compile_step(
        model, loss, make(model.parameters()), data[0], fidelity="fast", sync="lazy", **options
    )
    reference, count = make(twin.parameters()), options.get("accumulate", 1)
    for number, (x, y) in enumerate(data):
        step(x, y)
        if number % count == 0:
            reference.zero_grad()
        (loss(twin(x), y) / count).backward()
        if number % count == count - 1:
            if "clip_grad_norm" in options:
                nn.utils.clip_grad_norm_(twin.parameters(), options["clip_grad_norm"])
            reference.step()
    step.sync()
    return distance(model, twin, start), step


GROWING = [1.0] * 5 + [100.0] * 5 + [1e4] * 6
FALLING = [100.0] * 5 + [1.0] * 40 + [0.01] * 40


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
@pytest.mark.parametrize("sizes", [GROWING, FALLING], ids=["growing", "falling"])
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adafactor"])
def test_units_move_while_training(name: str, sizes: list[float]) -> None:
    error, step = sized(lambda p: OPTIMIZERS[name](p, 1e4), sizes)
    assert step.compiles == 1
    assert error < 0.005
    assert step.skipped_steps == 0
    assert bool(step.health) is (sizes is GROWING)


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
@pytest.mark.parametrize("limit", [1e-4, 1.0, 100.0])
def test_clipping_to_any_norm(limit: float) -> None:
    for make, sizes in (
        (lambda p: optim.Adam(p), GROWING),
        (lambda p: optim.SGD(p, lr=0.01 / limit), FALLING),
    ):
        error, step = sized(make, sizes, clip_grad_norm=limit)
        assert step.compiles == 1
        assert error < 0.02


@pytest.mark.parametrize("sizes", [[1.0] * 3, [1e-3, 1e-3, 1.0, 1.0]], ids=["steady", "growing"])
def test_weight_decay_beside_clipped_gradients(sizes: list[float]) -> None:
    """Decay is added behind the clipping: its unit is not that of gradients a million times smaller."""
    error, step = sized(lambda p: optim.Adam(p, weight_decay=0.01), sizes, clip_grad_norm=1e-6 * sizes[0])
    assert error < 0.005
    assert step.skipped_steps == 0


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
def test_accumulated_gradients_move_with_their_units() -> None:
    assert sized(lambda p: optim.Adam(p), FALLING, accumulate=5)[0] < 0.02
    error, step = sized(lambda p: optim.Adam(p), [1.0] * 5 + [30.0] * 15, accumulate=5, clip_grad_norm=0.1)
    assert error < 0.01
    assert (step.applied_steps, step.skipped_steps) == (4, 0)


def test_a_batch_whose_gradients_leave_their_units_runs_again() -> None:
    """Suddenly 60 times larger and smaller, also where moments are cleared: no update is lost, nothing is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        error, step = sized(lambda p: optim.Adam(p), [1.0, 60.0, 1.0, 1.0], loss_scale=1.0)
        _, quiet = sized(lambda p: optim.Adam(p), [1.0, 1.5, 2.0, 1.0])
    assert error < 0.005
    assert step.skipped_steps == 0
    assert step.health
    assert set(step.health) <= {"0", "2"}
    assert (quiet.skipped_steps, quiet.health) == (0, {})


def test_the_first_gradient_that_no_unit_holds_is_named_once() -> None:
    with pytest.warns(
        at.NumericsWarning, match=r"^\d\.\w+: needs a gradient below .*update was skipped"
    ) as caught:
        _, step = sized(lambda p: optim.SGD(p, lr=1e3), [1.0, 3000.0, 3000.0, 1.0], loss_scale=1.0)
    assert len([w for w in caught if w.category is at.NumericsWarning]) == 1
    assert step.skipped_steps >= 1


@pytest.mark.parametrize("make", [lambda p: optim.Adam(p, lr=1e-3), lambda p: optim.Adagrad(p, lr=1e-3)])
def test_a_first_gradient_far_below_the_largest_gets_its_unit_at_once(make: Make) -> None:
    """A branch under 1e-6: its gradients are 1e-6 of the head's."""
    torch.manual_seed(0)
    model = Branch(1e-6)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    x, y = torch.randn(32, 16), torch.randint(0, 4, (32,))
    step = compile_step(model, "cross_entropy", make(model.parameters()), (x, y), fidelity="fast")
    reference = make(twin.parameters())
    for _ in range(3):
        step(x, y)
        reference.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        reference.step()
    assert step.skipped_steps == 0
    ways = [(m.branch[1].weight - start.branch[1].weight).detach() for m in (model, twin)]
    assert float((ways[0] - ways[1]).norm() / ways[1].norm()) < 0.02


class Branch(nn.Module):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.gamma, self.head = nn.Parameter(torch.full((16,), gamma)), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.gamma * self.branch(x))


def test_moved_units_are_part_of_the_state() -> None:
    """Bit for bit after units moved down and up, in the middle of a move's wait."""
    model, labels = mlp(), torch.arange(16) % 5
    sizes = [1.0] * 4 + [1 / 64] * 40
    data = [(x, torch.full((16,), size)) for (x, _), size in zip(batches(44), sizes, strict=True)]

    def loss(output: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(output, labels, reduction="none") * size).mean()

    def compiled(own: nn.Module, **options: Any) -> TrainingStep:
        optimizer = optim.Adam(own.parameters())
        return compile_step(own, loss, optimizer, data[0], fidelity="fast", sync="lazy", **options)

    step = compiled(model)
    for x, y in data[:27]:
        step(x, y)
    kept, first = step.state_dict(), step.port_state()
    for x, y in data[27:]:
        step(x, y)
    assert step.state_dict()["unit/0.weight"] > kept["unit/0.weight"]
    other = mlp()
    again = compiled(other, state=kept)
    assert again.compiles == 1
    assert all((first[name] == value).all() for name, value in again.port_state().items())
    for x, y in data[27:]:
        again(x, y)
    last = again.port_state()
    assert all((value == last[name]).all() for name, value in step.port_state().items())


def test_a_batch_that_does_not_fit_leaves_buffers_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    step = compile_step(model, lambda o, t: F.mse_loss(o, t), optim.SGD(model.parameters(), lr=0.1), (x, y))
    step(x, y)
    before = {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}
    with pytest.warns(at.NumericsWarning, match="does not fit into fp16 at any loss"):
        step(x, y * 30000)
    assert step.skipped_steps == 1
    for name, value in before.items():
        assert torch.equal(value, dict(model.named_buffers())[name]), name
    step(x, y)
    assert step.applied_steps == 2


@pytest.mark.parametrize("size", [1.0, 3e4])
def test_running_statistics_of_any_size(size: float) -> None:
    """The variance of inputs of 3e4 is 1e9: the buffer carries a power of two, also into a checkpoint and back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    data = [(torch.randn(32, 6) * size, torch.randint(0, 3, (32,))) for _ in range(4)]

    def compiled(own: nn.Module, **options: Any) -> TrainingStep:
        return compile_step(
            own, "cross_entropy", optim.Adam(own.parameters()), data[0], fidelity="fast", **options
        )

    step, reference = compiled(model), optim.Adam(twin.parameters())
    for x, y in data:
        step(x, y)
        reference.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        reference.step()
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=0.01, atol=0.01)
    again = compiled(start, state=step.state_dict())
    assert all((again.port_state()[n] == v).all() for n, v in step.port_state().items())


def test_a_step_goes_on_with_the_ranges_of_its_state() -> None:
    """Compiled on another batch, with values ten thousand times smaller: the same program, and the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    data = [(torch.randn(16, 6), torch.randn(16, 2) * 1000) for _ in range(4)]
    other = [(x * 1e-4, y * 1e-4) for x, y in data]

    def compiled(own: nn.Module, example: object, **options: Any) -> TrainingStep:
        return compile_step(own, "mse", optim.Adam(own.parameters()), example, fidelity="fast", **options)

    step, twin = compiled(model, data[0]), copy.deepcopy(model)
    step(*data[0])
    kept = step.state_dict()
    again, late = compiled(twin, other[0], state=kept), compiled(copy.deepcopy(model), other[0])
    assert again.compiled.fingerprint == step.compiled.fingerprint != late.compiled.fingerprint
    late.load_state_dict(kept)
    assert late.compiled.fingerprint == step.compiled.fingerprint
    for x, y in data[1:]:
        assert float(step(x, y)) == float(again(x, y)) == float(late(x, y))
    assert all((v == again.port_state()[n]).all() for n, v in step.port_state().items())


def test_units_leave_room_for_the_shift_after_clipping() -> None:
    """Adadelta's epsilon times the square of unit and shift must stay in fp16 when a unit moves up."""
    torch.manual_seed(0)
    model, x, y = Branch(1e-6), torch.randn(32, 16), torch.randint(0, 4, (32,))
    optimizer = optim.Adadelta(model.parameters())
    step = compile_step(model, "cross_entropy", optimizer, (x, y), fidelity="fast", clip_grad_norm=1e-3)
    for _ in range(4):
        step(x, y)
    assert step.applied_steps == 4
    high = unit_bounds(step._units.rule, plain(optimizer.param_groups[0]))[1]
    assert max(step._units.after_clipping().values()) <= high


def test_a_state_that_was_cleared_begins_again() -> None:
    """Adam's correction for its bias counts from the clearing, as in PyTorch."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(16, 6), torch.randint(0, 3, (16,))
    twin = copy.deepcopy(model)
    own, other = (optim.Adam(m.parameters(), lr=1e-2) for m in (model, twin))
    step = compile_step(model, "cross_entropy", own, (x, y), fidelity="fast")
    for number in range(5):
        if number == 3:
            step.sync()
            own.state.clear()
            other.state.clear()
        step(x, y)
        other.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        other.step()
    assert step.applied_steps == 2
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("size", "factor", "warned"), [(3e6, 4.0, False), (1e7, 64.0, True)])
def test_state_that_is_set_beyond_the_smallest_unit(size: float, factor: float, warned: bool) -> None:
    """The unit of gradients of 1e6 cannot move down: state times 4 fits as it is, times 64 it is announced."""
    model, labels = mlp(), torch.arange(16) % 5
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    (x, _), (later, _) = batches(2)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target) * size

    made = [(m, optim.Adam(m.parameters())) for m in (model, twin)]
    step = compile_step(*made[0][:1], loss, made[0][1], (x, labels), fidelity="fast")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in (x, later):
            step(data, labels)
            made[1][1].zero_grad()
            loss(twin(data), labels).backward()
            made[1][1].step()
            step.sync()
            for _, optimizer in made if data is x else ():
                for state in optimizer.state.values():
                    state["exp_avg"].mul_(factor)
                    state["exp_avg_sq"].mul_(factor)
        step.sync()
    told = [str(w.message) for w in caught if issubclass(w.category, at.NumericsWarning)]
    assert any("state that was set" in text for text in told) is warned
    assert warned or distance(model, twin, start) < 0.005


def test_gradients_that_no_loss_scale_brings_into_fp16_are_told() -> None:
    """Those of an exponent, of numbers in thousands: the update is left out, with words."""
    torch.manual_seed(0)
    power = nn.ParameterList([torch.tensor(2.0), torch.tensor(0.7)])

    class Law(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = power

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts[0] * x ** self.parts[1]

    model, x = Law(), torch.rand(64, 1) * 3000 + 1
    step = compile_step(
        model, F.mse_loss, optim.SGD(model.parameters(), lr=1e-7), (x, 3 * x**0.75), device="sim"
    )
    step(x, 3 * x**0.75)
    with pytest.warns(at.NumericsWarning, match="does not fit into fp16 at any loss"):
        step(x, 3 * x**0.75)
    assert step.skipped_steps == 1
