"""`fallback="cpu"`: a training step in parts, the engine's and those that it refuses on the CPU.

Forward and backward go through `torch.compile(backend="ane")`, which cuts its graphs; the optimizer runs on
the host. The parts and their reasons are in `placement()` and so in every report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ane_trainer.ane import dynamo
from ane_trainer.ane.capture.calibrate import call_model
from ane_trainer.ane.capture.gradients import Treatment
from ane_trainer.ane.dynamo import ProgramRecord
from ane_trainer.training.steps.cpu import CpuStep


class Partitioned:
    """A module called through programs of which parts may run on the CPU; `records` are its programs."""

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self._options = {**options, "fallback": "cpu"}

        def call(x: Any) -> Any:
            return call_model(model, {}, x) if isinstance(x, (dict, tuple, list)) else model(x)

        self._call: Callable[..., Any] = torch.compile(call, backend="ane", options=self._options)
        self.records: list[ProgramRecord] = []

    def __call__(self, x: Any) -> Any:
        """The model's output."""
        before = len(dynamo.report().programs)
        output = self._call(x)
        self.note(before)
        return output

    def note(self, before: int) -> None:
        """Remember the programs that were compiled since the report had `before` of them."""
        self.records += dynamo.report().programs[before:]


class FallbackStep(CpuStep):
    """A training step in parts; has the attributes of a compiled step."""

    loss_scale = 1.0

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        treatment: Treatment,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(model, loss, optimizer, treatment)
        self._parts = Partitioned(model, options)

    def forward(self, x: Any) -> Any:
        """The model's output, by programs and CPU parts."""
        return self._parts(x)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients; the backward programs may be compiled here."""
        before = len(dynamo.report().programs)
        super().backward(loss)
        self._parts.note(before)

    @property
    def compiles(self) -> int:  # type: ignore[override]
        """Programs compiled so far."""
        return sum(record.programs for record in self._parts.records)

    @property
    def dispatches_per_step(self) -> int:  # type: ignore[override]
        """Programs that one step runs."""
        return self.compiles

    @property
    def engine_flop_fraction(self) -> float:  # type: ignore[override]
        """The least share of a graph's FLOPs in programs; the optimizer's are not counted."""
        return min((record.engine_flop_fraction for record in self._parts.records), default=0.0)

    def placement(self) -> dict[str, Any]:
        """Where the parts run."""
        cpu = [text for record in self._parts.records for text in record.cpu]
        name = type(self._optimizer).__name__
        return {
            "where": f"{self.compiles} programs for {self._parts._options['chip']} on "
            f"{self._parts._options['device']}; {len(cpu)} operations and the optimizer {name} on the CPU",
            "how": 'fallback="cpu" was asked for; the parts were cut here',
            "optimizer_on": "host",
            "cpu": cpu,
        }

    def cost(self) -> None:
        """Not known: the host's share is not modelled."""
