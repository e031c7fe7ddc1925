"""The loss scale keeps the gradients between the operations in fp16, at the start and while it grows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ane_trainer import compile_step
from ane_trainer.ane.capture import intermediates
from ane_trainer.ane.capture.calibrate import INTERMEDIATE_GRADIENT_BOUND, LARGEST_CONCESSION, Calibration
from ane_trainer.ane.capture.intermediates import gradients_and_largest_intermediate
from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.scaling import GROWTH_INTERVAL, LARGEST_SCALE, next_scale
from tests.ane.compiler.lower.harness import check, gradients, normal


def test_the_flow_is_what_the_loss_scale_multiplies() -> None:
    x = torch.tensor([3.0, 1.0], requires_grad=True)
    value = (x / 64).sum() * 512 + (1e6 * x.detach()).sum() * 0  # the constants are no part of it
    found, largest = gradients_and_largest_intermediate(value, [x], decomposition_table())
    assert found[0] is not None
    assert found[0].tolist() == [8.0, 8.0]
    assert largest == 512.0


class Mixed(nn.Module):
    """Convolution, norm, attention and pooling: most of what a backward pass is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.inner, self.last = nn.Linear(8, 24), nn.LayerNorm(8)
        self.clamped = False

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        if self.clamped:
            h.register_hook(lambda g: g.clamp(-1e-3, 1e-3) * 64)  # type: ignore[no-untyped-call]
        query, key, value = self.inner(h.flatten(2).mT).chunk(3, -1)
        out = self.last(F.gelu(torch.softmax(query @ key.mT / 3, -1) @ value))[:, 1:]
        return torch.cat([out, 2 * out], 1).square().mean()


@pytest.mark.parametrize("clamped", [False, True])
def test_one_pass_finds_what_two_find(clamped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 3, 16, 16)
    model.clamped = clamped
    passes: list[None] = []
    plain = torch.autograd.grad

    def counted(*args: object, **options: object) -> object:
        passes.append(None)
        return plain(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", counted)

    def found() -> float:
        return gradients_and_largest_intermediate(model(x), [*model.parameters()], decomposition_table())[1]

    one = found()
    assert len(passes) == 1 + clamped
    monkeypatch.setattr(intermediates, "_LINEAR", frozenset())
    assert one == found() > 0.0


def test_the_scale_leaves_room() -> None:
    assert Calibration((), {"w": 1.0}).loss_scale() == 2048.0
    assert Calibration((), {"w": 1.0}, 64.0).loss_scale() == INTERMEDIATE_GRADIENT_BOUND / 64 == 256.0
    assert Calibration((), {"w": 1.0}, 1e6).loss_scale() == 2048.0 / LARGEST_CONCESSION
    assert Calibration((), {"w": 1.0}).ceiling() == LARGEST_SCALE


def test_the_scale_grows_to_its_ceiling_only() -> None:
    one = torch.ones(1)
    good = one * (GROWTH_INTERVAL - 1)
    for ceiling, expected in ((64.0, 64.0), (128.0, 128.0), (256.0, 128.0)):
        scale, inverse, _ = next_scale(one * 64, one / 64, good, one, ceiling)
        assert float(scale) == expected
        assert float(inverse) == 1.0 / expected


class Distilled(nn.Module):
    """A student at temperature 8: the gradient passes 64 times its size."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.student(x)
        return scores


def hinton(output: Tensor, target: Tensor) -> Tensor:
    soft = F.kl_div(F.log_softmax(output / 8, 1), F.softmax(target / 8, 1), reduction="batchmean")
    return soft * 64.0 * 4.0


def test_a_step_whose_gradients_pass_the_range_of_fp16_is_right() -> None:
    torch.manual_seed(0)
    model, x, y = Distilled(), torch.randn(16, 8), 3 * torch.randn(16, 5)
    twin, before = copy.deepcopy(model), model.student.weight.detach().clone()
    step = compile_step(model, hinton, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), fidelity="fast")
    loss = hinton(twin(x), y)
    (gradient,) = torch.autograd.grad(loss, [twin.student.weight])
    assert float(step(x, y)) == pytest.approx(float(loss.detach()), rel=5e-3)
    change = model.student.weight.detach() - before
    torch.testing.assert_close(change, -0.1 * gradient, rtol=0.02, atol=2e-3)


def test_the_gradient_of_softplus_stays_in_range() -> None:
    """exp(15) is beyond fp16; the gradient there is 1."""
    program = check(gradients(lambda x: F.softplus(x * 5, beta=0.5)), [normal(6)])
    assert "exp" not in {op.kind for op in program.program.main.ops}
