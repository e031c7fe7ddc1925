"""The optimizers' update rules in torch ops that survive half precision, one small pure function each.

Units. A gradient arrives as `g = unit * gradient` (`unit` a power of two, fixed for a parameter); first
moments are in that unit, second moments in its square. A weight is two fp16 numbers, `hi` (what the
forward uses) and `lo` = 2^10 times what `hi` lacks; steps are computed in the scale of `lo`. Second moments
are kept in the same two-term form, since they change by a thousandth a step.

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

#: What `lo` is multiplied by; the residual of an 11-bit significand then has the weight's own magnitude.
RESIDUAL_SCALE = 1024.0
#: Suffix of the slot that holds the residual of a two-term state.
RESIDUAL = "residual"
#: Unit of gradients where only sums of them are kept: 2^-32 ... 256 in fp16.
LINEAR_UNIT = 256.0
#: Scale of epsilon on its way from the host, so that 1e-8 is a normal fp16 number.
EPSILON_SCALE = 2.0**14
#: Below this, in gradient units, a root mean square is lost in fp16's underflow; added to the denominator.
ROOT_FLOOR = 2.0**-12


@dataclass(frozen=True)
class Slot:
    """One state tensor of a parameter: torch's name for it, the power of `unit` in it, two-term or not."""

    name: str
    power: int
    two_term: bool = False


@dataclass(frozen=True)
class Rule:
    """How one optimizer class updates a parameter.

    `slots(group)`: its state tensors. `scalars(group, step)`: the host's values for update number `step`
    (1 for the first). `gated`: the scalars that are 0 on a skipped step. `update(weight, g, slots, scalars,
    unit, group)` -> (new slots, step of the weight times RESIDUAL_SCALE). `structure(group)`: settings that
    are compiled in. `calibrated`: the unit is chosen per parameter from example gradients.
    """

    slots: Callable[[Group], tuple[Slot, ...]]
    scalars: Callable[[Group, int], dict[str, float]]
    gated: frozenset[str]
    update: Callable[..., tuple[Slots, torch.Tensor]]
    structure: Callable[[Group], tuple[Any, ...]]
    calibrated: bool


# -- SGD ------------------------------------------------------------------------------------------------------


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
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group
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


# -- Adam, AdamW ----------------------------------------------------------------------------------------------


def _adam_slots(group: Group) -> tuple[Slot, ...]:
    slots = (Slot("exp_avg", 1), Slot("exp_avg_sq", 2, two_term=True))
    return (*slots, Slot("max_exp_avg_sq", 2)) if group["amsgrad"] else slots


def _adam_scalars(group: Group, step: int) -> dict[str, float]:
    """step_size and eps absorb both bias corrections: m/bc1 / (sqrt(v/bc2)+eps) * lr."""
    beta1, beta2 = map(float, group["betas"])
    root = math.sqrt(1.0 - beta2**step)
    scalars = {
        "rate": -float(group["lr"]) * root / (1.0 - beta1**step) * RESIDUAL_SCALE,
        "forget": 1.0 - beta1,
        "forget_sq": (1.0 - beta2) * RESIDUAL_SCALE,
        "admit_sq": math.sqrt((1.0 - beta2) * RESIDUAL_SCALE),
        "eps": float(group["eps"]) * root * EPSILON_SCALE,
    }
    if group["weight_decay"]:
        if _decoupled(group):
            scalars["decay"] = float(group["lr"]) * float(group["weight_decay"]) * RESIDUAL_SCALE
        else:
            scalars["weight_decay"] = float(group["weight_decay"]) * EPSILON_SCALE
    return scalars


def _adam(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group
) -> tuple[Slots, torch.Tensor]:
    """m += forget*(g-m); v += (1-b2)*(g^2-v) in two terms; step = rate * m/(sqrt(v)+eps)."""
    decay = bool(group["weight_decay"])
    if decay and not _decoupled(group):
        g = g + weight * (s["weight_decay"] * (unit / EPSILON_SCALE))
    m, v = slots["exp_avg"], slots["exp_avg_sq"]
    m = m + (g - m) * s["forget"]
    root_g = g * s["admit_sq"]
    new_v, new_v_lo = two_term_add(v, slots["exp_avg_sq/residual"], root_g * root_g - v * s["forget_sq"])
    new = {"exp_avg": m, "exp_avg_sq": new_v, "exp_avg_sq/residual": new_v_lo}
    seen_v = new_v
    if group["amsgrad"]:
        seen_v = new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], new_v)
    eps = torch.clamp(s["eps"] * (unit / EPSILON_SCALE), min=ROOT_FLOOR)
    ratio = m / (torch.sqrt(seen_v) + eps)
    bound = _ratio_bound(*map(float, group["betas"]))
    delta = torch.clamp(ratio, -bound, bound) * s["rate"]
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


_ADAM = Rule(
    _adam_slots, _adam_scalars, frozenset({"rate", "forget", "forget_sq", "admit_sq", "decay"}), _adam,
    _adam_structure, calibrated=True,
)  # fmt: skip

#: Exact optimizer class -> rule. A subclass may override `step`, so it is not taken for its parent.
RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: Rule(
        _sgd_slots,
        _sgd_scalars,
        frozenset({"rate", "forget", "admit"}),
        _sgd,
        _sgd_structure,
        calibrated=False,
    ),
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
        finding = Finding(
            "optimizer",
            type(optimizer).__name__,
            "has no update rule for the engine.",
            f"Use one of {names}.",
        )
        raise UnsupportedModel("The optimizer cannot run on the engine:", [finding])
    return rule


def two_term_add(
    hi: torch.Tensor, lo: torch.Tensor, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hi + lo/S) + delta/S as a new pair, S = RESIDUAL_SCALE; what rounding drops from hi stays in lo."""
    total = lo + delta
    new_hi = hi + total * (1.0 / RESIDUAL_SCALE)
    return new_hi, total - (new_hi - hi) * RESIDUAL_SCALE
