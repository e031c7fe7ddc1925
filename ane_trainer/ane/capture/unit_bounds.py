"""Bounds of a gradient's unit and of the power of two behind clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from ane_trainer.ane.capture.calibrate import CALIBRATED_UNIT_PEAK, LARGEST_UNIT_PEAK, Calibration
from ane_trainer.ane.capture.gradients import LARGEST_UNIT, SMALLEST_UNIT, GradientOptions
from ane_trainer.ane.capture.optimizers.rule import Rule
from ane_trainer.ane.capture.optimizers.table import plain
from ane_trainer.ane.capture.ports import Parameter

#: The power of two after clipping is this at most.
LARGEST_SHIFT = 2.0**15
#: How far a unit goes down for it.
_GIVEN = 2.0**-6


def unit_bounds(rule: Rule, group: Mapping[str, object]) -> tuple[float, float]:
    """The smallest and largest unit that ports and the rule's scalars allow."""
    low, high = rule.unit_range(group)
    decay = rule.unit_scalars(group, 1, 1.0).get("weight_decay", 0.0)
    low, high = max(low, SMALLEST_UNIT), min(high, LARGEST_UNIT, 2.0**15 / decay if decay else math.inf)
    low = 2.0 ** math.ceil(math.log2(low))
    return low, max(2.0 ** math.floor(math.log2(high)), low)


def least_gradient(parameter: Parameter, rule: Rule, group: Mapping[str, object]) -> float:
    """The magnitude that coupled weight decay alone gives the parameter's gradient."""
    decay = rule.unit_scalars(group, 1, 1.0).get("weight_decay", 0.0)
    if not decay or not parameter.tensor.numel():
        return 0.0
    return decay * float(parameter.tensor.detach().abs().amax())


def clipping_shift(options: GradientOptions, calibration: Calibration, largest: float) -> float:
    """The power of two that undoes what clipping takes from the example's gradients."""
    if options.clip_norm is None or not 0.0 < calibration.norm < math.inf:
        return 1.0
    factor = min(1.0, options.clip_norm / calibration.norm)
    return min(2.0 ** -math.floor(math.log2(factor)), largest)


def largest_shift(
    rule: Rule, optimizer: torch.optim.Optimizer, parameters: Iterable[Parameter], units: Mapping[str, float]
) -> float:
    """The largest power of two after clipping with which all units stay within their bounds; LARGEST_SHIFT at most.

    With it coupled weight decay alone stays below the largest gradient that leaves a unit as it is.
    """
    found = LARGEST_SHIFT
    for p in parameters:
        if p.group is not None:
            group, unit = plain(optimizer.param_groups[p.group]), units.get(p.name, p.unit)
            _, high = unit_bounds(rule, group)
            decay = least_gradient(p, rule, group) * unit
            room = 2.0 ** math.floor(math.log2(LARGEST_UNIT_PEAK / decay)) if decay else math.inf
            found = min(found, max(high, 1.0) / unit, room)
    return max(found, 1.0)


def kept_shift(values: Sequence[float], wanted: Sequence[float], shift: float, norm: float | None) -> float:
    """The factor of the power after clipping that keeps moments where they are while units move down by `wanted`.

    What is clipped to `norm` has no entry above it: moments need no unit below the one that this has.
    """
    if norm is None:
        return 1.0
    least = 2.0 ** math.floor(math.log2(CALIBRATED_UNIT_PEAK / norm))
    moved = [(v * w * shift, min(v * shift, least)) for v, w in zip(values, wanted, strict=True) if w < 1.0]
    return min(max((before / after for after, before in moved), default=1.0), LARGEST_SHIFT / shift)


def within_rooms(wanted: Sequence[float], rooms: Sequence[float], shift: float) -> tuple[list[float], float]:
    """The factors of units and of the power after clipping that leave state in its range.

    Where that has no room, the unit in front of clipping gives way, by _GIVEN at most.
    """
    units = [min(w, max(r / shift, _GIVEN)) for w, r in zip(wanted, rooms, strict=True)]
    return units, min(shift, *(r / min(u, 1.0) for u, r in zip(units, rooms, strict=True)))


def raised(peak: float, most: float) -> float:
    """The factor, from 1 to `most`, by which a unit grows that has gradients of this magnitude, small ones."""
    return max(1.0, min(2.0 ** math.floor(math.log2(CALIBRATED_UNIT_PEAK / peak)), most))
