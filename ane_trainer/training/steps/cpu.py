"""The `cpu` device: the same training step by plain PyTorch in fp32, for comparison with the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ane_trainer.ane.capture.calibrate import call_model, module_mode
from ane_trainer.ane.capture.losses import check_classes
from ane_trainer.ane.capture.trace.sources import FAULTS, fault, place_of
from ane_trainer.ane.capture.trace.torch_private import optimizers_without_dynamo, step_without_dynamo
from ane_trainer.ane.dispatch import StepOptions
from ane_trainer.ane.dispatch.state import (
    GENERATOR,
    GRADIENT,
    MODEL,
    OPTIMIZER,
    PENDING,
    faults_of,
    faults_of_generator,
    faults_of_numbers,
    incomplete,
    part,
)
from ane_trainer.ane.errors import BrokenModel, DataError
from ane_trainer.training.steps import put_into_training

Loss = Callable[[Any, Any], torch.Tensor]


class CpuStep:
    """One training step as every PyTorch user writes it."""

    def __init__(
        self, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, options: StepOptions
    ) -> None:
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._gradients = options.gradients
        self._pending = 0  # batches since the last update
        own = None if options.seed is None else torch.Generator().manual_seed(options.seed)
        self._draws = (own or torch.default_generator).get_state()  # dropout's, and all like it

    def __call__(self, x: object, y: object) -> torch.Tensor:
        """Forward, loss, backward, update; returns the loss. DataError for nan and inf."""
        _check_finite("x", x)
        _check_finite("y", y)
        with _faults_in_words(self._model):
            return self._step(x, y)

    def _step(self, x: object, y: object) -> torch.Tensor:
        put_into_training(self._model)
        if self._pending == 0:
            with optimizers_without_dynamo():
                self._optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._draws)
            output = self.forward(x)
            check_classes(self._loss, output, y)
            loss = self._loss(output, y)
            self.backward(loss / self._gradients.accumulate)
            self._draws = torch.get_rng_state()
        self._pending = (self._pending + 1) % self._gradients.accumulate
        if self._pending == 0:
            self._update()
        return loss.detach()

    def forward(self, x: object) -> Any:
        """The model's output."""
        return call_model(self._model, {}, x)

    def backward(self, loss: torch.Tensor) -> None:
        """Add to the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self) -> None:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        if self._gradients.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self._gradients.clip_value)
        if self._gradients.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._gradients.clip_norm)
        step_without_dynamo(self._optimizer)

    def follow(self) -> bool:
        """Nothing is held elsewhere."""
        return False

    @property
    def compiled(self) -> None:
        """There is no program."""

    @property
    def compiles(self) -> int:
        """No program was compiled."""
        return 0

    @property
    def dispatches_per_step(self) -> int:
        """No program runs."""
        return 0

    @property
    def engine_flop_fraction(self) -> float:
        """Nothing runs on an engine."""
        return 0.0

    @property
    def host_bytes_per_step(self) -> int:
        """Nothing leaves the host."""
        return 0

    @property
    def loss_scale(self) -> float:
        """Single precision needs no loss scaling."""
        return 1.0

    @property
    def skipped_steps(self) -> int:
        """No step is skipped."""
        return 0

    @property
    def health(self) -> dict[str, int]:
        """Single precision holds all gradients."""
        return {}

    def placement(self) -> dict[str, object]:
        """Where the step runs."""
        return {"where": "CPU, plain PyTorch", "how": "this device has no other executor"}

    def cost(self) -> None:
        """Not known: the cost model is of the engine."""

    def close(self) -> None:
        """Nothing to release."""

    def sync(self) -> None:
        """Nothing to do: the module's parameters are the state."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters, buffers and the optimizer's state, as tensors by name."""
        tensors = {f"{MODEL}{name}": value for name, value in self._model.state_dict().items()}
        for number, state in self._optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if value is not None:
                    tensors[f"{OPTIMIZER}{number}/{key}"] = torch.as_tensor(value)
        tensors[GENERATOR] = self._draws
        if self._pending:
            tensors[PENDING] = torch.tensor(self._pending)
            tensors |= {f"{GRADIENT}{n}": p.grad for n, p in self._parameters() if p.grad is not None}
        return tensors

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._model.named_parameters())

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_dict` returned. CheckpointError, before anything changed, if it is not whole."""
        model, entries = part(tensors, MODEL), part(tensors, OPTIMIZER)
        faults = faults_of(model, self._model.state_dict(), finite={name for name, _ in self._parameters()})
        faults += faults_of_numbers(entries) + faults_of_generator(tensors.get(GENERATOR, self._draws))
        if faults:
            raise incomplete("state", faults)
        self._model.load_state_dict(model)
        self._draws = tensors.get(GENERATOR, self._draws)  # version 1 did not keep it
        self._pending, gradients = int(tensors.get(PENDING, 0)), part(tensors, GRADIENT)
        for name, parameter in self._parameters():
            parameter.grad = gradients.get(name)
        state: dict[int, dict[str, object]] = {}
        for name, value in entries.items():
            number, key = name.split("/", 1)
            state.setdefault(int(number), {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


class CpuForward:
    """The model's inference by plain PyTorch in fp32, or by `forward`."""

    def __init__(self, model: nn.Module, forward: Callable[[object], object] | None = None) -> None:
        self._model = model
        self._forward = forward or (lambda x: call_model(model, {}, x))

    def __call__(self, x: object) -> Any:
        """The model's output in evaluation mode; the module's modes are put back. DataError for nan and inf."""
        _check_finite("x", x)
        with _faults_in_words(self._model), module_mode(self._model, training=False), torch.no_grad():
            return self._forward(x)


@contextlib.contextmanager
def _faults_in_words(model: nn.Module) -> Iterator[None]:
    """What the model, the loss or the optimizer raises in the block, as BrokenModel with module and line."""
    try:
        yield
    except FAULTS as error:
        if "can't allocate memory" in str(error):
            raise
        raise fault(
            error, place_of(error, model), "It is plain PyTorch that says so.", BrokenModel
        ) from error


def _check_finite(name: str, part: object) -> None:
    for leaf in pytree.tree_leaves(part):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            wrong = int((~torch.isfinite(leaf)).sum())
            if wrong:
                raise DataError(
                    f"{name}: needs finite numbers; got {wrong} that are nan or inf. Clean the data.",
                    code="DATA106",
                )
