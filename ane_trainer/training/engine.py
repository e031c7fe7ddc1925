"""`compile_step`, and from the trainer's point of view: which step or forward pass a target gets, and its facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ane_trainer.ane.capture import Loss, get_loss
from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.dispatch import (
    InferenceProgram,
    StepOptions,
    Target,
    TrainingStep,
    build_step,
    resolve_target,
)
from ane_trainer.ane.dispatch.agreement import Agreement, nan_in_pytorch
from ane_trainer.ane.dispatch.options import CPU
from ane_trainer.ane.dispatch.parallel import find_exchange
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from ane_trainer.training.steps import Step
from ane_trainer.training.steps.cpu import CpuForward, CpuStep
from ane_trainer.training.steps.partitioned import Partitioned, PartitionedStep


def compile_step(
    model: nn.Module, loss: str | Loss, optimizer: torch.optim.Optimizer, example: tuple[object, object],
    chip: str = "m4", device: str = "sim", fidelity: str = "exact", *,
    threads: int | None = None, loss_scale: float | str = "auto", sync: str = "always", seed: int | None = None,
    path: str = "e5rt", precision: str = "auto", state: Mapping[str, torch.Tensor] | None = None,
    clip_grad_norm: float | None = None, clip_grad_value: float | None = None, accumulate: int = 1,
    optimizer_on: str = "auto", fallback: str = "none", verify: str | int = "first",
    calibrate_on: Sequence[tuple[object, object]] = (), shards: int | None = None, blocks: str | int = "auto",
    checkpoint: bool = False,
) -> TrainingStep | PartitionedStep:  # fmt: skip
    """Compile forward, loss, backward and optimizer update into one program and load it on a device.

    example     (x, y) as the loop yields them; their shapes are fixed from here on.
    loss        a name ("cross_entropy", "mse", ...) or a callable(output, target) -> scalar.
    loss_scale  where dynamic loss scaling starts: a power of two from 1/64 to 32768, or "auto".
    sync        "always": the module's parameters follow after every call; "lazy": on `step.sync()`.
    seed        of dropout and other random draws; None: torch's own generator draws them (torch.manual_seed).
    precision   "fp16", "fp32" where the device runs it, or "auto": the device's own choice.
    state       a `state_dict` of an earlier step to continue bit for bit.
    clip_grad_norm, clip_grad_value
                clip the norm of all gradients, each entry; `step.gradient_options` changes the limits later.
    accumulate  batches whose gradients are averaged before an update: every so many calls the weights move.
    optimizer_on
                "engine", "host" (fp32 in PyTorch), or "auto": the engine if it has a rule for the optimizer
                and its settings (docs/pytorch.md); `step.optimizer_on` says which, `placement()` why.
    fallback    "none": refuse what does not fit the chip; "cpu": run those parts on the CPU. The step is then a
                `PartitionedStep` without a program; otherwise it is a `TrainingStep`.
    verify      "first": compare the first step with fp32 (`step.agreement`; `NumericsWarning` where it departs by more
                than fp16 costs); a number: every so many steps as well; "off".
    calibrate_on
                more batches (x, y) that show how large the model's numbers get, besides the example.
    shards      parts that a batch is divided into, a backward program each and one update (docs/scale.md); default: one
                for each process that torchrun started. Every process passes whole batches. 0: this process alone.
    blocks      modules that repeat (layers) in one program, which is dispatched for each; "off": the step is one;
                "auto": divided where that is longer than what is known to compile (docs/scale.md). Bits are the same.
    checkpoint  compute what lies within such modules again in the backward pass: less memory, the same bits.

    A model in evaluation mode is captured in training mode.
    Raises: UnsupportedModel with every reason at once (ops, limits of the chip, the optimizer), UsageError
    for unknown names, EnvironmentFault for a device that is not here.
    """
    gradients = GradientOptions(clip_grad_norm, clip_grad_value, accumulate)
    exchange = find_exchange(shards)
    if exchange is not None and seed is None:
        seed = exchange.share(int(torch.randint(2**31, ())))
    options = StepOptions(
        gradients, optimizer_on, fallback, loss_scale, sync, seed, verify, calibrate_on, exchange, blocks, checkpoint
    )  # fmt: skip
    target = resolve_target(device, chip, fidelity, precision, threads, path)
    try:
        return build_step(model, loss, optimizer, example, target, options, state)
    except UnsupportedModel:
        if fallback != "cpu":
            raise
    return _partitioned(PartitionedStep(model, get_loss(loss), optimizer, options, target), state)


def _partitioned(step: PartitionedStep, state: Mapping[str, torch.Tensor] | None) -> PartitionedStep:
    if state is not None:
        step.load_state_dict(state)
    return step


def choose_target(
    device: str, chip: str, fidelity: str, precision: str = "auto", threads: int | None = None
) -> Target:
    """The target of a trainer, which also runs on `cpu`; names are checked there, too."""
    if device != CPU:
        return resolve_target(device, chip, fidelity, precision, threads)
    resolve_target("sim", chip, fidelity)
    return Target(CPU, None, None, "fp32", threads)


def make_step(
    model: nn.Module,
    loss: str | Loss,
    optimizer: torch.optim.Optimizer,
    example: tuple[object, object],
    target: Target,
    options: StepOptions,
    state: Mapping[str, torch.Tensor] | None = None,
) -> Step:
    """The training step for a target: the engine's program, plain PyTorch on `cpu`, a step in parts.

    It continues from `state`, the `state_dict` of an earlier step, where it is given.

    UnsupportedModel if the model does not fit the chip and `options.fallback` is "none".
    """
    step: CpuStep
    if options.exchange is not None and not (target.runs_programs and options.fallback == "none"):
        raise UsageError(
            f"shards: needs a step that is made of programs; got device {target.device}, fallback {options.fallback}. "
            'Choose device "sim" and fallback "none", or pass shards=0 and wrap the model in DistributedDataParallel.',
            code="ANE104",
        )
    if not target.runs_programs:
        step = CpuStep(model, get_loss(loss), optimizer, options)
    else:
        try:
            return build_step(model, loss, optimizer, example, target, options, state)
        except UnsupportedModel:
            if options.fallback != "cpu":
                raise
        step = PartitionedStep(model, get_loss(loss), optimizer, options, target)
    if state is not None:
        step.load_state_dict(state)
    return step


def make_forward(
    model: nn.Module, example: object, target: Target, fallback: str = "none"
) -> Callable[[object], object]:
    """The forward pass in evaluation mode for a target.

    UnsupportedModel if the model does not fit the chip and `fallback` is "none".
    """
    if not target.runs_programs:
        return CpuForward(model)
    try:
        return InferenceProgram(model, example, target)
    except UnsupportedModel:
        if fallback != "cpu":
            raise
    return CpuForward(model, Partitioned(model, target))


def estimate_of(step: Step | None, target: Target) -> dict[str, object] | None:
    """The cost model's figures for one step on the chip; None where it knows nothing."""
    cost = step.cost() if step is not None else None
    if cost is None or target.chip is None:
        return None
    return {
        "chip": target.chip,
        "title": get_chip(target.chip).title,
        "latency_us": cost.latency_us,
        "energy_uj": cost.energy_uj,
        "latency_interval_us": [cost.latency_interval.low, cost.latency_interval.high],
        "error_band": cost.error_band,
        "provenance": cost.provenance,
    }


def agreement_of(step: Step) -> Agreement | None:
    """How a step agrees with fp32, where it was compared."""
    return step.agreement if isinstance(step, TrainingStep) else None


def compared_now(step: Step) -> Agreement | None:
    """How a step's last batch agrees with fp32, if that one was compared."""
    found = agreement_of(step)
    return (
        found if isinstance(step, TrainingStep) and found is not None and found.step == step.steps else None
    )


def is_undefined(step: Step | None, x: object, y: object) -> bool:
    """Whether the trained weights have a loss on this batch that is nan in plain PyTorch; the engine has no nan."""
    if not isinstance(step, TrainingStep) or step.options.verify == "off":
        return False
    step.sync()
    return nan_in_pytorch(step.subject, x, y)


def step_facts(step: Step | None) -> dict[str, object]:
    """The counters of a compiled step by their names in result.json; unknown ones before it is compiled."""
    if step is None:
        unknown = ("engine_flop_fraction", "host_bytes_per_step", "loss_scale")
        return {"compiles": 0, "dispatches_per_step": 0, "health": {}, **dict.fromkeys(unknown)}
    agreement = agreement_of(step)
    return {
        "compiles": step.compiles,
        "dispatches_per_step": step.dispatches_per_step,
        "engine_flop_fraction": step.engine_flop_fraction,
        "host_bytes_per_step": step.host_bytes_per_step,
        "loss_scale": step.loss_scale,
        "health": step.health,
        "agreement": None if agreement is None else agreement.to_json(),
    }


def program_facts(step: Step, optimizer: torch.optim.Optimizer) -> dict[str, object] | None:
    """Size of the compiled step; None where there is not one program."""
    if step.compiled is None:
        return None
    programs = step.programs if isinstance(step, TrainingStep) else (step.compiled,)
    sizes = [len(part.program.main.ops) for part in programs]
    return {
        "ops": sum(sizes),
        "longest": max(sizes),
        "programs": len(programs),
        "blocks": step.placement().get("blocks", ""),
        "optimizer": type(optimizer).__name__.lower(),
        **step_facts(step),
    }


#: What a resumed training says whose program is not the one that wrote its checkpoint.
OTHER_PROGRAM = (
    "the step is another program than the checkpoint's, of another version of ane_trainer or PyTorch, say: training "
    "goes on, and its last bits may differ from a run in one piece"
)


def is_other_program(step: Step, fingerprint: object) -> bool:
    """Whether the step's program is known not to have this fingerprint."""
    return step.compiled is not None and fingerprint not in (None, step.compiled.fingerprint)
