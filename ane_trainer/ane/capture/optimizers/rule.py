"""`Rule`, the form of an optimizer's rule, and the arithmetic that rules share.

Units. A gradient arrives as `unit * gradient`, `unit` a power of two of each parameter that the host chooses so
that the largest entry is near 16. First moments are kept in that unit, second moments in its square times
SQUARE_FACTOR. A weight is two fp16 numbers, `hi` (what the forward uses) and `lo` = 2^10 times what `hi` lacks;
steps are computed in the scale of `lo`. Second moments are kept in the same form, since they change by a
thousandth a step.

Every change is an increment times a *gated* scalar, which the step sets to 0 when the gradients overflowed: a
skipped step changes nothing and costs nothing. Scalars come from the host (`table.py`), which knows step count and
units and does their arithmetic in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.formulas import least, number, power_above, sqrt

Slots = dict[str, torch.Tensor]
Group = Mapping[str, Any]
Shape = tuple[int, ...]

#: What a weight's `lo` is multiplied by; the residual of an 11-bit significand then has the weight's size.
RESIDUAL_SCALE = 1024.0
#: Second moments are kept times this, so that those of entries 1e-4 of the largest are normal fp16 numbers.
SQUARE_FACTOR = 16.0
#: Their roots then come out times this.
ROOT_FACTOR = 4.0
#: The second term of second moments: twice what the first lacks, since their first steps are as large as they are.
SQUARE_RESIDUAL_SCALE = 2.0
#: Suffix of the slot that holds the residual of a two-term state.
RESIDUAL = "residual"
#: Least denominator that is the root of second moments, by the program's precision: in fp16 the root of the smallest
#: number, which stands for all that underflow; fp32 needs none.
LEAST_ROOTS = {"fp16": 2.0**-12, "fp32": 0.0}
#: Least denominator where the largest entry or the norm of a tensor is one: fp16's smallest number.
LEAST = 2.0**-24
_LARGEST_SUM = 2.0**15
#: Squares of which no more than this is kept are forgotten at once.
_SHORT = 2.0**-5
#: Momentum sums gradients, so they end well below fp16's range.
_LARGEST_GRADIENT = 2.0**11


@dataclass(frozen=True)
class Slot:
    """One state tensor of a parameter: torch's name for it, the power of the unit in it, times `factor`.

    `residual_scale` is that of its second term, 0 if it has none. `bias(group, step)` is torch's value after
    `step` updates divided by ours: Adam's moments are kept corrected for their bias, since in the first steps
    the uncorrected ones are a thousand times smaller and would underflow. `shape`: None if the parameter's.
    """

    name: str
    power: int
    residual_scale: float = 0.0
    bias: Callable[[Group, int], float] = lambda group, step: 1.0
    factor: float = 1.0
    shape: Shape | None = None


def square_slot(
    name: str, bias: Callable[[Group, int], float] | None = None, shape: Shape | None = None
) -> Slot:
    """A mean of squared gradients in two terms, as `average_square` updates it."""
    return Slot(name, 2, SQUARE_RESIDUAL_SCALE, bias or (lambda group, step: 1.0), SQUARE_FACTOR, shape)


@dataclass(frozen=True)
class Update:
    """One parameter at its update: weight (`hi`), gradient in its unit, state and scalars by name, settings.

    `least`: the least root of second moments, of LEAST_ROOTS.
    """

    weight: torch.Tensor
    gradient: torch.Tensor
    slots: Slots
    scalars: Slots
    group: Group
    least: float = 0.0


@dataclass(frozen=True)
class Rule:
    """How one optimizer class updates a parameter.

    update        Update -> (new slots, step of the weight times RESIDUAL_SCALE), a function of nothing else, which
                  runs once for parameters of equal shape in a group
    slots         (group, shape of the parameter) -> its state tensors
    scalars       (group, step) -> the host's values for update number `step` (1 for the first)
    unit_scalars  (group, step, unit) -> values that depend on the parameter's unit
    gated         scalars of either kind that are 0 on a skipped step
    compiled      settings that are compiled in; changing one asks for a new program
    counters      (group, step) -> torch's numbers in a parameter's state after `step` updates
    group_counters  step -> numbers that the optimizer keeps in its groups instead
    takes         whether the rule covers a group's settings
    unit_range    (group) -> the smallest and largest unit that its scalars allow
    """

    update: Callable[[Update], tuple[Slots, torch.Tensor]]
    slots: Callable[[Group, Shape], tuple[Slot, ...]]
    scalars: Callable[[Group, int], dict[str, float]]
    gated: frozenset[str]
    compiled: Callable[[Group], tuple[object, ...]]
    unit_scalars: Callable[[Group, int, float], dict[str, float]] = lambda group, step, unit: {}
    counters: Callable[[Group, int], dict[str, float]] = lambda group, step: {"step": float(step)}
    takes: Callable[[Group], bool] = lambda group: True
    group_counters: Callable[[int], Mapping[str, object]] = lambda step: {}
    unit_range: Callable[[Group], tuple[float, float]] = lambda group: (0.0, math.inf)


def adapted(
    rule: Rule,
    settings: Callable[[Group], Group],
    takes: Callable[[Group], bool],
    group_counters: Callable[[int], Mapping[str, object]] = lambda step: {},
) -> Rule:
    """The rule for a class that names its settings otherwise; `settings` gives them under the rule's own names."""
    return Rule(
        update=lambda u: rule.update(dataclasses.replace(u, group=settings(u.group))),
        slots=lambda group, shape: rule.slots(settings(group), shape),
        scalars=lambda group, step: rule.scalars(settings(group), step),
        gated=rule.gated,
        compiled=lambda group: rule.compiled(settings(group)),
        unit_scalars=lambda group, step, unit: rule.unit_scalars(settings(group), step, unit),
        counters=rule.counters,
        takes=lambda group: takes(group) and rule.takes(settings(group)),
        group_counters=group_counters,
        unit_range=lambda group: rule.unit_range(settings(group)),
    )


# -- Arithmetic on the engine


def two_term_add(
    hi: torch.Tensor, lo: torch.Tensor, delta: torch.Tensor, scale: float = RESIDUAL_SCALE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hi + lo/scale) + delta/scale as a new pair; what rounding drops from hi stays in lo."""
    total = lo + delta
    new_hi = hi + total * (1.0 / scale)
    return new_hi, total - (new_hi - hi) * scale


def average(old: torch.Tensor, value: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """old + share * (value - old)."""
    return old + (value - old) * share


def average_square(u: Update, name: str, root: torch.Tensor, new: Slots, ports: str = "") -> torch.Tensor:
    """v += forget_sq * (root^2 - v) in two terms, into `new`; returns v. The ports: see `square_scalars`."""
    v = u.slots[name]
    scaled = root * u.scalars[f"{ports}admit_sq"]
    rest, forgotten = u.slots[f"{name}/{RESIDUAL}"], v * u.scalars[f"{ports}forget_sq"]
    if forgets_at_once(u.group):  # a new square far below the old one would be lost in their difference
        v, rest = two_term_add(v, rest, -forgotten, SQUARE_RESIDUAL_SCALE)
        change = scaled * scaled
    else:
        change = scaled * scaled - forgotten
    v, new[f"{name}/{RESIDUAL}"] = two_term_add(v, rest, change, SQUARE_RESIDUAL_SCALE)
    new[name] = v
    return v


def forgets_at_once(group: Group) -> bool:
    """Whether next to nothing is kept of earlier squares: betas of (0.9, 0), an alpha of 0."""
    last = group.get("alpha", group.get("rho", group.get("betas", (1.0, 1.0))[1]))
    return float(last) < _SHORT


def coupled_decay(u: Update) -> torch.Tensor:
    """gradient + weight_decay * weight in the gradient's unit; the port: see `decay_scalars`."""
    return u.gradient + u.weight * u.scalars["weight_decay"] if u.group["weight_decay"] else u.gradient


def denominator(u: Update, squares: torch.Tensor) -> torch.Tensor:
    """sqrt(squares) + eps, times ROOT_FACTOR; the port `eps`: see `root_epsilon`."""
    found = torch.sqrt(squares) + u.scalars["eps"]
    return torch.clamp(found, min=u.least) if u.least else found


def bounded(ratio: torch.Tensor, bound: float) -> torch.Tensor:
    """The ratio within +-bound, which only denominators that left fp16 exceed."""
    return torch.clamp(ratio, -bound, bound)


def root_mean_square(x: torch.Tensor, axes: Sequence[int] | None = None) -> torch.Tensor:
    """sqrt(mean(x^2)) over `axes` (all: [1]), kept; divided by the largest entry first, so nothing leaves fp16."""
    if axes is None:
        x, axes = x.reshape(-1), (0,)
    peak = torch.clamp(x.abs().amax(tuple(axes), keepdim=True), min=LEAST)
    ratio = x / peak
    count = math.prod(x.shape[axis] for axis in axes)
    power = max(0, math.ceil(math.log2(count / _LARGEST_SUM)))
    half = math.ceil(power / 2)
    if half:
        ratio = ratio * 2.0**-half
    return peak * torch.sqrt((ratio * ratio).sum(tuple(axes), keepdim=True) * (4.0**half / count))


# -- Scalars from the host


def square_scalars(forget: float) -> dict[str, float]:
    """The ports of `average_square`: the share of the new square, and its root."""
    return {
        "forget_sq": forget * SQUARE_RESIDUAL_SCALE,
        "admit_sq": sqrt(forget * SQUARE_FACTOR * SQUARE_RESIDUAL_SCALE),
    }


def decay_scalars(group: Group, unit: float) -> dict[str, float]:
    """The port of `coupled_decay`, if there is weight decay."""
    return {"weight_decay": number(group["weight_decay"]) * unit} if group["weight_decay"] else {}


def largest_gradient(scalars: Mapping[str, float], unit_scalars: Mapping[str, float]) -> float:
    """The magnitude in units that an update takes: its square, the mean of squares and the step must stay in fp16."""
    forget, rate = scalars.get("forget_sq", 0.0) / SQUARE_RESIDUAL_SCALE, abs(unit_scalars.get("rate", 0.0))
    square = 45.0 / sqrt(forget) if forget else _LARGEST_GRADIENT
    step = scalars.get("forget", 1.0) * 2.0**15 / rate if rate else _LARGEST_GRADIENT
    return least(square, step, _LARGEST_GRADIENT)


def root_epsilon(epsilon: float, unit: float) -> float:
    """Epsilon beside a root of second moments."""
    return epsilon * unit * ROOT_FACTOR


def split(rate: float) -> tuple[float, float]:
    """(rate / power, power): a rate that fp16 does not hold as two numbers that it does; `power` is one of two."""
    power = power_above(rate)
    return rate / power, power


def units_for(epsilon: float) -> tuple[float, float]:
    """Units with which `root_epsilon` stays within fp16, divided by the root of a bias as small as 1e-3 as well."""
    return 0.0, 2.0**9 / epsilon if epsilon else math.inf


def step_rate(group: Group) -> float:
    """Minus the learning rate, in the scale of weights' residuals."""
    return -number(group["lr"]) * RESIDUAL_SCALE
