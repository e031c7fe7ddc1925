"""The state of a training step: every tensor that lives on the engine, its port's name and its scale."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ane_trainer.ane.capture.batches import plain_tensor
from ane_trainer.ane.capture.gradients import ACCUMULATED, GradientOptions
from ane_trainer.ane.capture.optimizers.rule import RESIDUAL, RESIDUAL_SCALE, Rule
from ane_trainer.ane.capture.rewrites.keras_variables import keras_state
from ane_trainer.ane.capture.scaling import FITS, SCALING
from ane_trainer.ane.capture.trace.torch_private import non_persistent_buffers, pytree
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.stages import Port

#: Words of Python (FX graphs) and of MIL text that cannot name a value.
_RESERVED = frozenset(
    (*keyword.kwlist, "tensor", "state", "list", "tuple", "dict", "string", "func", "program")
)


#: State of loss scaling; its targets begin with SCALING.
SCALING_STATE = ("loss_scale", "loss_scale_inverse", "good_steps")


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

    Raises: UnsupportedModel for complex parameters, for those without entries, and for parameters of the optimizer
    that are not the model's.
    """
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    parameters = dict(model.named_parameters())
    buffers = keras_state(model)
    found = [
        Parameter(name, tensor, groups.get(id(tensor)) if tensor.requires_grad else None)
        for name, tensor in parameters.items()
        if name not in buffers
    ]
    complexes = [name for name, tensor in parameters.items() if tensor.is_complex()]
    if complexes:
        reason, fix = (
            "is complex.",
            "Keep it as a real parameter [..., 2] and use torch.view_as_complex on it.",
        )
        findings = [Finding(name, "parameter", reason, fix) for name in complexes]
        raise UnsupportedModel("The parameters must be real:", findings)
    empty = [name for name, tensor in parameters.items() if not tensor.numel()]
    if empty:
        fix = "Delete it, or make it only where it has entries: an engine has no tensors without any."
        findings = [Finding(name, "parameter", "has no entries.", fix) for name in empty]
        raise UnsupportedModel("The parameters must have entries:", findings)
    strangers = set(groups) - {id(tensor) for tensor in parameters.values()}
    if strangers:
        reason = f"holds {len(strangers)} tensors that are not parameters of {type(model).__name__}."
        fix = "Build the optimizer from model.parameters()."
        finding = Finding("optimizer", type(optimizer).__name__, reason, fix)
        raise UnsupportedModel("The optimizer does not belong to the model:", [finding])
    return found


def batch_ports(example: object, prefix: str) -> list[Port]:
    """Ports of a batch: `x` for one tensor, `x_0`, `x_1`, ... or `x_<key>` for a structure of tensors."""
    leaves = pytree.tree_leaves_with_path(example)
    tensors = [(path, leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    ports = []
    for path, leaf in tensors:
        suffix = pytree.keystr(path).replace("]", "").replace("[", "_").replace("'", "")
        name, shape = identifier(prefix + suffix), tuple(leaf.shape) or (1,)
        ports.append(Port(name, shape, "batch", prefix + suffix, bounds=tensor_bounds(leaf)))
    return ports


def tensor_bounds(tensor: torch.Tensor) -> tuple[float, float] | None:
    """Least and largest number of a tensor, if it holds integers or floats that fp16 rounds; else None."""
    if (
        tensor.is_complex()
        or tensor.dtype == torch.bool
        or not tensor.numel()
        or tensor.layout != torch.strided
    ):
        return None
    low, high = torch.aminmax(tensor.detach())
    if tensor.is_floating_point() and bool((tensor.half() == tensor).all()):
        return None
    return (float(low), float(high))


def units_by_group(
    parameters: Iterable[Parameter], groups: int, units: Mapping[str, float] | None = None
) -> list[list[float]]:
    """For each group of the optimizer the units of its trained parameters, in order; `units`: others by name."""
    found: list[list[float]] = [[] for _ in range(groups)]
    for p in parameters:
        if p.group is not None:
            found[p.group].append((units or {}).get(p.name, p.unit))
    return found


def float_buffers(model: torch.nn.Module, *, dense: bool = True) -> dict[str, torch.Tensor]:
    """The model's floating-point buffers by dotted name (running statistics and tables).

    Those that are not saved with the model (`persistent=False`: tables made from its settings) are constants
    of the program, so that what follows from them alone is computed beforehand in full precision. Sparse ones are
    given `dense`, or as they are.
    """
    derived = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in non_persistent_buffers(module)
    }
    named = dict(model.named_buffers()) | keras_state(model)
    return {
        n: plain_tensor(b) if dense and b.layout is not torch.strided else b
        for n, b in named.items()
        if b.is_floating_point() and n not in derived
    }


def parameter_ports(
    parameter: Parameter, rule: Rule | None, group: Mapping[str, object] | None, options: GradientOptions
) -> list[Port]:
    """The state ports of one parameter: hi, and if trained the residual and the optimizer's slots.

    A parameter that the host's optimizer changes has no residual. Accumulation adds the sum of gradients.
    """
    shape = tuple(parameter.tensor.shape) or (1,)
    ports = [_state(parameter.name, shape)]
    if rule is None or group is None:
        return ports
    if options.accumulate > 1:
        ports.append(_state(f"{parameter.name}/{ACCUMULATED}", shape, parameter.unit))
    if options.on_host:
        return ports
    ports.append(_state(f"{parameter.name}/{RESIDUAL}", shape, RESIDUAL_SCALE))
    for slot in rule.slots(group, shape):
        scale = slot.factor * parameter.unit**slot.power
        ports.append(_state(f"{parameter.name}/{slot.name}", slot.shape or shape, scale))
        if slot.residual_scale:
            residual = f"{parameter.name}/{slot.name}/{RESIDUAL}"
            ports.append(_state(residual, slot.shape or shape, scale * slot.residual_scale))
    return ports


def scaling_ports(options: GradientOptions) -> list[Port]:
    """The state of loss scaling, and of accumulation."""
    names = (*SCALING_STATE, FITS) if options.accumulate > 1 else SCALING_STATE
    return [Port(name, (1,), "state", SCALING + name) for name in names]


def _state(target: str, shape: tuple[int, ...], scale: float = 1.0) -> Port:
    return Port(identifier(target), shape, "state", target, scale)


def identifier(target: str) -> str:
    """A dotted name as an identifier of MIL text and Python: `0.weight/exp_avg` -> `m0_weight_exp_avg`."""
    name = re.sub(r"\W", "_", target)
    return f"m{name}" if name[:1].isdigit() or name in _RESERVED or not name else name


def unique(ports: Iterable[Port]) -> list[Port]:
    """The ports with clashing names numbered."""
    taken: set[str] = set()
    result = []
    for port in ports:
        name, number = port.name, 1
        while name in taken:
            number += 1
            name = f"{port.name}_{number}"
        taken.add(name)
        result.append(replace(port, name=name))
    return result
