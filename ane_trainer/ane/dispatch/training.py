"""`compile_step` and `TrainingStep`: one whole training step, compiled once, one dispatch a call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.capture import Loss, StepCapture, capture_training
from ane_trainer.ane.capture.gradients import Treatment
from ane_trainer.ane.capture.optimizers.scalars import check_structure, scalar_values, structure
from ane_trainer.ane.capture.optimizers.updates import RESIDUAL, missing_rule
from ane_trainer.ane.capture.randomness import PREFIX, draw
from ane_trainer.ane.capture.scaling import LARGEST_SCALE, SMALLEST_SCALE
from ane_trainer.ane.capture.step import GRADIENT
from ane_trainer.ane.chips.cost import Cost, estimate
from ane_trainer.ane.chips.counting import flops
from ane_trainer.ane.compiler.build import prepare
from ane_trainer.ane.dispatch.devices import choose_precision, get_device
from ane_trainer.ane.dispatch.feeds import RANGES, Feeds
from ane_trainer.ane.dispatch.host_optimizer import HostOptimizer
from ane_trainer.ane.dispatch.mirror import Mirror
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Program

SYNC_MODES = ("always", "lazy")
_UNIT = "unit/"
_OPTIMIZER = "optimizer/"
OPTIMIZER_PLACES = ("auto", "engine", "host")


def compile_step(
    model: torch.nn.Module,
    loss: str | Loss,
    optimizer: torch.optim.Optimizer,
    example: tuple[Any, Any],
    chip: str = "m4",
    device: str = "sim",
    fidelity: str = "exact",
    *,
    threads: int | None = None,
    loss_scale: float | str = "auto",
    sync: str = "always",
    seed: int = 0,
    path: str = "e5rt",
    precision: str = "auto",
    state: Mapping[str, torch.Tensor] | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    accumulate: int = 1,
    optimizer_on: str = "auto",
) -> TrainingStep:
    """Compile forward, loss, backward and optimizer update into one program and load it on a device.

    example     (x, y) as the loop yields them; their shapes are fixed from here on.
    loss        a name ("cross_entropy", "mse", ...) or a callable(output, target) -> scalar.
    loss_scale  where dynamic loss scaling starts: a power of two from 1 to 32768, or "auto".
    sync        "always": the module's parameters follow after every call; "lazy": on `step.sync()`.
    seed        of the dropout masks.
    precision   "fp16", "fp32" where the device runs it, or "auto": the device's own choice.
    state       a `state_dict` of an earlier step to continue bit for bit.
    clip_grad_norm, clip_grad_value
                clip the norm of all gradients together, each entry; on the engine. `step.treatment` changes them.
    accumulate  batches whose gradients are averaged before an update: every so many calls the weights move.
    optimizer_on
                "engine", "host" (fp32 in PyTorch, the gradients are read back each step), or "auto": the
                engine if it has a rule for the optimizer and its settings (docs/pytorch.md), else the host.
                `step.optimizer_on` says which, `placement()` why.

    A model in evaluation mode is captured in training mode.

    Raises: UnsupportedModel with every reason at once (ops, limits of the chip, the optimizer), UsageError
    for unknown names, EnvironmentFault for a device that is not here.
    """
    if sync not in SYNC_MODES:
        raise UsageError(f"sync: needs always or lazy; got {sync!r}. Choose one of them.")
    _check_scale(loss_scale)
    _check_place(optimizer_on)
    reason = _host_reason(optimizer, optimizer_on, state)
    treatment = Treatment(clip_grad_norm, clip_grad_value, accumulate, optimizer_on == "host" or bool(reason))
    treatment.check()
    step = TrainingStep(
        model, loss, optimizer, example, chip, device, fidelity, threads, sync, seed, path, precision, treatment,
        reason,
    )  # fmt: skip
    step._build(loss_scale, None if state is None else _units(state))
    if state is not None:
        step.load_state_dict(state)
    return step


class TrainingStep:
    """A compiled training step. `step(x, y)` runs it; made by `compile_step`.

    `skipped_steps` counts the steps whose gradients overflowed: they changed nothing but the loss scale.
    """

    #: One dispatch a call, by construction.
    dispatches_per_step = 1

    def __init__(
        self,
        model: torch.nn.Module,
        loss: str | Loss,
        optimizer: torch.optim.Optimizer,
        example: tuple[Any, Any],
        chip: str,
        device: str,
        fidelity: str,
        threads: int | None,
        sync: str,
        seed: int,
        path: str,
        precision: str = "auto",
        treatment: Treatment | None = None,
        host_reason: str = "",
    ) -> None:
        self.choice = get_device(device)
        self.precision = choose_precision(self.choice.device, precision)
        self._float = RANGES[self.precision].numpy
        self.compiles = self.steps = self.applied_steps = self.skipped_steps = 0
        self._model, self._loss, self._optimizer, self._example = model, loss, optimizer, example
        self._chip, self._fidelity, self._threads, self._path = chip, fidelity, threads, path
        self._always = sync == "always"
        self._masks = torch.Generator().manual_seed(seed)
        self.treatment = treatment or Treatment()
        self._host = HostOptimizer(model, optimizer) if self.treatment.on_host else None
        self._host_reason = host_reason
        self._structure: tuple[Any, ...] = ()
        self._pending = 0  # batches since the last update
        self._unsynced = 0  # steps whose weights the module has not seen
        self._stale_moments = False

    def _build(self, loss_scale: float | str, units: Mapping[str, float] | None) -> None:
        """Capture, lower, legalize, compile, load; then push the module's and the optimizer's state."""
        subject = self._model, self._loss, self._optimizer, self._example
        capture = _capture(*subject, loss_scale, units, self.precision, self.treatment)
        self._units, self._changes = dict(capture.units), capture.changes
        self._structure = structure(self._optimizer, self.treatment.on_host)
        self.compiled = prepare(capture.captured, self._chip, self._path, self.precision)
        self.compiles += 1
        self._session = self.choice.device.load(self.compiled, fidelity=self._fidelity, threads=self._threads)
        inputs = self.compiled.inputs
        self._feeds = Feeds(self._example, ("x", "y"), inputs, self.precision)
        self._scalars = [(p.name, p.target) for p in inputs if p.role == "scalar"]
        self._mask_ports = [p for p in inputs if p.target.startswith(PREFIX)]
        self._mirror = Mirror(
            self._session, inputs, self._model, self._optimizer, self.precision, self.treatment.on_host,
            capture.changes,
        )  # fmt: skip
        self._gradients = [p for p in self.compiled.outputs if p.target.endswith(f"/{GRADIENT}")]
        self._mirror.set_scaling(capture.loss_scale)
        self.load()

    def __call__(self, x: Any, y: Any) -> torch.Tensor:
        """One training step on a batch; the loss before the update, a float32 tensor of rank 0.

        Raises: DataError for a batch of another shape or with values that the precision does not hold;
        UsageError if a setting of the optimizer that is compiled in was changed.
        """
        check_structure(self._optimizer, self._structure, self.treatment.on_host)
        if self._mirror.changed():
            self._mirror.push_weights(changed_only=True)
        feeds = self.feeds(x, y)
        results = self._session.run(feeds)
        self.steps += 1
        self._unsynced += 1
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers warn without it
        self._pending = (self._pending + 1) % self.treatment.accumulate
        if self._pending == 0:
            self._count_update(bool(results["applied"][0]), results)
        if self._always:
            self._pull_weights()
        return torch.tensor(float(results["loss"][0]))

    def _count_update(self, applied: bool, results: Mapping[str, NDArray[Any]]) -> None:
        """A batch that completes an update has run; on the host the update happens now."""
        self.applied_steps += applied
        self.skipped_steps += not applied
        self._stale_moments |= applied
        if self._host is not None and applied:
            self._pull_weights()
            self._host.update(
                {
                    port.target.removesuffix(f"/{GRADIENT}"): torch.from_numpy(
                        results[port.name].astype(np.float32) / np.float32(port.scale)
                    )
                    for port in self._gradients
                }
            )

    def feeds(self, x: Any, y: Any, ahead: int = 0) -> dict[str, NDArray[Any]]:
        """What a step on this batch is fed, by port: batch, new dropout masks, the optimizer's scalars.

        The scalars are those of the next update, or of one that comes `ahead` steps after it.
        """
        feeds = self._feeds(x, y)
        feeds |= {p.name: draw(p.target, p.shape, self._masks).numpy() for p in self._mask_ports}
        sent = {
            **self.scalars(ahead),
            **self.treatment.scalars(last=self._pending + 1 == self.treatment.accumulate),
        }
        sent |= self._changes.host_values(self._model, self._unsynced)
        feeds |= {name: np.full(1, sent[target]) for name, target in self._scalars}
        return {name: array.astype(self._float, copy=False) for name, array in feeds.items()}

    def scalars(self, ahead: int = 0) -> dict[str, float]:
        """Port target -> value of the optimizer's scalars for the next update, or one `ahead` steps after it."""
        return scalar_values(self._optimizer, self.applied_steps + 1 + ahead, self.treatment.on_host)

    def port_state(self) -> dict[str, NDArray[Any]]:
        """A copy of the device's state by port, in the program's precision and units."""
        return {p.name: self._session.read(p.name) for p in self.compiled.inputs if p.role == "state"}

    def sync(self) -> None:
        """Engine -> module and optimizer: parameters, buffers, moments in torch's own layout and units."""
        self._pull_weights()
        if self._stale_moments:
            self._mirror.pull_moments(self.applied_steps)
            self._stale_moments = False

    def load(self) -> None:
        """Module and optimizer -> engine: use it after `optimizer.load_state_dict`.

        Changed parameters are noticed without it.
        """
        self._mirror.push_weights()
        self.applied_steps = self._mirror.push_moments()
        self._unsynced, self._stale_moments = 0, False

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The engine's whole state, exactly, with counters and the state of the dropout masks' generator."""
        if self._mirror.changed():  # by the host's optimizer, say
            self._mirror.push_weights(changed_only=True)
        counters = torch.tensor([self.steps, self.applied_steps, self.skipped_steps])
        units = {_UNIT + name: torch.tensor(unit) for name, unit in self._units.items()}
        if self._host is not None:
            units |= {_OPTIMIZER + name: value for name, value in self._host.state().items()}
        if self.treatment.accumulate > 1:
            units["pending"] = torch.tensor(self._pending)
        return {
            **self._mirror.state(), **units, "counters": counters, "mask_generator": self._masks.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state_dict`, bit for bit; a state in other units compiles the program anew."""
        _check_saved_place(state, self._host is not None)
        units = _units(state)
        if units != self._units:
            self._session.close()
            self._build("auto", units)
        self._mirror.set_state(state)
        self._pending = int(state.get("pending", 0))
        if self._host is not None:
            found = {k.removeprefix(_OPTIMIZER): v for k, v in state.items() if k.startswith(_OPTIMIZER)}
            self._host.set_state(found)
        self.steps, self.applied_steps, self.skipped_steps = map(int, state["counters"])
        self._masks.set_state(state["mask_generator"])
        self._mirror.pull_weights(0)
        self._unsynced, self._stale_moments = 0, self.applied_steps > 0

    @property
    def program(self) -> Program:
        """The MIL program of the whole step."""
        return self.compiled.program

    @property
    def optimizer_on(self) -> str:
        """ "engine", or "host" if PyTorch updates the weights."""
        return "host" if self._host is not None else "engine"

    @property
    def engine_flop_fraction(self) -> float:
        """Share of the step's floating-point operations in the program; the rest is the host's optimizer.

        On the host they are counted in the first update, and before it as 10 a parameter (Adam's).
        """
        if self._host is None:
            return 1.0
        engine = self.treatment.accumulate * sum(flops(op) for op in self.program.main.ops)
        host = self._host.flops or 10 * sum(p.numel() for p in self._model.parameters())
        return engine / (engine + host)

    @property
    def loss_scale(self) -> float:
        """The present loss scale."""
        return self._mirror.scaling("loss_scale")

    @property
    def host_bytes_per_step(self) -> int:
        """Bytes that cross between host and engine in one step: batch, scalars, results.

        With the optimizer on the host also gradients back and weights in.
        """
        bytes_each = 2 if self.precision == "fp16" else 4
        ports = [*self.compiled.inputs, *self.compiled.outputs]
        batch = sum(bytes_each * math.prod(p.shape) for p in ports if p.role != "state")
        weights = sum(bytes_each * p.numel() for p in self._model.parameters() if p.requires_grad)
        return batch + (weights if self._host is not None else 0)

    def text(self) -> str:
        """The program as MIL text."""
        return self.compiled.text

    def cost(self) -> Cost:
        """Estimated time and energy of one dispatch on the chip."""
        return estimate(self.program, self.compiled.chip, self._path)

    def placement(self) -> dict[str, Any]:
        """Where the step runs and how that is known."""
        where, how = self.choice.device.placement(self.compiled.chip, self._fidelity)
        if self._host is not None:
            name = type(self._optimizer).__name__
            where = f"{where}; optimizer {name} on the host (PyTorch fp32), gradients read back each step"
            where += f": it {self._host_reason}" if self._host_reason else ""
        return {
            "where": where, "how": how, "device": self.choice.device.name, "choice": self.choice.reason,
            "optimizer_on": self.optimizer_on, "optimizer_reason": self._host_reason,
        }  # fmt: skip

    def close(self) -> None:
        """Bring the module up to date and release the device."""
        self.sync()
        self._session.close()

    def __enter__(self) -> TrainingStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pull_weights(self) -> None:
        if self._unsynced:
            self._mirror.pull_weights(self._unsynced)
            self._unsynced = 0


def _capture(
    model: torch.nn.Module,
    loss: str | Loss,
    optimizer: torch.optim.Optimizer,
    example: tuple[Any, Any],
    loss_scale: float | str,
    units: Mapping[str, float] | None,
    precision: str,
    treatment: Treatment,
) -> StepCapture:
    """Capture in training mode; a model that is in training mode already keeps its submodules' modes."""
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()
    try:
        return capture_training(model, loss, optimizer, example, loss_scale, units, precision, treatment)
    finally:
        for module, training in modes.items():
            module.training = training


def _check_place(place: str) -> None:
    if place not in OPTIMIZER_PLACES:
        raise UsageError(
            f"optimizer_on: needs {', '.join(OPTIMIZER_PLACES)}; got {place!r}. Choose one of them."
        )


def _check_scale(scale: float | str) -> None:
    if scale == "auto":
        return
    power = isinstance(scale, (int, float)) and scale > 0 and math.log2(scale).is_integer()
    if not power or not SMALLEST_SCALE <= float(scale) <= LARGEST_SCALE:
        raise UsageError(
            f'loss_scale: needs "auto" or a power of two from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}; '
            f"got {scale!r}. Choose one of them."
        )


def _host_reason(
    optimizer: torch.optim.Optimizer, place: str, state: Mapping[str, torch.Tensor] | None
) -> str:
    """Why an optimizer that may run anywhere runs on the host; empty if it runs on the engine."""
    if place != "auto":
        return ""
    if state is not None and _saved_on_host(state):
        return "is continued where it was when its state was saved"
    return missing_rule(optimizer)


def _saved_on_host(state: Mapping[str, torch.Tensor]) -> bool:
    return any(key.startswith(_OPTIMIZER) for key in state)


def _check_saved_place(state: Mapping[str, torch.Tensor], on_host: bool) -> None:
    """Raises: UsageError for an optimizer's state that was saved in the other place."""
    saved_on_engine = any(key.endswith(f"/{RESIDUAL}") for key in state)
    if _saved_on_host(state) if not on_host else saved_on_engine:
        here, there = ("host", "engine") if on_host else ("engine", "host")
        raise UsageError(
            f"state: needs an optimizer on the {here}; got a state saved with it on the {there}. "
            f'Compile the step with optimizer_on="{there}".'
        )


def _units(state: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {k.removeprefix(_UNIT): float(v) for k, v in state.items() if k.startswith(_UNIT)}
