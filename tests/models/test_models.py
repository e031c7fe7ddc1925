"""Well-known networks train unchanged: one whole step as PyTorch's in fp32, and twenty steps of falling loss.

Tolerance. The step is compared by its update d = (parameters after) - (parameters before), over all
parameters together: |d - d_torch| / |d_torch|. Arithmetic in fp16 with tables for exp, erf, tanh and sigmoid
keeps about three digits, so a well-conditioned network comes out within 0.02. Batch norm over the few values of
a tiny batch multiplies rounding: PyTorch itself, run in fp16, is off by 0.19 on this ResNet-18, 0.055 on the
U-Net, 0.026 on the DenseNet and 0.024 on the generator; those have bounds of twice that or more (`Case.bound`).
Dropouts and noise are drawn from the same seed on both sides.
"""

from __future__ import annotations

import copy

import pytest
import torch

import ane_trainer as at
from ane_trainer.ane.capture.calibrate import call_model
from ane_trainer.ane.capture.losses import get_loss
from ane_trainer.ane.capture.randomness import drawn_by
from ane_trainer.ane.errors import UnsupportedModel
from tests.models import further, zoo

CASES = zoo.CASES | further.CASES
STEPS = 20
SEED = 5
#: Least bound with exact fidelity: the accumulator rounds every product to 2^-16, which the WaveNet's small weight
#: gradients (256 positions, 16 channels) feel: 0.045 on M1.
EXACT_BOUND = 0.06
#: A buffer may be off by this share of its own largest entry, or of 1 where that is smaller.
BUFFER_BOUND = 0.02


def update_of_torch(
    name: str, model: torch.nn.Module, x: object, y: object
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, change of every parameter that the loss reaches) of one fp32 step; `model` is changed."""
    case = CASES[name]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=0.9)
    with drawn_by(torch.Generator().manual_seed(SEED)):
        loss = get_loss(case.loss)(call_model(model, {}, x), y)
    loss.backward()
    optimizer.step()
    changes = {n: p.detach() - before[n] for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), changes


def train(name: str, chip: str, fidelity: str) -> None:
    """The step against PyTorch's, then the fall of the loss."""
    case = CASES[name]
    torch.manual_seed(0)
    model, x, y = case.build()
    model.train()
    twin = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=0.9)
    step = at.compile_step(model, case.loss, optimizer, (x, y), chip=chip, fidelity=fidelity, seed=SEED)
    losses = [float(step(x, y))]
    expected, changes = update_of_torch(name, twin, x, y)
    assert losses[0] == pytest.approx(expected, rel=3e-3, abs=1e-3)
    now = {n: p.detach() for n, p in model.named_parameters()}
    error = sum(float((now[n] - before[n] - d).norm() ** 2) for n, d in changes.items()) ** 0.5
    size = sum(float(d.norm() ** 2) for d in changes.values()) ** 0.5
    bound = case.bound if fidelity == "fast" else max(case.bound, EXACT_BOUND)
    assert error <= bound * size, f"the update is off by {error / size:.4f}"
    for n in now.keys() - changes.keys():  # frozen: unchanged but for the rounding to fp16
        torch.testing.assert_close(now[n], before[n], rtol=2.0**-11, atol=2.0**-25)
    for (n, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        if mine.is_floating_point():
            largest = max(1.0, float(theirs.abs().max()))
            assert float((mine - theirs).abs().max()) <= BUFFER_BOUND * largest, n
    losses += [float(step(x, y)) for _ in range(STEPS - 1)]
    assert step.skipped_steps == 0
    assert sum(losses[-5:]) < 0.995 * sum(losses[:5]), losses


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.quick])
def test_a_handful_trains(name: str) -> None:
    train(name, "m5", "fast")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["m1", "m5"])
@pytest.mark.parametrize("name", CASES)
def test_every_model_trains(name: str, chip: str) -> None:
    if chip == "m1" and CASES[name].long:
        with pytest.raises(UnsupportedModel, match="16384 elements on M1"):
            train(name, chip, "fast")
    else:
        train(name, chip, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["m1", "m5"])
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.exact])
def test_small_models_train_exactly(name: str, chip: str) -> None:
    train(name, chip, "exact")
