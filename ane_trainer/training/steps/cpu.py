"""The `cpu` device: the same training step by plain PyTorch in fp32, for comparison with the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ane_trainer.ane.capture.calibrate import call_model
from ane_trainer.ane.capture.gradients import Treatment
from ane_trainer.ane.errors import DataError


class CpuStep:
    """One training step as every PyTorch user writes it; has the attributes of a compiled step."""

    compiles = 0
    dispatches_per_step = 0
    engine_flop_fraction = 0.0
    host_bytes_per_step = 0
    loss_scale = 1.0
    skipped_steps = 0

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        treatment: Treatment | None = None,
    ) -> None:
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._treatment = treatment or Treatment()
        self._pending = 0

    def __call__(self, x: Any, y: Any) -> torch.Tensor:
        """Forward, loss, backward, update; returns the loss. DataError for nan and inf."""
        _check_finite("x", x)
        _check_finite("y", y)
        self._model.train()
        if self._pending == 0:
            self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.forward(x), y)
        self.backward(loss / self._treatment.accumulate)
        self._pending = (self._pending + 1) % self._treatment.accumulate
        if self._pending == 0:
            self._update()
        return loss.detach()

    def forward(self, x: Any) -> Any:
        """The model's output."""
        return call_model(self._model, {}, x)

    def backward(self, loss: torch.Tensor) -> None:
        """Add to the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self) -> None:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        if self._treatment.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self._treatment.clip_value)
        if self._treatment.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._treatment.clip_norm)
        self._optimizer.step()

    def sync(self) -> None:
        """Nothing to do: the module's parameters are the state."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters, buffers and the optimizer's state, as tensors by name."""
        tensors = {f"model/{name}": value for name, value in self._model.state_dict().items()}
        for number, state in self._optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if value is not None:
                    tensors[f"optimizer/{number}/{key}"] = torch.as_tensor(value)
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `state_dict` returned."""
        prefix = "model/"
        self._model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, number, key = name.split("/", 2)
                state.setdefault(int(number), {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


class CpuForward:
    """The model's inference by plain PyTorch in fp32, or by `forward`."""

    def __init__(self, model: nn.Module, forward: Callable[[Any], Any] | None = None) -> None:
        self._model = model
        self._forward = forward or (lambda x: call_model(model, {}, x))

    def __call__(self, x: Any) -> torch.Tensor:
        """The model's output in evaluation mode; the module's mode is put back. DataError for nan and inf."""
        _check_finite("x", x)
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                return self._forward(x)  # type: ignore[no-any-return]
        finally:
            self._model.train(training)


def _check_finite(name: str, part: Any) -> None:
    for leaf in pytree.tree_leaves(part):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            wrong = int((~torch.isfinite(leaf)).sum())
            if wrong:
                raise DataError(
                    f"{name}: needs finite numbers; got {wrong} that are nan or inf. Clean the data.",
                    code="DATA106",
                )
