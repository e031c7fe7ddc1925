"""What an optimizer's rule is: its state, the host's scalars, and the update in torch ops that survive fp16.

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
    """One state tensor of a parameter: torch's name for it and the power of `unit` in it, times `factor`.

    `residual_scale` is that of its second term, 0 if it has none. `bias(group, step)` is torch's value after
    `step` updates divided by ours: Adam's moments are kept corrected for their bias, since in the first steps
    the uncorrected ones are a thousand times smaller and would underflow.
    """

    name: str
    power: int
    residual_scale: float = 0.0
    bias: Callable[[Group, int], float] = lambda group, step: 1.0
    factor: float = 1.0


@dataclass(frozen=True)
class Rule:
    """How one optimizer class updates a parameter.

    `slots(group)`: its state tensors. `scalars(group, step)`: the host's values for update number `step`
    (1 for the first). `gated`: the scalars that are 0 on a skipped step. `update(weight, g, slots, scalars,
    unit, group, floor)` -> (new slots, step of the weight times RESIDUAL_SCALE); `floor` is the least
    denominator under a first moment (`ROOT_FLOORS`). `structure(group)`: settings that
    are compiled in. `calibrated`: the unit is chosen per parameter from example gradients.
    `counters(group, step)`: torch's numbers in a parameter's state after `step` updates. `takes(group)`:
    whether the rule covers the group's settings.
    """

    slots: Callable[[Group], tuple[Slot, ...]]
    scalars: Callable[[Group, int], dict[str, float]]
    gated: frozenset[str]
    update: Callable[..., tuple[Slots, torch.Tensor]]
    structure: Callable[[Group], tuple[Any, ...]]
    calibrated: bool
    counters: Callable[[Group, int], dict[str, float]] = lambda group, step: {"step": float(step)}
    takes: Callable[[Group], bool] = lambda group: True


def two_term_add(
    hi: torch.Tensor, lo: torch.Tensor, delta: torch.Tensor, scale: float = RESIDUAL_SCALE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hi + lo/scale) + delta/scale as a new pair; what rounding drops from hi stays in lo."""
    total = lo + delta
    new_hi = hi + total * (1.0 / scale)
    return new_hi, total - (new_hi - hi) * scale


def coupled_decay(
    weight: torch.Tensor, g: torch.Tensor, scalars: Slots, unit: float, group: Group
) -> torch.Tensor:
    """g + weight_decay * weight in the gradient's unit; the port `weight_decay` comes times EPSILON_SCALE."""
    if not group["weight_decay"]:
        return g
    return g + weight * (scalars["weight_decay"] * (unit / EPSILON_SCALE))


def least_epsilon(scalars: Slots, unit: float, floor: float) -> torch.Tensor:
    """Epsilon in the gradient's unit, `floor` at least; the port `eps` comes times EPSILON_SCALE."""
    return torch.clamp(scalars["eps"] * (unit / EPSILON_SCALE), min=floor)


def average_square(slots: Slots, name: str, g: torch.Tensor, s: Slots, new: Slots) -> torch.Tensor:
    """v += forget_sq * (g^2 - v) in two terms, into `new`; returns v. The ports: see `square_scalars`."""
    v = slots[name]
    root_g = g * s["admit_sq"]
    change = root_g * root_g - v * s["forget_sq"]
    v, new[f"{name}/{RESIDUAL}"] = two_term_add(v, slots[f"{name}/{RESIDUAL}"], change, SQUARE_RESIDUAL_SCALE)
    new[name] = v
    return v


def square_scalars(forget: float) -> dict[str, float]:
    """The ports of `average_square`: the share of the new square, and its root."""
    scaled = forget * SQUARE_RESIDUAL_SCALE
    return {"forget_sq": scaled, "admit_sq": math.sqrt(scaled)}


def decay_scalar(group: Group) -> dict[str, float]:
    """The port of `coupled_decay`, if there is weight decay."""
    return {"weight_decay": float(group["weight_decay"]) * EPSILON_SCALE} if group["weight_decay"] else {}
