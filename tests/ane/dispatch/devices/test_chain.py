"""Steps in programs of blocks on devices whose programs share no memory: the bits of the simulator's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.compiler.coreai import missing
from ane_trainer.ane.dispatch import TrainingStep
from tests.ane.dispatch.devices.test_e5rt import DEVICES, same
from tests.standin.library import Engine, needs_compiler


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


def trained(device: str, blocks: str | int) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses and state after three steps with clipping, and how many programs were compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(Layer(), Layer(), Layer()), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [(torch.randn(4, 6), torch.randint(0, 4, (4,))) for _ in range(3)]
    step = at.compile_step(
        model, "cross_entropy", optimizer, batches[0], device=device, blocks=blocks, clip_grad_norm=0.5, seed=0
    )  # fmt: skip
    assert isinstance(step, TrainingStep)
    losses = [float(step(x, y)) for x, y in batches]
    state, programs = step.state_dict(), len(step.programs)
    step.close()
    return losses, state, programs


@needs_compiler
def test_direct_dispatch_equals_the_simulator(engine: Engine) -> None:
    losses, state, count = trained("sim", 1)
    for device in DEVICES:
        own_losses, own_state, own_count = trained(device, 1)
        assert own_losses == losses, device
        assert same(state, own_state), device
        assert own_count == count
    assert len(engine.compiled) == count * len(DEVICES)


@pytest.mark.skipif(missing() is not None, reason="needs Core AI's runtime")
def test_core_ai_equals_its_whole_program() -> None:
    runs = [trained("coreai", blocks) for blocks in ("off", 1)]
    for (losses, state, _), (own_losses, own_state, _) in pairwise(runs):
        assert losses == own_losses
        assert same(state, own_state)
