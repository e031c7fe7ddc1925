"""The host's side of the optimizer: the value of every scalar port for the next update, in float64.

Read from the user's `torch.optim` object before every step, so learning-rate schedulers and hand-made
changes of a parameter group act at once. Settings that are compiled into the program (whether there is
momentum, weight decay, ...) are watched: changing one asks for a new program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.updates import Rule, rule_for
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import MAX_FP16

LARGEST = MAX_FP16


def port_name(scalar: str, group: int, groups: int) -> str:
    """The scalar's port: its own name, with the group's number where there are several groups."""
    return scalar if groups == 1 else f"{scalar}_{group}"


def scalar_values(optimizer: torch.optim.Optimizer, step: int, on_host: bool = False) -> dict[str, float]:
    """Port name -> value for update number `step` (1 for the first).

    Raises: UsageError if a value does not fit fp16.
    """
    rule = rule_for(optimizer, on_host)
    groups = optimizer.param_groups
    values: dict[str, float] = {}
    for number, group in enumerate(groups):
        for name, value in rule.scalars(_plain(group), step).items():
            if not abs(value) <= LARGEST:
                raise UsageError(
                    f"optimizer: {name} of parameter group {number} needs a magnitude of at most {LARGEST:g} "
                    f"in the engine's units; got {value:g}. Choose a smaller learning rate or weight decay."
                )
            values[port_name(name, number, len(groups))] = value
    return values


def structure(optimizer: torch.optim.Optimizer, on_host: bool = False) -> tuple[Any, ...]:
    """What of the optimizer's settings is compiled in: compare before every step."""
    rule: Rule = rule_for(optimizer, on_host)
    return tuple((rule.structure(group), len(group["params"])) for group in optimizer.param_groups)


def check_structure(
    optimizer: torch.optim.Optimizer, compiled: tuple[Any, ...], on_host: bool = False
) -> None:
    """Raises: UsageError if a compiled-in setting was changed since capture."""
    if structure(optimizer, on_host) != compiled:
        raise UsageError(
            "optimizer: needs the settings it was compiled with (which of momentum, nesterov, weight decay, "
            "amsgrad, maximize are on; the number of groups and parameters); got others. Compile a new step."
        )


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with one-element tensors (a tensor learning rate) as floats."""
    return {
        key: float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        for key, value in group.items()
        if key != "params"
    }
