"""From the core's point of view: compile a model for a device, and say where it runs and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ane_trainer.ane.capture import get_loss
from ane_trainer.ane.chips import get_chip
from ane_trainer.ane.devices import choose_precision, get_device
from ane_trainer.ane.dispatch import compile_forward, compile_step
from ane_trainer.ane.errors import UsageError
from ane_trainer.machine import known_chip
from ane_trainer.reference import CpuForward, CpuStep
from ane_trainer.utils import did_you_mean

FIDELITIES = ("exact", "fast")


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
) -> Any:
    """The compiled training step; UnsupportedModel if the model does not fit the chip."""
    if device.chip is None or device.fidelity is None:
        return CpuStep(model, get_loss(loss), optimizer)
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
    )


def compile_inference(model: nn.Module, example: Any, device: Device, threads: int | None) -> Any:
    """The compiled forward pass in evaluation mode; UnsupportedModel if the model does not fit the chip."""
    if device.chip is None or device.fidelity is None:
        return CpuForward(model)
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
