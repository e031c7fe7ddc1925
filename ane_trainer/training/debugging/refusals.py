"""Why there is no step, as faults with a place, and what lets there be one: each tried on copies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from ane_trainer.ane.dispatch.agreement import copied
from ane_trainer.ane.errors import AneTrainerError, Finding, UnsupportedModel
from ane_trainer.ane.mil.program import MAX_FP16
from ane_trainer.training.debugging.remedies import Bench
from ane_trainer.training.debugging.report import Fault, Place, Remedy
from ane_trainer.training.debugging.trials import Trial

#: Where the largest weight of a parameter that was too large is brought.
_WANTED = 2.0**6


def refusals(bench: Bench, trial: Trial) -> tuple[Fault, ...]:
    """What refused the step: parameters beyond fp16, a batch beyond it, or ops, each with its place."""
    error = trial.refused
    assert error is not None
    if isinstance(error, UnsupportedModel):
        return tuple(Fault.of_finding(finding, trial.score) for finding in error.findings)
    heavy = [(n, p) for n, p in bench.subject.model.named_parameters() if _peak(p) > MAX_FP16]
    if error.code == "DATA106" and heavy:
        return tuple(_heavy(bench, trial, name, parameter) for name, parameter in heavy)
    remedies = tuple(_normalised(bench, trial)) if error.code == "DATA106" else ()
    return (Fault.of_finding(_finding(error), trial.score, remedies),)


def _peak(tensor: torch.Tensor) -> float:
    known = tensor.is_floating_point() and tensor.numel()
    return float(tensor.detach().abs().amax()) if known else 0.0


def _finding(error: AneTrainerError) -> Finding:
    where, _, rest = str(error.args[0]).partition(": ")
    reason, _, fix = rest.partition(". ")
    return Finding(where, error.code, f"{reason}.", fix)


def _heavy(bench: Bench, trial: Trial, name: str, parameter: torch.nn.Parameter) -> Fault:
    """A parameter with entries beyond fp16, tried smaller, with its module's output multiplied back."""
    module, _, _ = name.rpartition(".")
    peak = _peak(parameter)
    facts = f"{name} has weights up to {peak:,.6g}; fp16 holds {MAX_FP16:,.0f}"
    power = math.ceil(math.log2(peak / _WANTED)) if math.isfinite(peak) else 0
    remedies = []
    if power:
        after = _smaller(bench, module, power).attempt(trial.way)
        if after.refused is None:
            how = f"divide {module or 'the module'}'s parameters by 2^{power} and multiply its output by 2^{power}"
            remedies.append(Remedy("smaller weights", how, trial.score, after.score))
    return Fault(
        "parameter", name, Place(module or name), "forward", "overflow", facts, trial.score,
        remedies=tuple(remedies), advice="Weights of this size usually come from a broken initialisation.",
    )  # fmt: skip


def _smaller(bench: Bench, path: str, power: int) -> Bench:
    """The same function of the model with one module's own parameters divided by a power of two."""
    model, loss, optimizer = copied(bench.subject)
    module = model.get_submodule(path)
    with torch.no_grad():
        for own in module.parameters(recurse=False):
            own.mul_(2.0**-power)
    module.register_forward_hook(lambda _module, _args, output: output * 2.0**power)
    subject = dataclasses.replace(bench.subject, model=model, loss=loss, optimizer=optimizer)
    return dataclasses.replace(bench, subject=subject)


def _normalised(bench: Bench, trial: Trial) -> Iterator[Remedy]:
    """The batch with mean 0 and deviation 1."""
    x, y = bench.subject.example
    for what, example in (
        ("inputs", (_standard(x), y)),
        ("inputs and targets", (_standard(x), _standard(y))),
    ):
        subject = dataclasses.replace(bench.subject, example=example)
        after = dataclasses.replace(bench, subject=subject).attempt(trial.way)
        if after.refused is None:
            how = f"normalise the {what}: (x - x.mean()) / x.std()"
            yield Remedy("normalised data", how, trial.score, after.score)
            return


def _standard(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return type(value)(_standard(item) for item in value)
    if isinstance(value, dict):
        return {key: _standard(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1:
        return (value - value.mean()) / value.std().clamp(min=1e-30)
    return value
