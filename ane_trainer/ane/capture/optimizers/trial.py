"""Compares an optimizer that torch does not have with its rule: a few steps on small tensors in fp64."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.rule import RESIDUAL, RESIDUAL_SCALE, Group, Rule, Slots, Update

#: Sizes of the gradients, a step each: an optimizer that clips shows it.
_SIZES = (0.01, 30.0, 0.1, 1.0)
#: The largest difference between two computations of one update, relative to it.
_TOLERANCE = 1e-4


def difference(optimizer: torch.optim.Optimizer, rule: Rule) -> str:
    """What differs, as the end of a sentence; empty if `rule` gives the optimizer's own steps.

    The optimizer is copied with small parameters in its groups and no state; it does not change.
    """
    generator = torch.Generator().manual_seed(0)
    twin = _twin(optimizer, [_small(group, generator) for group in optimizer.param_groups])
    state: list[list[Slots]] = [[{} for _ in group["params"]] for group in twin.param_groups]
    for step, size in enumerate(_SIZES, 1):
        before = [[p.detach().clone() for p in group["params"]] for group in twin.param_groups]
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * size
        expected = [
            _steps(rule, step, g, w, s) for g, w, s in zip(twin.param_groups, before, state, strict=True)
        ]
        try:
            twin.step()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"fails in a trial on small tensors ({type(error).__name__}: {error})"
        for group, old, deltas in zip(twin.param_groups, before, expected, strict=True):
            for p, start, delta in zip(group["params"], old, deltas, strict=True):
                moved = p.detach() - start
                if not float((moved - delta).norm()) <= _TOLERANCE * float(moved.norm()):
                    return f"differs from its rule in step {step} of a trial"
    return ""


def _twin(optimizer: torch.optim.Optimizer, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """A new optimizer with the attributes of this one, but no state, hooks, or step that a scheduler wrapped."""
    twin = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            vars(twin)[name] = type(value)()
        elif name not in ("param_groups", "state", "step"):
            vars(twin)[name] = copy.deepcopy(value) if isinstance(value, (dict, list, set)) else value
    twin.state, twin.param_groups = defaultdict(dict), groups
    return twin


def _small(group: Mapping[str, Any], generator: torch.Generator) -> dict[str, object]:
    """A copy of the group with one small parameter for each rank of its own."""
    ranks = sorted({p.ndim for p in group["params"]})
    shapes = [(7, 5, 3, 3)[:rank] if rank < 5 else (2,) * rank for rank in ranks]
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes
    ]
    settings = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    for counter in ("step", "k"):
        if counter in settings:
            settings[counter] = (
                torch.zeros_like(settings[counter]) if torch.is_tensor(settings[counter]) else 0
            )
    return {**settings, "params": parameters}


def _steps(
    rule: Rule, step: int, group: Group, weights: list[torch.Tensor], states: list[Slots]
) -> list[torch.Tensor]:
    """The change of each weight by the rule in units of 1; `states` are replaced."""
    scalars = {**rule.scalars(group, step), **rule.unit_scalars(group, step, 1.0)}
    found = []
    for number, (weight, parameter) in enumerate(zip(weights, group["params"], strict=True)):
        shape = tuple(weight.shape) or (1,)
        state = states[number] or _fresh(rule, group, shape)
        gradient = -parameter.grad if group.get("maximize") else parameter.grad
        named = {name: torch.tensor([value], dtype=torch.float64) for name, value in scalars.items()}
        new, delta = rule.update(
            Update(weight.reshape(shape), gradient.reshape(shape).clone(), state, named, group)
        )
        states[number] = {**state, **new}
        found.append(delta.reshape(weight.shape) / RESIDUAL_SCALE)
    return found


def _fresh(rule: Rule, group: Group, shape: tuple[int, ...]) -> Slots:
    state = {}
    for slot in rule.slots(group, shape):
        state[slot.name] = torch.zeros(slot.shape or shape, dtype=torch.float64)
        if slot.residual_scale:
            state[f"{slot.name}/{RESIDUAL}"] = torch.zeros_like(state[slot.name])
    return state
