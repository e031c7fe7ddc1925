"""Ways to train behind one protocol: the engine's program, plain PyTorch, and a step in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ane_trainer.ane.chips.cost import Cost
from ane_trainer.ane.stages import Compiled


class Step(Protocol):
    """One training step on a batch, whatever runs it. `step(x, y)` returns the loss before the update."""

    @property
    def compiled(self) -> Compiled | None:
        """The step's program with its ports; None where there is not one program."""

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""

    @property
    def dispatches_per_step(self) -> int:
        """Programs that one step runs."""

    @property
    def engine_flop_fraction(self) -> float:
        """Share of the step's floating-point operations in programs."""

    @property
    def host_bytes_per_step(self) -> int:
        """Bytes that cross between host and engine in one step."""

    @property
    def loss_scale(self) -> float:
        """The present loss scale."""

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients overflowed: they changed nothing but the loss scale."""

    @property
    def health(self) -> dict[str, int]:
        """By module, the batches in which a gradient left its range."""

    def __call__(self, x: object, y: object) -> torch.Tensor:
        """Train on a batch; the loss, a float32 tensor of rank 0. DataError for values that cannot be used."""

    def follow(self) -> bool:
        """Take over what was changed from outside since the last step; whether that were weights."""

    def sync(self) -> None:
        """Bring the module's parameters and the optimizer's state up to date."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole state by name; `dispatch.state` describes it."""

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state_dict`, bit for bit. CheckpointError for a state that is not whole."""

    def placement(self) -> dict[str, Any]:
        """Where the step runs (`where`) and how that is known (`how`)."""

    def cost(self) -> Cost | None:
        """Estimated time and energy of one step on the chip; None where that is not known."""

    def close(self) -> None:
        """Release what the step holds."""


def put_into_training(model: torch.nn.Module) -> None:
    """Train mode for a model in eval mode; parts that are in eval mode within one that trains stay so."""
    if not model.training:
        model.train()
