"""Runs a captured step's FX graph on torch tensors, as an engine with exact arithmetic would."""

from __future__ import annotations

from typing import Any

import torch

from ane_trainer.ane.capture import StepCapture
from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.dispatch.units import GradientUnits
from ane_trainer.ane.stages import Captured


class FxStep:
    """State by port target, in port units; `step(x, y)` advances it and returns (loss, applied)."""

    def __init__(
        self,
        capture: StepCapture,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scale: float | None = None,
    ) -> None:
        self.captured: Captured = capture.captured
        self.optimizer, self.count = optimizer, 0
        self.units = GradientUnits.of(capture, optimizer)
        scale = capture.loss_scale if scale is None else scale
        start = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
        start["step/loss_scale"] = torch.full((1,), scale)
        start["step/loss_scale_inverse"] = torch.full((1,), 1 / scale)
        self.state = {
            p.target: start[p.target].reshape(p.shape) if p.target in start else torch.zeros(p.shape)
            for p in self.captured.inputs
            if p.role == "state"
        }

    def step(self, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        scalars = self.units.scalars(self.count + 1, GradientOptions(), last=True)
        inputs: list[Any] = []
        for port in self.captured.inputs:
            if port.role == "state":
                inputs.append(self.state[port.target])
            elif port.role == "scalar":
                inputs.append(torch.tensor(scalars[port.target], dtype=torch.float32))
            else:
                inputs.append(batch[port.name])
        results = dict(zip(self.captured.outputs, self.captured.graph(*inputs), strict=True))
        by_name = {port.name: value for port, value in results.items()}
        for port, value in results.items():
            assert tuple(value.shape) == port.shape, port
            if port.role == "state":
                self.state[port.target] = value.detach()
        applied = float(by_name["applied"])
        self.count += int(applied)
        return float(by_name["loss"]), applied

    def value(self, target: str) -> torch.Tensor:
        """A state in the user's units, both terms added in float64."""
        total = torch.zeros((), dtype=torch.float64)
        for port in self.captured.inputs:
            if port.role == "state" and port.target in (target, f"{target}/residual"):
                total = total + self.state[port.target].double() / port.scale
        return total


def torch_step(
    model: torch.nn.Module, loss: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    """One ordinary PyTorch step."""
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    optimizer.step()
    return float(value.detach())
