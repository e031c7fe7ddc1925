"""Adamax, NAdam and RAdam as rules: Adam's relatives with a first moment and a measure of its size."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.rules import (
    EPSILON_SCALE,
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
_RATIO_BOUND = 64.0


def _bias(group: Group, step: int) -> float:
    return 1.0 - float(group["betas"][0]) ** step


def _bias_sq(group: Group, step: int) -> float:
    return 1.0 - float(group["betas"][1]) ** step


_FIRST = Slot("exp_avg", 1, bias=_bias)
_SECOND = Slot("exp_avg_sq", 2, SQUARE_RESIDUAL_SCALE, _bias_sq)


def _averages(group: Group, step: int) -> dict[str, float]:
    """Averaging weights that keep both moments corrected for their bias, and epsilon."""
    beta1, beta2 = map(float, group["betas"])
    return {
        "forget": (1.0 - beta1) / (1.0 - beta1**step),
        "eps": float(group["eps"]) * EPSILON_SCALE,
        **square_scalars((1.0 - beta2) / (1.0 - beta2**step)),
    }


def _decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _decay(group: Group) -> dict[str, float]:
    if group["weight_decay"] and _decoupled(group):
        return {"decay": float(group["lr"]) * float(group["weight_decay"]) * RESIDUAL_SCALE}
    return decay_scalar(group)


def _structure(group: Group) -> tuple[Any, ...]:
    return bool(group["weight_decay"]), _decoupled(group), group["maximize"]


def _moments(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, new: Slots
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(g with decay, first moment, root of the second moment); both moments also into `new`."""
    if not _decoupled(group):
        g = coupled_decay(weight, g, s, unit, group)
    m = slots["exp_avg"]
    new["exp_avg"] = m = m + (g - m) * s["forget"]
    return g, m, torch.sqrt(average_square(slots, "exp_avg_sq", g, s, new))


def _decayed(weight: torch.Tensor, delta: torch.Tensor, s: Slots, group: Group) -> torch.Tensor:
    return delta - weight * s["decay"] if group["weight_decay"] and _decoupled(group) else delta


# -- Adamax


def _adamax_scalars(group: Group, step: int) -> dict[str, float]:
    scalars = {"rate": -float(group["lr"]) * RESIDUAL_SCALE, "admit": 1.0}
    scalars["forget"] = _averages(group, step)["forget"]
    scalars["forget_peak"] = 1.0 - float(group["betas"][1])
    scalars["eps"] = float(group["eps"]) * EPSILON_SCALE
    return {**scalars, **_decay(group)}


def _adamax(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, floor: float
) -> tuple[Slots, torch.Tensor]:
    """m += forget*(g-m); u = max(u - forget_peak*u, |g|+eps); step = rate * m/u."""
    g = coupled_decay(weight, g, s, unit, group)
    m, peak = slots["exp_avg"], slots["exp_inf"]
    m = m + (g - m) * s["forget"]
    least = (g.abs() + least_epsilon(s, unit, floor)) * s["admit"]
    peak = torch.maximum(peak - peak * s["forget_peak"], least)
    delta = torch.clamp(m / peak, -_RATIO_BOUND, _RATIO_BOUND) * s["rate"]
    return {"exp_avg": m, "exp_inf": peak}, delta


# -- NAdam


@functools.lru_cache(maxsize=64)
def _mu_products(beta1: float, decay: float) -> list[float]:
    return [1.0]


def _mu(group: Group, step: int) -> float:
    shrunk: float = 0.96 ** (step * float(group["momentum_decay"]))
    return float(group["betas"][0]) * (1.0 - 0.5 * shrunk)


def _mu_product(group: Group, step: int) -> float:
    """The product of mu over steps 1 to `step`."""
    known = _mu_products(float(group["betas"][0]), float(group["momentum_decay"]))
    while len(known) <= step:
        known.append(known[-1] * _mu(group, len(known)))
    return float(known[step])


def _nadam_scalars(group: Group, step: int) -> dict[str, float]:
    following = _mu(group, step + 1)
    return {
        "rate": -float(group["lr"]) * RESIDUAL_SCALE,
        "gradient_share": (1.0 - _mu(group, step)) / (1.0 - _mu_product(group, step)),
        "moment_share": following * _bias(group, step) / (1.0 - _mu_product(group, step + 1)),
        **_averages(group, step),
        **_decay(group),
    }


def _nadam(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, floor: float
) -> tuple[Slots, torch.Tensor]:
    """step = rate * (gradient_share*g + moment_share*m) / (sqrt(v)+eps)."""
    new: Slots = {}
    g, m, root = _moments(weight, g, slots, s, unit, group, new)
    ratio = (g * s["gradient_share"] + m * s["moment_share"]) / (root + least_epsilon(s, unit, floor))
    bound = max(_RATIO_BOUND, math.ceil(2.0 / math.sqrt(1.0 - float(group["betas"][1]))))
    delta = torch.clamp(ratio, -bound, bound) * s["rate"]
    return new, _decayed(weight, delta, s, group)


def _nadam_counters(group: Group, step: int) -> dict[str, float]:
    return {"step": float(step), "mu_product": _mu_product(group, step)}


# -- RAdam


def _radam_scalars(group: Group, step: int) -> dict[str, float]:
    beta2, rate = float(group["betas"][1]), -float(group["lr"]) * RESIDUAL_SCALE
    infinite = 2.0 / (1.0 - beta2) - 1.0
    rho = infinite - 2.0 * step * beta2**step / (1.0 - beta2**step)
    rectified = rho > 5.0
    share = 0.0
    if rectified:
        share = math.sqrt((rho - 4) * (rho - 2) * infinite / ((infinite - 4) * (infinite - 2) * rho))
    scalars = {"rate": rate * share, "plain_rate": 0.0 if rectified else rate}
    scalars |= {**_averages(group, step), **_decay(group)}
    scalars["eps"] /= math.sqrt(_bias_sq(group, step))
    return scalars


def _radam(
    weight: torch.Tensor, g: torch.Tensor, slots: Slots, s: Slots, unit: float, group: Group, floor: float
) -> tuple[Slots, torch.Tensor]:
    """step = rate * m/(sqrt(v)+eps) + plain_rate * m; one of the rates is 0."""
    new: Slots = {}
    g, m, root = _moments(weight, g, slots, s, unit, group, new)
    ratio = torch.clamp(m / (root + least_epsilon(s, unit, floor)), -_RATIO_BOUND, _RATIO_BOUND)
    delta = ratio * s["rate"] + m * s["plain_rate"] * (1.0 / unit)
    return new, _decayed(weight, delta, s, group)


_GATED = frozenset({"rate", "forget", "forget_sq", "admit_sq", "decay"})
ADAMAX = Rule(
    lambda group: (_FIRST, Slot("exp_inf", 1)), _adamax_scalars,
    frozenset({"rate", "forget", "forget_peak", "admit"}), _adamax, _structure, calibrated=True,
)  # fmt: skip
NADAM = Rule(
    lambda group: (_FIRST, _SECOND), _nadam_scalars, _GATED, _nadam, _structure, True, _nadam_counters
)
RADAM = Rule(
    lambda group: (_FIRST, _SECOND), _radam_scalars, _GATED | {"plain_rate"}, _radam, _structure,
    calibrated=True,
)  # fmt: skip
