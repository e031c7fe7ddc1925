"""RMSprop, Adagrad and Adadelta as rules: gradients divided by a running measure of their size."""

from __future__ import annotations

import math
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.rules import (
    EPSILON_SCALE,
    RESIDUAL,
    RESIDUAL_SCALE,
    SQUARE_RESIDUAL_SCALE,
    Group,
    Rule,
    Slot,
    Slots,
    average_square,
    coupled_decay,
    decay_scalar,
    least_epsilon,
    square_scalars,
)

#: Ratios beyond this come from denominators that left fp16.
_RATIO_BOUND = 1024.0
#: Adadelta's steps are kept as those of weights are, times RESIDUAL_SCALE; their square must stay in fp16.
_STEP_BOUND = 240.0


def _bounded(ratio: torch.Tensor, bound: float = _RATIO_BOUND) -> torch.Tensor:
    return torch.clamp(ratio, -bound, bound)


# -- RMSprop


def _rmsprop_slots(group: Group) -> tuple[Slot, ...]:
    slots = [Slot("square_avg", 2, SQUARE_RESIDUAL_SCALE)]
    if group["momentum"]:
        slots.append(Slot("momentum_buffer", 0))
    if group["centered"]:
        slots.append(Slot("grad_avg", 1))
    return tuple(slots)


def _rmsprop_scalars(group: Group, step: int) -> dict[str, float]:
    forget = 1.0 - float(group["alpha"])
    scalars = {"rate": -float(group["lr"]) * RESIDUAL_SCALE, "eps": float(group["eps"]) * EPSILON_SCALE}
    scalars |= square_scalars(forget)
    if group["centered"]:
        scalars["forget"] = forget
    if group["momentum"]:
        scalars |= {"admit": 1.0, "forget_buffer": 1.0 - float(group["momentum"])}
    return {**scalars, **decay_scalar(group)}


def _rmsprop(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, floor: float
) -> tuple[Slots, torch.Tensor]:
    """v += forget_sq*(g^2-v); centered: v - mean^2; ratio = g/(sqrt(v)+eps); momentum sums the ratios."""
    new: Slots = {}
    g = coupled_decay(weight, g, s, unit, group)
    v = average_square(slots, "square_avg", g, s, new)
    if group["centered"]:
        mean = slots["grad_avg"]
        new["grad_avg"] = mean = mean + (g - mean) * s["forget"]
        rest = new[f"square_avg/{RESIDUAL}"] * (1.0 / SQUARE_RESIDUAL_SCALE)
        v = torch.clamp((v - mean * mean) + rest, min=0.0)
    ratio = _bounded(g / (torch.sqrt(v) + least_epsilon(s, unit, floor)))
    if group["momentum"]:
        buffer = slots["momentum_buffer"]
        new["momentum_buffer"] = ratio = buffer + (ratio * s["admit"] - buffer * s["forget_buffer"])
    return new, ratio * s["rate"]


def _rmsprop_structure(group: Group) -> tuple[Any, ...]:
    return bool(group["momentum"]), group["centered"], bool(group["weight_decay"]), group["maximize"]


# -- Adagrad: the mean of the squares is kept instead of their sum, which leaves fp16


def _adagrad_scalars(group: Group, step: int) -> dict[str, float]:
    rate = float(group["lr"]) / (1.0 + (step - 1) * float(group["lr_decay"]))
    root = math.sqrt(step + 1.0)
    return {
        "rate": -rate / root * RESIDUAL_SCALE,
        "eps": float(group["eps"]) / root * EPSILON_SCALE,
        **square_scalars(1.0 / (step + 1.0)),
        **decay_scalar(group),
    }


def _adagrad(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, floor: float
) -> tuple[Slots, torch.Tensor]:
    """mean += (g^2-mean)/(t+1); step = rate * g/(sqrt(mean)+eps), rate and eps divided by sqrt(t+1)."""
    new: Slots = {}
    g = coupled_decay(weight, g, s, unit, group)
    root = torch.sqrt(average_square(slots, "sum", g, s, new))
    return new, _bounded(g / (root + least_epsilon(s, unit, floor))) * s["rate"]


# -- Adadelta


def _adadelta_scalars(group: Group, step: int) -> dict[str, float]:
    eps = float(group["eps"])
    return {
        "rate": -float(group["lr"]),
        "eps": eps * EPSILON_SCALE,
        "step_eps": eps * RESIDUAL_SCALE**2,
        **square_scalars(1.0 - float(group["rho"])),
        **decay_scalar(group),
    }


def _adadelta(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, floor: float
) -> tuple[Slots, torch.Tensor]:
    """d = sqrt(a+eps) * g/sqrt(v+eps); a += forget_sq*(d^2-a); step = rate * d."""
    new: Slots = {}
    g = coupled_decay(weight, g, s, unit, group)
    v = average_square(slots, "square_avg", g, s, new)
    below = torch.sqrt(v + torch.clamp(s["eps"] * (unit * unit / EPSILON_SCALE), min=floor))
    above = torch.sqrt(slots["acc_delta"] + s["step_eps"])
    step = _bounded(_bounded(g / below) * above, _STEP_BOUND)
    average_square(slots, "acc_delta", step, s, new)
    return new, step * s["rate"]


def _structure(group: Group) -> tuple[Any, ...]:
    return bool(group["weight_decay"]), group["maximize"]


_GATED = frozenset({"rate", "forget_sq", "admit_sq"})
RMSPROP = Rule(
    _rmsprop_slots, _rmsprop_scalars, _GATED | {"forget", "admit", "forget_buffer"}, _rmsprop,
    _rmsprop_structure, calibrated=True,
)  # fmt: skip
ADAGRAD = Rule(
    lambda group: (Slot("sum", 2, SQUARE_RESIDUAL_SCALE, lambda group, step: step + 1.0),),
    _adagrad_scalars, _GATED, _adagrad, _structure, calibrated=True,
    takes=lambda group: not group["initial_accumulator_value"],
)  # fmt: skip
ADADELTA = Rule(
    lambda group: (
        Slot("square_avg", 2, SQUARE_RESIDUAL_SCALE),
        Slot("acc_delta", 0, SQUARE_RESIDUAL_SCALE, factor=RESIDUAL_SCALE**2),
    ),
    _adadelta_scalars, _GATED, _adadelta, _structure, calibrated=True,
)  # fmt: skip
