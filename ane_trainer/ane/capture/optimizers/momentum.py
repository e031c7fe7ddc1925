"""SGD, Lion and Muon as rules: directions made of one average of gradients."""

from __future__ import annotations

import math

import torch

from ane_trainer.ane.capture.optimizers.formulas import number, sqrt
from ane_trainer.ane.capture.optimizers.rule import (
    LEAST,
    RESIDUAL_SCALE,
    Group,
    Rule,
    Shape,
    Slot,
    Slots,
    Update,
    average,
    decay_scalars,
    root_mean_square,
    step_rate,
)

# -- SGD


def _sgd(u: Update) -> tuple[Slots, torch.Tensor]:
    """buf += admit*g - forget*buf; step = rate*(nesterov ? g + momentum*buf : buf)."""
    s, g = u.scalars, u.gradient
    if u.group["weight_decay"]:
        g = g + u.weight * s["weight_decay"]
    if not u.group["momentum"]:
        return {}, g * s["rate"]
    buffer = u.slots["momentum_buffer"]
    buffer = buffer + (g * s["admit"] - buffer * s["forget"])
    direction = g + buffer * s["momentum"] if u.group["nesterov"] else buffer
    return {"momentum_buffer": buffer}, direction * s["rate"]


def _sgd_scalars(group: Group, step: int) -> dict[str, float]:
    if not group["momentum"]:
        return {}
    momentum = number(group["momentum"])
    admit = 1.0 if step == 1 else 1.0 - number(group["dampening"])
    scalars = {"forget": 1.0 - momentum, "admit": admit}
    return {**scalars, "momentum": momentum} if group["nesterov"] else scalars


def _sgd_units(group: Group) -> tuple[float, float]:
    """Units whose rate is a normal fp16 number, with a margin."""
    rate = abs(step_rate(group))
    return rate * 2.0**-15, max(rate * 2.0**13, 1.0)


SGD = Rule(
    update=_sgd,
    slots=lambda group, shape: (Slot("momentum_buffer", 1),) if group["momentum"] else (),
    scalars=_sgd_scalars,
    unit_scalars=lambda group, step, unit: {
        "rate": step_rate(group) / unit,
        **decay_scalars(group, unit),
    },
    unit_range=_sgd_units,
    gated=frozenset({"rate", "forget", "admit"}),
    compiled=lambda group: (
        bool(group["momentum"]), bool(group["nesterov"]), bool(group["weight_decay"]), group["maximize"],
    ),
    counters=lambda group, step: {},
)  # fmt: skip


# -- Lion


def _decayed(u: Update, delta: torch.Tensor) -> torch.Tensor:
    """Decoupled weight decay: the port `decay` is lr * weight_decay."""
    return delta - u.weight * u.scalars["decay"] if u.group["weight_decay"] else delta


def _decay(group: Group) -> dict[str, float]:
    if not group["weight_decay"]:
        return {}
    return {"decay": number(group["lr"]) * number(group["weight_decay"]) * RESIDUAL_SCALE}


def _lion(u: Update) -> tuple[Slots, torch.Tensor]:
    """step = rate * sign(m + share*(g-m)) - decay*w; m += forget*(g-m)."""
    m, s = u.slots["exp_avg"], u.scalars
    difference = u.gradient - m
    direction = torch.sign(m + difference * s["share"])
    return {"exp_avg": m + difference * s["forget"]}, _decayed(u, direction * s["rate"])


def _lion_scalars(group: Group, step: int) -> dict[str, float]:
    beta1, beta2 = map(float, group["betas"])
    return {"rate": step_rate(group), "share": 1.0 - beta1, "forget": 1.0 - beta2, **_decay(group)}


LION = Rule(
    update=_lion,
    slots=lambda group, shape: (Slot("exp_avg", 1),),
    scalars=_lion_scalars,
    gated=frozenset({"rate", "forget", "decay"}),
    compiled=lambda group: (bool(group["weight_decay"]), group.get("maximize")),
    counters=lambda group, step: {},
)


# -- Muon


def _muon(u: Update) -> tuple[Slots, torch.Tensor]:
    """m += forget*(g-m); step = rate * shape's ratio * orthogonal(g + momentum*(m-g)) - decay*w."""
    s, g = u.scalars, u.gradient
    m = average(u.slots["momentum_buffer"], g, s["forget"])
    direction = average(g, m, s["momentum"]) if u.group["nesterov"] else m
    steps, factors = int(u.group["ns_steps"]), tuple(map(float, u.group["ns_coefficients"]))
    result, power = orthogonal(direction, factors, steps)
    ratio = _shape_ratio(u.group["adjust_lr_fn"], *u.weight.shape) * 2.0**-power
    return {"momentum_buffer": m}, _decayed(u, result * (s["rate"] * ratio))


def orthogonal(x: torch.Tensor, factors: tuple[float, ...], steps: int) -> tuple[torch.Tensor, int]:
    """(x with all singular values near 1 by Newton-Schulz iteration, times 2^power; power), torch.optim's Muon.

    The power brings entries near 1, since products below 2^-17 vanish: with rows of length n they are 1/sqrt(n).
    """
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    a, b, c = factors
    rows, columns = x.shape
    power = max(0, round(math.log2(columns) / 2) - 1)
    size = 2.0**power / sqrt(rows * columns)  # of an entry, the Frobenius norm being 1
    least = torch.clamp(root_mean_square(x), min=LEAST).reshape(1, 1)
    x = (x / least) * size
    for _ in range(steps):
        gram = (x @ x.T) * 4.0**-power
        x = x * a + (gram * b + (gram @ gram) * c) @ x
    return x.T if tall else x, power


def _shape_ratio(kind: str | None, rows: int, columns: int) -> float:
    if kind == "match_rms_adamw":
        return 0.2 * sqrt(max(rows, columns))
    return sqrt(max(1.0, rows / columns))


def _muon_compiled(group: Group) -> tuple[object, ...]:
    factors = tuple(map(float, group["ns_coefficients"]))
    return bool(group["weight_decay"]), group["nesterov"], factors, group["ns_steps"], group["adjust_lr_fn"]


def _muon_slots(group: Group, shape: Shape) -> tuple[Slot, ...]:
    return (Slot("momentum_buffer", 1),)


MUON = Rule(
    update=_muon,
    slots=_muon_slots,
    scalars=lambda group, step: {
        "rate": step_rate(group),
        "forget": 1.0 - number(group["momentum"]),
        "momentum": number(group["momentum"]),
        **_decay(group),
    },
    gated=frozenset({"rate", "forget", "decay"}),
    compiled=_muon_compiled,
    counters=lambda group, step: {},
)
