"""SGD, Adam and AdamW as rules, and the table of all rules."""

from __future__ import annotations

import math
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.averages import ADADELTA, ADAGRAD, RMSPROP
from ane_trainer.ane.capture.optimizers.moments import ADAMAX, NADAM, RADAM
from ane_trainer.ane.capture.optimizers.rules import (
    EPSILON_SCALE,
    LINEAR_UNIT,
    RESIDUAL,
    RESIDUAL_SCALE,
    ROOT_FLOORS,
    SQUARE_RESIDUAL_SCALE,
    Group,
    Rule,
    Slot,
    Slots,
    average_square,
    coupled_decay,
    least_epsilon,
    square_scalars,
    two_term_add,
)
from ane_trainer.ane.errors import Finding, UnsupportedModel

__all__ = [
    "LINEAR_UNIT",
    "RESIDUAL",
    "RESIDUAL_SCALE",
    "ROOT_FLOORS",
    "RULES",
    "Rule",
    "missing_rule",
    "rule_for",
]
__all__ += ["two_term_add"]


# -- SGD


def _sgd_slots(group: Group) -> tuple[Slot, ...]:
    return (Slot("momentum_buffer", 1),) if group["momentum"] else ()


def _sgd_scalars(group: Group, step: int) -> dict[str, float]:
    scalars = {"rate": -float(group["lr"]) * RESIDUAL_SCALE / LINEAR_UNIT}
    if group["momentum"]:
        momentum = float(group["momentum"])
        scalars["forget"] = 1.0 - momentum
        scalars["admit"] = 1.0 if step == 1 else 1.0 - float(group["dampening"])
        if group["nesterov"]:
            scalars["momentum"] = momentum
    if group["weight_decay"]:
        scalars["weight_decay"] = float(group["weight_decay"]) * LINEAR_UNIT
    return scalars


def _sgd(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, floor: float
) -> tuple[Slots, torch.Tensor]:
    """buf += admit*g - forget*buf; step = rate*(nesterov ? g + momentum*buf : buf)."""
    if group["weight_decay"]:
        g = g + weight * s["weight_decay"]
    if not group["momentum"]:
        return {}, g * s["rate"]
    buffer = slots["momentum_buffer"]
    buffer = buffer + (g * s["admit"] - buffer * s["forget"])
    direction = g + buffer * s["momentum"] if group["nesterov"] else buffer
    return {"momentum_buffer": buffer}, direction * s["rate"]


def _sgd_structure(group: Group) -> tuple[Any, ...]:
    return bool(group["momentum"]), bool(group["nesterov"]), bool(group["weight_decay"]), group["maximize"]


# -- Adam, AdamW


def _adam_slots(group: Group) -> tuple[Slot, ...]:
    first = Slot("exp_avg", 1, bias=lambda group, step: 1.0 - float(group["betas"][0]) ** step)
    second = Slot("exp_avg_sq", 2, SQUARE_RESIDUAL_SCALE, lambda group, step: _bias_sq(group, step))
    return (first, second, Slot("max_exp_avg_sq", 2)) if group["amsgrad"] else (first, second)


def _bias_sq(group: Group, step: int) -> float:
    return 1.0 - float(group["betas"][1]) ** step


def _adam_scalars(group: Group, step: int) -> dict[str, float]:
    """Bias correction is in the averaging weights: (1-b)/(1-b^t) instead of 1-b keeps averages corrected."""
    beta1, beta2 = map(float, group["betas"])
    scalars = {
        "rate": -float(group["lr"]) * RESIDUAL_SCALE,
        "forget": (1.0 - beta1) / (1.0 - beta1**step),
        "eps": float(group["eps"]) * EPSILON_SCALE,
        **square_scalars((1.0 - beta2) / (1.0 - beta2**step)),
    }
    if group["amsgrad"]:
        scalars["bias_sq"] = _bias_sq(group, step)
        scalars["unbias_root"] = 1.0 / math.sqrt(_bias_sq(group, step))
    if group["weight_decay"]:
        if _decoupled(group):
            scalars["decay"] = float(group["lr"]) * float(group["weight_decay"]) * RESIDUAL_SCALE
        else:
            scalars["weight_decay"] = float(group["weight_decay"]) * EPSILON_SCALE
    return scalars


def _adam(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, floor: float
) -> tuple[Slots, torch.Tensor]:
    """m += forget*(g-m); v += forget_sq*(g^2-v) in two terms; step = rate * m/(sqrt(v)+eps)."""
    decoupled = _decoupled(group)
    if not decoupled:
        g = coupled_decay(weight, g, s, unit, group)
    m = slots["exp_avg"]
    m = m + (g - m) * s["forget"]
    new = {"exp_avg": m}
    v = average_square(slots, "exp_avg_sq", g, s, new)
    root = torch.sqrt(v)
    if group["amsgrad"]:
        new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], v * s["bias_sq"])
        root = torch.sqrt(new["max_exp_avg_sq"]) * s["unbias_root"]
    eps = least_epsilon(s, unit, floor)
    bound = _ratio_bound(*map(float, group["betas"]))
    delta = torch.clamp(m / (root + eps), -bound, bound) * s["rate"]
    if decoupled and group["weight_decay"]:
        delta = delta - weight * s["decay"]
    return new, delta


def _ratio_bound(beta1: float, beta2: float) -> float:
    """A bound that |m|/sqrt(v) never exceeds in exact arithmetic (Cauchy-Schwarz), with a margin.

    It acts only where v left the range of fp16.
    """
    if beta1 * beta1 >= beta2:
        return 64.0
    return max(10.0, math.ceil(1.5 * (1 - beta1) / math.sqrt((1 - beta1 * beta1 / beta2) * (1 - beta2))))


def _decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _adam_structure(group: Group) -> tuple[Any, ...]:
    return bool(group["weight_decay"]), _decoupled(group), group["amsgrad"], group["maximize"]


_SGD_GATED = frozenset({"rate", "forget", "admit"})
_SGD = Rule(_sgd_slots, _sgd_scalars, _SGD_GATED, _sgd, _sgd_structure, False, lambda group, step: {})
_ADAM_GATED = frozenset({"rate", "forget", "forget_sq", "admit_sq", "bias_sq", "decay"})
_ADAM = Rule(_adam_slots, _adam_scalars, _ADAM_GATED, _adam, _adam_structure, calibrated=True)

#: Exact optimizer class -> rule. A subclass may override `step`, so it is not taken for its parent.
RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: _SGD,
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.Adamax: ADAMAX,
    torch.optim.NAdam: NADAM,
    torch.optim.RAdam: RADAM,
    torch.optim.RMSprop: RMSPROP,
    torch.optim.Adagrad: ADAGRAD,
    torch.optim.Adadelta: ADADELTA,
}


#: The optimizer runs on the host: no state and no scalars on the engine.
HOST = Rule(
    slots=lambda group: (),
    scalars=lambda group, step: {},
    gated=frozenset(),
    update=lambda weight, *rest: ({}, torch.zeros_like(weight)),
    structure=lambda group: (),
    calibrated=True,
    counters=lambda group, step: {},
)


def missing_rule(optimizer: torch.optim.Optimizer) -> str:
    """What of the optimizer has no rule, as the end of a sentence; empty if the engine can run it."""
    rule = RULES.get(type(optimizer))
    if rule is None:
        return "has no update rule for the engine"
    return "" if all(map(rule.takes, optimizer.param_groups)) else "has no update rule for its settings"


def rule_for(optimizer: torch.optim.Optimizer, on_host: bool = False) -> Rule:
    """The rule of an optimizer's class; HOST if it is to run there.

    Raises: UnsupportedModel naming the supported classes.
    """
    if on_host:
        return HOST
    reason = missing_rule(optimizer)
    if reason:
        names = ", ".join(f"torch.optim.{cls.__name__}" for cls in RULES)
        fix = f'Use one of {names}, or optimizer_on="host".'
        finding = Finding("optimizer", type(optimizer).__name__, f"{reason}.", fix)
        raise UnsupportedModel("The optimizer cannot run on the engine:", [finding])
    return RULES[type(optimizer)]
