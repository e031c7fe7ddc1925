"""From the core's point of view: compile a model for a device, and say where it runs and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ane_trainer.ane.capture import get_loss
from ane_trainer.ane.capture.gradients import Treatment
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.dispatch import compile_forward, compile_step
from ane_trainer.ane.dispatch.devices import choose_precision, get_device
from ane_trainer.ane.dispatch.devices.machine import known_chip
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from ane_trainer.training.steps.cpu import CpuForward, CpuStep
from ane_trainer.training.steps.partitioned import FallbackStep, Partitioned
from ane_trainer.utils import did_you_mean

FIDELITIES = ("exact", "fast")


@dataclass(frozen=True)
class Gradients:
    """What a trainer wants done with gradients, where the optimizer runs, and what with refused parts."""

    clip_norm: float | None = None
    clip_value: float | None = None
    accumulate: int = 1
    optimizer_on: str = "auto"
    fallback: str = "none"

    def check(self) -> None:
        """UsageError for values out of range."""
        self.treatment().check()
        if self.fallback not in ("none", "cpu"):
            raise UsageError(
                f'fallback: needs "none" or "cpu"; got {self.fallback!r}. Choose one of them.', code="ANE104"
            )

    def treatment(self) -> Treatment:
        """The part that a step is compiled with."""
        return Treatment(self.clip_norm, self.clip_value, self.accumulate)


@dataclass(frozen=True)
class Device:
    """A chosen device. `chip` and `fidelity` are None for `cpu`; `headline` is what the user reads."""

    name: str
    chip: str | None
    fidelity: str | None
    precision: str
    headline: str


def choose_device(device: str, chip: str, fidelity: str, precision: str = "auto") -> Device:
    """Check the names and resolve `auto`. Direct dispatch takes the chip of this Mac, whatever `chip` says.

    UsageError for an unknown name; EnvironmentFault for a device that this machine does not have.
    """
    found = get_chip(chip)
    if fidelity not in FIDELITIES:
        hint = did_you_mean(fidelity, FIDELITIES)
        raise UsageError(f"fidelity: needs a known name; got {fidelity!r}. {hint}", code="ANE104")
    if device == "cpu":
        return Device(
            "cpu", None, None, "fp32", "CPU: plain PyTorch fp32, for comparison; not the engine's arithmetic"
        )
    choice = get_device(device)
    why = f"   ({choice.reason})" if device == "auto" else ""
    name = choice.device.name
    chosen = choose_precision(choice.device, precision)
    mac = known_chip() if name.startswith("e5rt") else None
    if mac is not None and mac != found.name:  # a program for another chip may fail or give other results
        why += f"   (this Mac's chip instead of {found.title})"
        found = get_chip(mac)
    text = f"SIMULATOR of {found.title} (generation {found.generation}), fidelity {fidelity}"
    if name != "sim":
        where, _ = choice.device.placement(found.name, fidelity)
        text = f"{name}: {where}, {chosen}, program checked for {found.title}"
    return Device(name, found.name, fidelity, chosen, text + why)


def compile_training(
    model: nn.Module,
    loss: str | Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    example: tuple[Any, Any],
    device: Device,
    *,
    threads: int | None = None,
    seed: int = 0,
    gradients: Gradients | None = None,
) -> Any:
    """The compiled training step.

    UnsupportedModel if the model does not fit the chip; with `fallback="cpu"` a step in parts instead.
    """
    wishes = gradients or Gradients()
    if device.chip is None or device.fidelity is None:
        return CpuStep(model, get_loss(loss), optimizer, wishes.treatment())
    try:
        return _compile_whole(model, loss, optimizer, example, device, threads, seed, wishes)
    except UnsupportedModel:
        if wishes.fallback != "cpu":
            raise
    options = _parts_options(device, threads)
    return FallbackStep(model, get_loss(loss), optimizer, wishes.treatment(), options)


def _compile_whole(
    model: nn.Module,
    loss: str | Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    example: tuple[Any, Any],
    device: Device,
    threads: int | None,
    seed: int,
    wishes: Gradients,
) -> Any:
    assert device.chip is not None
    assert device.fidelity is not None
    return compile_step(
        model,
        loss,
        optimizer,
        example=example,
        chip=device.chip,
        device=device.name,
        fidelity=device.fidelity,
        threads=threads,
        precision=device.precision,
        sync="lazy",
        seed=seed,
        clip_grad_norm=wishes.clip_norm,
        clip_grad_value=wishes.clip_value,
        accumulate=wishes.accumulate,
        optimizer_on=wishes.optimizer_on,
    )


def _parts_options(device: Device, threads: int | None) -> dict[str, Any]:
    return {
        "chip": device.chip, "device": device.name, "fidelity": device.fidelity, "precision": device.precision,
        "threads": threads,
    }  # fmt: skip


def compile_inference(
    model: nn.Module, example: Any, device: Device, threads: int | None, fallback: str = "none"
) -> Any:
    """The compiled forward pass in evaluation mode.

    UnsupportedModel if the model does not fit the chip; with `fallback="cpu"` a pass in parts instead.
    """
    if device.chip is None or device.fidelity is None:
        return CpuForward(model)
    try:
        return _compile_forward(model, example, device, threads)
    except UnsupportedModel:
        if fallback != "cpu":
            raise
    return CpuForward(model, Partitioned(model, _parts_options(device, threads)))


def _compile_forward(model: nn.Module, example: Any, device: Device, threads: int | None) -> Any:
    assert device.chip is not None
    assert device.fidelity is not None
    return compile_forward(
        model,
        example,
        chip=device.chip,
        device=device.name,
        fidelity=device.fidelity,
        threads=threads,
        precision=device.precision,
    )


def placement_of(step: Any, device: Device) -> dict[str, Any]:
    """Where the step's ops run and how that is known."""
    if device.name == "cpu":
        return {"where": "CPU, plain PyTorch", "how": "this device has no other executor"}
    return dict(step.placement()) if step is not None else {}


def estimate_of(step: Any, device: Device) -> dict[str, Any] | None:
    """The cost model's figures for one step on the chip; None where it knows nothing."""
    cost = step.cost() if step is not None and device.chip is not None else None
    if cost is None or device.chip is None:
        return None
    return {
        "chip": device.chip,
        "title": get_chip(device.chip).title,
        "latency_us": cost.latency_us,
        "energy_uj": cost.energy_uj,
        "error_band": cost.error_band,
        "provenance": cost.provenance,
    }


def step_facts(step: Any) -> dict[str, Any]:
    """The counters of a compiled step by their names in result.json; unknown ones before it is compiled."""
    names = ("compiles", "dispatches_per_step", "engine_flop_fraction", "host_bytes_per_step", "loss_scale")
    if step is None:
        return {**dict.fromkeys(names), "compiles": 0, "dispatches_per_step": 0}
    return {name: getattr(step, name) for name in names}


def program_facts(step: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Size of the compiled step; None on the `cpu` device, which has no program."""
    if not hasattr(step, "program"):
        return None
    return {
        "ops": len(step.program.main.ops),
        "optimizer": type(optimizer).__name__.lower(),
        **step_facts(step),
    }


def program_files(step: Any) -> tuple[str, bytes] | None:
    """MIL text and weight blob of the compiled step; None where there is no program."""
    return (step.compiled.text, step.compiled.weights) if hasattr(step, "program") else None
