"""The optimizers' update rules in torch ops that survive half precision, one small pure function each.

Units. A gradient arrives as `g = unit * gradient` (`unit` a power of two, fixed for a parameter); first
moments are in that unit, second moments in its square. A weight is two fp16 numbers, `hi` (what the
forward uses) and `lo` = 2^10 times what `hi` lacks; steps are computed in the scale of `lo`. Second moments
are kept in the same form (scale 2^5), since they change by a thousandth a step.

Every change is an increment times a *gated* scalar, which the step sets to 0 when the gradients
overflowed: a skipped step changes nothing and costs nothing. All scalars come from the host
(`scalars.py`), which knows the step count and does their arithmetic in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ane_trainer.ane.errors import Finding, UnsupportedModel

Slots = dict[str, torch.Tensor]
Group = Mapping[str, Any]

#: What a weight's `lo` is multiplied by; the residual of an 11-bit significand then has the weight's size.
RESIDUAL_SCALE = 1024.0
#: The same for second moments: smaller, because their first steps are as large as they are.
SQUARE_RESIDUAL_SCALE = 32.0
#: Suffix of the slot that holds the residual of a two-term state.
RESIDUAL = "residual"
#: Unit of gradients where only sums of them are kept: 2^-32 ... 256 in fp16.
LINEAR_UNIT = 256.0
#: Scale of epsilon on its way from the host, so that 1e-8 is a normal fp16 number.
EPSILON_SCALE = 2.0**14
#: Least denominator under a first moment, in gradient units, by the program's precision: in fp16 the squares
#: of anything smaller underflow; fp32 needs none, and with one Adam's losses leave PyTorch's by 3e-5.
ROOT_FLOORS = {"fp16": 2.0**-14, "fp32": 0.0}


@dataclass(frozen=True)
class Slot:
    """One state tensor of a parameter: torch's name for it and the power of `unit` in it.

    `residual_scale` is that of its second term, 0 if it has none. `bias(group, step)` is torch's value after
    `step` updates divided by ours: Adam's moments are kept corrected for their bias, since in the first steps
    the uncorrected ones are a thousand times smaller and would underflow.
    """

    name: str
    power: int
    residual_scale: float = 0.0
    bias: Callable[[Group, int], float] = lambda group, step: 1.0


@dataclass(frozen=True)
class Rule:
    """How one optimizer class updates a parameter.

    `slots(group)`: its state tensors. `scalars(group, step)`: the host's values for update number `step`
    (1 for the first). `gated`: the scalars that are 0 on a skipped step. `update(weight, g, slots, scalars,
    unit, group, floor)` -> (new slots, step of the weight times RESIDUAL_SCALE); `floor` is the least
    denominator under a first moment (`ROOT_FLOORS`). `structure(group)`: settings that
    are compiled in. `calibrated`: the unit is chosen per parameter from example gradients.
    """

    slots: Callable[[Group], tuple[Slot, ...]]
    scalars: Callable[[Group, int], dict[str, float]]
    gated: frozenset[str]
    update: Callable[..., tuple[Slots, torch.Tensor]]
    structure: Callable[[Group], tuple[Any, ...]]
    calibrated: bool


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
    forget_sq = (1.0 - beta2) / (1.0 - beta2**step) * SQUARE_RESIDUAL_SCALE
    scalars = {
        "rate": -float(group["lr"]) * RESIDUAL_SCALE,
        "forget": (1.0 - beta1) / (1.0 - beta1**step),
        "forget_sq": forget_sq,
        "admit_sq": math.sqrt(forget_sq),
        "eps": float(group["eps"]) * EPSILON_SCALE,
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
    decay = bool(group["weight_decay"])
    if decay and not _decoupled(group):
        g = g + weight * (s["weight_decay"] * (unit / EPSILON_SCALE))
    m, v = slots["exp_avg"], slots["exp_avg_sq"]
    m = m + (g - m) * s["forget"]
    root_g = g * s["admit_sq"]
    change = root_g * root_g - v * s["forget_sq"]
    v, v_lo = two_term_add(v, slots["exp_avg_sq/residual"], change, SQUARE_RESIDUAL_SCALE)
    new = {"exp_avg": m, "exp_avg_sq": v, "exp_avg_sq/residual": v_lo}
    root = torch.sqrt(v)
    if group["amsgrad"]:
        new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], v * s["bias_sq"])
        root = torch.sqrt(new["max_exp_avg_sq"]) * s["unbias_root"]
    eps = torch.clamp(s["eps"] * (unit / EPSILON_SCALE), min=floor)
    bound = _ratio_bound(*map(float, group["betas"]))
    delta = torch.clamp(m / (root + eps), -bound, bound) * s["rate"]
    if decay and _decoupled(group):
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
_SGD = Rule(_sgd_slots, _sgd_scalars, _SGD_GATED, _sgd, _sgd_structure, calibrated=False)
_ADAM_GATED = frozenset({"rate", "forget", "forget_sq", "admit_sq", "bias_sq", "decay"})
_ADAM = Rule(_adam_slots, _adam_scalars, _ADAM_GATED, _adam, _adam_structure, calibrated=True)

#: Exact optimizer class -> rule. A subclass may override `step`, so it is not taken for its parent.
RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: _SGD,
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}


def rule_for(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule of an optimizer's class.

    Raises: UnsupportedModel naming the supported classes.
    """
    rule = RULES.get(type(optimizer))
    if rule is None:
        names = ", ".join(f"torch.optim.{cls.__name__}" for cls in RULES)
        reason = "has no update rule for the engine."
        finding = Finding("optimizer", type(optimizer).__name__, reason, f"Use one of {names}.")
        raise UnsupportedModel("The optimizer cannot run on the engine:", [finding])
    return rule


def two_term_add(
    hi: torch.Tensor, lo: torch.Tensor, delta: torch.Tensor, scale: float = RESIDUAL_SCALE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hi + lo/scale) + delta/scale as a new pair; what rounding drops from hi stays in lo."""
    total = lo + delta
    new_hi = hi + total * (1.0 / scale)
    return new_hi, total - (new_hi - hi) * scale
