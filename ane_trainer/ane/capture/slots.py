"""The state of a training step: every tensor that lives on the engine, named, scaled, with its start value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ane_trainer.ane.capture.updates import RESIDUAL, RESIDUAL_SCALE, Rule
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.stages import Port

_KEYWORDS = frozenset(
    [
        "in",
        "is",
        "as",
        "if",
        "or",
        "and",
        "not",
        "def",
        "del",
        "for",
        "try",
        "from",
        "pass",
        "with",
        "None",
        "True",
        "False",
    ]
)


@dataclass(frozen=True)
class Parameter:
    """One parameter: its first dotted name, its optimizer group (None: frozen) and its gradient's unit."""

    name: str
    tensor: torch.Tensor = field(repr=False, compare=False)
    group: int | None = None
    unit: float = 1.0

    @property
    def trained(self) -> bool:
        return self.group is not None


def find_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Parameter]:
    """All parameters of `model`, tied ones once, with their optimizer group.

    Raises: UnsupportedModel listing the optimizer's parameters that are not the model's.
    """
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    found = [
        Parameter(name, tensor, groups.get(id(tensor)) if tensor.requires_grad else None)
        for name, tensor in model.named_parameters()
    ]
    strangers = set(groups) - {id(p.tensor) for p in found}
    if strangers:
        finding = Finding(
            "optimizer", type(optimizer).__name__, f"holds {len(strangers)} tensors that are not parameters of "
            f"{type(model).__name__}.", "Build the optimizer from model.parameters().",
        )  # fmt: skip
        raise UnsupportedModel("The optimizer does not belong to the model:", [finding])
    return found


def float_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's floating-point buffers by dotted name (running statistics and constants)."""
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def parameter_ports(parameter: Parameter, rule: Rule | None, group: Mapping[str, Any] | None) -> list[Port]:
    """The state ports of one parameter: hi, and if trained the residual and the optimizer's slots."""
    shape = tuple(parameter.tensor.shape) or (1,)
    ports = [_state(parameter.name, shape)]
    if rule is None or group is None:
        return ports
    ports.append(_state(f"{parameter.name}/{RESIDUAL}", shape, RESIDUAL_SCALE))
    for slot in rule.slots(group):
        scale = parameter.unit**slot.power
        ports.append(_state(f"{parameter.name}/{slot.name}", shape, scale))
        if slot.two_term:
            ports.append(_state(f"{parameter.name}/{slot.name}/{RESIDUAL}", shape, scale * RESIDUAL_SCALE))
    return ports


def scaling_ports() -> list[Port]:
    """The state of loss scaling."""
    return [_state(name, (1,)) for name in ("loss_scale", "loss_scale_inverse", "good_steps")]


def _state(target: str, shape: tuple[int, ...], scale: float = 1.0) -> Port:
    return Port(identifier(target), shape, "state", target, scale)


def identifier(target: str) -> str:
    """A dotted name as an identifier of MIL text and Python: `0.weight/exp_avg` -> `m0_weight_exp_avg`."""
    name = re.sub(r"\W", "_", target)
    return f"m{name}" if name[:1].isdigit() or name in _KEYWORDS or not name else name


def unique(ports: Iterable[Port]) -> list[Port]:
    """The ports with clashing names numbered apart."""
    taken: set[str] = set()
    result = []
    for port in ports:
        name, number = port.name, 1
        while name in taken:
            number += 1
            name = f"{port.name}_{number}"
        taken.add(name)
        result.append(Port(name, port.shape, port.role, port.target, port.scale))
    return result
