"""Adam, AdamW, LAMB, Adamax, NAdam and RAdam as rules: a first moment divided by a measure of its size."""

from __future__ import annotations

import functools
import math

import torch

from ane_trainer.ane.capture.optimizers.formulas import Traced, most, number, product, sqrt
from ane_trainer.ane.capture.optimizers.rule import (
    LEAST,
    RESIDUAL,
    RESIDUAL_SCALE,
    ROOT_FACTOR,
    SQUARE_RESIDUAL_SCALE,
    Group,
    Rule,
    Shape,
    Slot,
    Slots,
    Update,
    average,
    average_square,
    bounded,
    coupled_decay,
    decay_scalars,
    denominator,
    forgets_at_once,
    root_epsilon,
    root_mean_square,
    split,
    square_scalars,
    square_slot,
    step_rate,
    two_term_add,
    units_for,
)

#: Ratios beyond this come from denominators that left fp16.
_RATIO_BOUND = 64.0

# -- What the family shares


def _bias(group: Group, step: int) -> float:
    return 1.0 - number(group["betas"][0]) ** step


def _bias_sq(group: Group, step: int) -> float:
    return 1.0 - number(group["betas"][1]) ** step


_FIRST = Slot("exp_avg", 1, bias=_bias)
_SECOND = square_slot("exp_avg_sq", _bias_sq)


def _decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _moments(u: Update, new: Slots) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(g with decay, first moment, denominator); both moments also into `new`."""
    g = u.gradient if _decoupled(u.group) else coupled_decay(u)
    new["exp_avg"] = m = average(u.slots["exp_avg"], g, u.scalars["forget"])
    return g, m, denominator(u, average_square(u, "exp_avg_sq", g, new))


def _decayed(u: Update, delta: torch.Tensor) -> torch.Tensor:
    decay = u.group["weight_decay"] and _decoupled(u.group)
    return delta - u.weight * u.scalars["decay"] if decay else delta


def _averages(group: Group, step: int) -> dict[str, float]:
    """Averaging weights (1-b)/(1-b^t) instead of 1-b keep both moments corrected for their bias."""
    forget_sq = (1.0 - number(group["betas"][1])) / _bias_sq(group, step)
    return {"forget": (1.0 - number(group["betas"][0])) / _bias(group, step), **square_scalars(forget_sq)}


def _decay(group: Group) -> dict[str, float]:
    if not group["weight_decay"] or not _decoupled(group):
        return {}
    return {"decay": number(group["lr"]) * number(group["weight_decay"]) * RESIDUAL_SCALE}


def _unit_scalars(group: Group, step: int, unit: float) -> dict[str, float]:
    decay = {} if _decoupled(group) else decay_scalars(group, unit)
    return {"eps": root_epsilon(number(group["eps"]), unit), **decay}


def _unit_range(group: Group) -> tuple[float, float]:
    return units_for(number(group["eps"]))


def _compiled(group: Group) -> tuple[object, ...]:
    return bool(group["weight_decay"]), _decoupled(group), group.get("maximize"), forgets_at_once(group)


_GATED = frozenset({"rate", "forget", "forget_sq", "admit_sq", "decay"})

# -- Adam, AdamW


def _adam(u: Update) -> tuple[Slots, torch.Tensor]:
    """m += forget*(g-m); v += forget_sq*(g^2-v) in two terms; step = rate * m/(sqrt(v)+eps)."""
    new: Slots = {}
    _, m, below = _moments(u, new)
    if u.group["amsgrad"]:
        below = denominator(u, _largest_square(u, new))
    bound = _ratio_bound(*map(float, u.group["betas"])) / ROOT_FACTOR
    return new, _decayed(u, bounded(m / below, bound) * u.scalars["rate"])


def _largest_square(u: Update, new: Slots) -> torch.Tensor:
    """AMSGrad's maximum of second moments, kept in two terms and divided by the bias as they are.

    The uncorrected one stays when the bias grows, so the corrected one shrinks by `shrink` of itself a step.
    """
    name = "max_exp_avg_sq"
    kept, rest = u.slots[name], u.slots[f"{name}/{RESIDUAL}"]
    kept, rest = two_term_add(kept, rest, -kept * u.scalars["shrink"], SQUARE_RESIDUAL_SCALE)
    v = new["exp_avg_sq"]
    larger = v > kept
    new[name] = torch.where(larger, v, kept)
    new[f"{name}/{RESIDUAL}"] = torch.where(larger, new[f"exp_avg_sq/{RESIDUAL}"], rest)
    return new[name]


def _adam_slots(group: Group, shape: Shape) -> tuple[Slot, ...]:
    return (
        (_FIRST, _SECOND, square_slot("max_exp_avg_sq", _bias_sq)) if group["amsgrad"] else (_FIRST, _SECOND)
    )


def _adam_scalars(group: Group, step: int) -> dict[str, float]:
    scalars = {"rate": step_rate(group) * ROOT_FACTOR, **_averages(group, step), **_decay(group)}
    if group["amsgrad"]:
        shrink = 1.0 - _bias_sq(group, step - 1) / _bias_sq(group, step)
        scalars["shrink"] = shrink * SQUARE_RESIDUAL_SCALE
    return scalars


def _ratio_bound(beta1: float, beta2: float) -> float:
    """A bound that |m|/sqrt(v) never exceeds in exact arithmetic (Cauchy-Schwarz), with a margin.

    It acts only where v left the range of fp16.
    """
    if beta1 * beta1 >= beta2:
        return 64.0
    return max(10.0, math.ceil(1.5 * (1 - beta1) / sqrt((1 - beta1 * beta1 / beta2) * (1 - beta2))))


ADAM = Rule(
    update=_adam,
    slots=_adam_slots,
    scalars=_adam_scalars,
    unit_scalars=_unit_scalars,
    unit_range=_unit_range,
    gated=_GATED | {"shrink"},
    compiled=lambda group: (*_compiled(group), group["amsgrad"]),
)

# -- LAMB


def _lamb(u: Update) -> tuple[Slots, torch.Tensor]:
    """direction = m/(sqrt(v)+eps) + weight_decay*w; step = rate * |w|/|direction| * direction."""
    new: Slots = {}
    m = new["exp_avg"] = average(u.slots["exp_avg"], u.gradient, u.scalars["forget"])
    below = denominator(u, average_square(u, "exp_avg_sq", u.gradient, new))
    ratio = bounded(m / below, _RATIO_BOUND / ROOT_FACTOR)
    direction = ratio * u.scalars["correction"]
    if u.group["weight_decay"] and not _decoupled(u.group):
        direction = direction + u.weight * u.scalars["weight_decay"]
    weight, length = root_mean_square(u.weight), root_mean_square(direction)
    if u.group["weight_decay"] and _decoupled(u.group):  # the norm is that of the decayed weight
        weight = weight - weight * (u.scalars["decay"] * (1.0 / RESIDUAL_SCALE))
    if "largest_norm" in u.group:
        weight = torch.clamp(weight, max=float(u.group["largest_norm"]) / sqrt(u.weight.numel()))
    trust = weight / torch.clamp(length, min=LEAST)
    trust = torch.where((weight > 0) & (length > 0), trust, torch.ones_like(trust))
    return new, _decayed(u, direction * (trust * u.scalars["rate"]).reshape(1))


def _corrected(group: Group) -> bool:
    return bool(group.get("bias_correction", True))


def _lamb_scalars(group: Group, step: int) -> dict[str, float]:
    """Our moments are corrected for their bias; the paper's third version takes them as they are."""
    correction = 1.0 if _corrected(group) else _bias(group, step) / sqrt(_bias_sq(group, step))
    rate = step_rate(group) / (_bias(group, step) if group.get("corrected_rate") else 1.0)
    scalars = {
        "rate": rate,
        "correction": correction * ROOT_FACTOR,
        **_averages(group, step),
        **_decay(group),
    }
    if group["weight_decay"] and not _decoupled(group):
        scalars["weight_decay"] = number(group["weight_decay"])
    return scalars


def _lamb_unit_scalars(group: Group, step: int, unit: float) -> dict[str, float]:
    epsilon = number(group["eps"]) / (1.0 if _corrected(group) else sqrt(_bias_sq(group, step)))
    return {"eps": root_epsilon(epsilon, unit)}


LAMB = Rule(
    update=_lamb,
    slots=lambda group, shape: (_FIRST, _SECOND),
    scalars=_lamb_scalars,
    unit_scalars=_lamb_unit_scalars,
    unit_range=_unit_range,
    gated=_GATED,
    compiled=lambda group: (*_compiled(group), _corrected(group), group.get("largest_norm")),
)

# -- Adamax: the peak in two terms, since it shrinks by a thousandth a step

_PEAK_SCALE = 256.0
_PEAK_RESIDUAL = f"exp_inf/{RESIDUAL}"


def _adamax(u: Update) -> tuple[Slots, torch.Tensor]:
    """m += forget*(g-m); peak = max(peak - forget_peak*peak, |g|+eps); step = rate * m/peak."""
    s, g = u.scalars, coupled_decay(u)
    m, peak, rest = average(u.slots["exp_avg"], g, s["forget"]), u.slots["exp_inf"], u.slots[_PEAK_RESIDUAL]
    peak, rest = two_term_add(peak, rest, -peak * s["forget_peak"], _PEAK_SCALE)
    least = (g.abs() + s["eps"]) * s["admit"]
    larger = least > peak
    peak = torch.maximum(peak, least)
    new = {"exp_avg": m, "exp_inf": peak, _PEAK_RESIDUAL: torch.where(larger, torch.zeros_like(rest), rest)}
    return new, bounded(m / peak, _RATIO_BOUND) * s["rate"]


ADAMAX = Rule(
    update=_adamax,
    slots=lambda group, shape: (_FIRST, Slot("exp_inf", 1, _PEAK_SCALE)),
    scalars=lambda group, step: {
        "rate": step_rate(group),
        "admit": 1.0,
        "forget": _averages(group, step)["forget"],
        "forget_peak": (1.0 - number(group["betas"][1])) * _PEAK_SCALE,
    },
    unit_scalars=lambda group, step, unit: {
        "eps": most(number(group["eps"]) * unit, LEAST),
        **decay_scalars(group, unit),
    },
    unit_range=_unit_range,
    gated=frozenset({"rate", "forget", "forget_peak", "admit"}),
    compiled=_compiled,
)

# -- NAdam


@functools.lru_cache(maxsize=64)
def _mu_products(beta1: float, decay: float) -> list[float]:
    return [1.0]


def _mu(group: Group, step: int) -> float:
    shrunk: float = 0.96 ** (step * number(group["momentum_decay"]))
    return number(group["betas"][0]) * (1.0 - 0.5 * shrunk)


def _mu_product(group: Group, step: int) -> float:
    """The product of mu over steps 1 to `step`."""
    if isinstance(step, Traced):
        return product(lambda i: _mu(group, i), step)
    known = _mu_products(number(group["betas"][0]), number(group["momentum_decay"]))
    while len(known) <= step:
        known.append(known[-1] * _mu(group, len(known)))
    return known[step]


def _nadam_scalars(group: Group, step: int) -> dict[str, float]:
    share = _mu(group, step + 1) * _bias(group, step) / (1.0 - _mu_product(group, step + 1))
    return {
        "rate": step_rate(group) * ROOT_FACTOR,
        "gradient_share": (1.0 - _mu(group, step)) / (1.0 - _mu_product(group, step)),
        "moment_share": share,
        **_averages(group, step),
        **_decay(group),
    }


def _nadam(u: Update) -> tuple[Slots, torch.Tensor]:
    """step = rate * (gradient_share*g + moment_share*m) / (sqrt(v)+eps)."""
    new: Slots = {}
    g, m, below = _moments(u, new)
    ratio = (g * u.scalars["gradient_share"] + m * u.scalars["moment_share"]) / below
    bound = max(_RATIO_BOUND, math.ceil(2.0 / sqrt(1.0 - float(u.group["betas"][1])))) / ROOT_FACTOR
    return new, _decayed(u, bounded(ratio, bound) * u.scalars["rate"])


NADAM = Rule(
    update=_nadam,
    slots=lambda group, shape: (_FIRST, _SECOND),
    scalars=_nadam_scalars,
    unit_scalars=_unit_scalars,
    unit_range=_unit_range,
    gated=_GATED,
    compiled=_compiled,
    counters=lambda group, step: {"step": float(step), "mu_product": _mu_product(group, step)},
)

# -- RAdam


def _radam_rates(group: Group, step: int) -> tuple[float, float]:
    """(rate of m/sqrt(v), rate of m); one of them is 0."""
    beta2 = number(group["betas"][1])
    infinite = 2.0 / (1.0 - beta2) - 1.0
    rho = infinite - 2.0 * step * beta2**step / (1.0 - beta2**step)
    if rho <= 5.0:
        return 0.0, step_rate(group)
    share = sqrt((rho - 4) * (rho - 2) * infinite / ((infinite - 4) * (infinite - 2) * rho))
    return step_rate(group) * share, 0.0


def _radam_unit_scalars(group: Group, step: int, unit: float) -> dict[str, float]:
    scalars = _unit_scalars(group, step, unit)
    epsilon = scalars["eps"] / sqrt(_bias_sq(group, step))
    plain, power = split(_radam_rates(group, step)[1] / unit)
    return {**scalars, "eps": epsilon, "plain_rate": plain, "plain_power": power}


def _radam(u: Update) -> tuple[Slots, torch.Tensor]:
    """step = rate * m/(sqrt(v)+eps) + plain_rate * m; one of the rates is 0."""
    new: Slots = {}
    _, m, below = _moments(u, new)
    ratio = bounded(m / below, _RATIO_BOUND / ROOT_FACTOR)
    return new, _decayed(
        u, ratio * u.scalars["rate"] + (m * u.scalars["plain_rate"]) * u.scalars["plain_power"]
    )


RADAM = Rule(
    update=_radam,
    slots=lambda group, shape: (_FIRST, _SECOND),
    scalars=lambda group, step: {
        "rate": _radam_rates(group, step)[0] * ROOT_FACTOR,
        **_averages(group, step),
        **_decay(group),
    },
    unit_scalars=_radam_unit_scalars,
    unit_range=_unit_range,
    gated=_GATED | {"plain_rate"},
    compiled=_compiled,
)
