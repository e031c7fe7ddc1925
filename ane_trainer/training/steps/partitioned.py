"""`fallback="cpu"`: a training step in parts, the engine's and those that it refuses on the CPU.

Forward and backward go through `torch.compile(backend="ane")`, which cuts its graphs; the optimizer runs on
the host. The parts and their reasons are in `placement()` and so in every report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ane_trainer.ane import dynamo
from ane_trainer.ane.capture.calibrate import call_model
from ane_trainer.ane.dispatch import StepOptions, Target
from ane_trainer.ane.dynamo import ProgramRecord
from ane_trainer.training.steps.cpu import CpuStep, Loss


class Partitioned:
    """A module called through programs of which parts may run on the CPU; `records` are its programs."""

    def __init__(self, model: nn.Module, target: Target) -> None:
        options: dict[str, Any] = {
            "chip": target.chip, "device": target.device, "fidelity": target.fidelity,
            "precision": target.precision, "threads": target.threads, "path": target.path, "fallback": "cpu",
        }  # fmt: skip

        def call(x: object) -> Any:
            return call_model(model, {}, x) if isinstance(x, (dict, tuple, list)) else model(x)

        self._call: Callable[..., object] = torch.compile(call, backend="ane", options=options)
        self.records: list[ProgramRecord] = []

    def __call__(self, x: object) -> Any:
        """The model's output."""
        before = len(dynamo.report().programs)
        output = self._call(x)
        self.note(before)
        return output

    def note(self, before: int) -> None:
        """Remember the programs that were compiled since the report had `before` of them."""
        self.records += dynamo.report().programs[before:]


class PartitionedStep(CpuStep):
    """A training step in parts: forward and backward by programs and CPU parts, the optimizer on the host."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        options: StepOptions,
        target: Target,
    ) -> None:
        super().__init__(model, loss, optimizer, options)
        self._parts = Partitioned(model, target)
        self._target = target

    def forward(self, x: object) -> Any:
        """The model's output, by programs and CPU parts."""
        return self._parts(x)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients; the backward programs may be compiled here."""
        before = len(dynamo.report().programs)
        super().backward(loss)
        self._parts.note(before)

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        return sum(record.programs for record in self._parts.records)

    @property
    def dispatches_per_step(self) -> int:
        """Programs that one step runs."""
        return self.compiles

    @property
    def engine_flop_fraction(self) -> float:
        """The least share of a graph's FLOPs in programs; the optimizer's are not counted."""
        return min((record.engine_flop_fraction for record in self._parts.records), default=0.0)

    def placement(self) -> dict[str, object]:
        """Where the parts run."""
        cpu = [text for record in self._parts.records for text in record.cpu]
        name = type(self._optimizer).__name__
        return {
            "where": f"{self.compiles} programs for {self._target.chip} on "
            f"{self._target.device}; {len(cpu)} operations and the optimizer {name} on the CPU",
            "how": 'fallback="cpu" was asked for; the parts were cut here',
            "optimizer_on": "host",
            "cpu": cpu,
        }
