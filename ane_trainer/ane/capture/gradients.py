"""Gradient processing between the backward pass and the optimizer: accumulation and clipping.

Gradients are in their parameters' units (powers of two). All numbers that a user may change come as scalar
ports; whether they are there at all is compiled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.capture.scaling import FITS, SCALING
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import MAX_FP16

Tensors = dict[str, torch.Tensor]

#: Port of the units of gradients, divided by UNIT_SCALE so that fp16 holds all of SMALLEST_UNIT ... LARGEST_UNIT.
UNITS = "units"
UNIT_SCALE = 2.0**9
SMALLEST_UNIT, LARGEST_UNIT = 2.0**-15, 2.0**24
#: Port of the largest magnitude of each gradient, in its unit, that an update takes.
LIMITS = "gradient_limits"
#: Port of the least such magnitude: an update from smaller ones waits until their unit has moved up.
FLOORS = "gradient_floors"
#: Suffix of the state that holds the sum of a parameter's gradients.
ACCUMULATED = "accumulated"
#: A sum of squares of numbers up to 1 stays below this by a static power of two.
_LARGEST_SUM = 2.0**15
#: The largest gradient counts as this at least, so that there is something to divide by.
_SMALLEST_PEAK = 2.0**-24


@dataclass(frozen=True)
class GradientOptions:
    """Clip to `clip_value`, then the norm of all together to `clip_norm`; average over `accumulate` batches.

    `on_host`: the optimizer runs on the host, which gets the gradients as results.

    Raises: UsageError for limits that are not positive or a count below 1.
    """

    clip_norm: float | None = None
    clip_value: float | None = None
    accumulate: int = 1
    on_host: bool = False

    @property
    def clips_each(self) -> bool:
        """Whether entries of a batch's own gradient are clipped."""
        return self.clip_value is not None and self.accumulate == 1

    @property
    def most(self) -> float:
        """What counts of an entry of a batch's gradient at most: clipping takes the rest, before anything reads it."""
        return math.inf if self.clip_value is None or not self.clips_each else self.clip_value

    def __post_init__(self) -> None:
        for name, value in (("clip_grad_norm", self.clip_norm), ("clip_grad_value", self.clip_value)):
            if value is not None and not 0.0 < value <= MAX_FP16:
                raise UsageError(
                    f"{name}: needs a number above 0 and up to {MAX_FP16:g}; got {value!r}. Choose one.",
                    code="ANE104",
                )
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise UsageError(
                f"accumulate: needs a whole number from 1 on; got {self.accumulate!r}. Choose one.",
                code="ANE104",
            )


def gradient_scalars(
    options: GradientOptions, units: Sequence[float], shift: float, *, last: bool
) -> dict[str, list[float]]:
    """Port name -> values: the units of gradients, and what accumulation and clipping need of them.

    units: of all trained parameters, in order. shift: a power of two that brings gradients back to the size that
    their units give them after their norm was clipped. last: this batch completes an update.
    """
    found = {UNITS: [unit / UNIT_SCALE for unit in units]}
    if options.accumulate > 1:
        found["last"] = [float(last)]
    if options.clip_value is not None:
        found["clip_value"] = [min(options.clip_value * unit, MAX_FP16) for unit in units]
    if options.clip_norm is not None:
        common = min(units)
        found["clip_norm"] = [min(options.clip_norm * common * shift, MAX_FP16)]
        found["clip_shift"] = [shift]
        found["clip_common"] = [common / unit for unit in units]
    return found


def accumulate(
    gradients: Tensors,
    state: Mapping[str, torch.Tensor],
    options: GradientOptions,
    ok: torch.Tensor,
    last: torch.Tensor,
) -> tuple[Tensors, Tensors, torch.Tensor]:
    """(mean gradients so far, new state, whether all batches so far fit): sum += g/count; empty after `last`.

    A last batch that does not fit leaves the sums: it comes again.
    """
    share = ok * (1.0 / options.accumulate)
    sums = {name: state[f"{name}/{ACCUMULATED}"] + g * share for name, g in gradients.items()}
    fits = state[SCALING + FITS] * ok
    rest = 1.0 - last * ok
    new = {f"{name}/{ACCUMULATED}": value * rest for name, value in sums.items()}
    return sums, {**new, SCALING + FITS: torch.maximum(fits, last)}, fits


def clip_values(gradients: Tensors, bounds: torch.Tensor) -> Tensors:
    """Every entry to within +-bound; `bounds`: one for each gradient, in its unit."""
    each = {name: entry(bounds, i) for i, name in enumerate(gradients)}
    return {n: torch.minimum(torch.maximum(g, -each[n]), each[n]) for n, g in gradients.items()}


def clip_norm(
    gradients: Tensors, common: torch.Tensor, limit: torch.Tensor, shift: torch.Tensor
) -> tuple[Tensors, torch.Tensor]:
    """(all gradients times the factor, the factor): shift * min(1, limit / norm of all together), [1].

    `common` brings each gradient to the unit of the one with the largest entries; `limit` is in that unit, times
    `shift`. Squares are taken of gradients divided by the largest entry, and summed under static powers of two,
    so that nothing overflows whatever the sizes: norm = peak * root, root = sqrt(sum of squares of ratios).
    """
    alike = [g * entry(common, i) if len(gradients) > 1 else g for i, g in enumerate(gradients.values())]
    peak = _largest(alike)
    power = _even_power(sum(g.numel() for g in gradients.values()))
    squares = [_sum_of_squares(g / peak, power) for g in alike]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    root = torch.sqrt(total) * 2.0 ** (power // 2)
    factor = torch.minimum((limit / peak) / root, shift)
    return {name: g * factor for name, g in gradients.items()}, factor


def of_size(
    peaks: torch.Tensor, factor: torch.Tensor, named: Mapping[str, torch.Tensor], options: GradientOptions
) -> torch.Tensor:
    """[1], 1.0 or 0.0: whether clipping by this factor leaves gradients of these peaks of a size that the update takes.

    The norm may have fallen: then less is clipped than the unit after it expects; or grown, and small entries are lost
    (FLOORS is below 0 where the unit can follow). Nothing is asked before the last batch of an update.
    """
    fits = ((peaks * factor < named[LIMITS]) & (factor + entry(named[FLOORS], 0) >= 0)).to(torch.float32)
    near = fits.amin().reshape(1)
    return near if options.accumulate == 1 else torch.maximum(near, 1.0 - named["last"])


def entry(values: torch.Tensor, index: int) -> torch.Tensor:
    """[1]: one entry of a vector."""
    return values if values.shape[0] == 1 else values[index : index + 1]


def _largest(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    peak = torch.full((1,), _SMALLEST_PEAK)
    for gradient in gradients:
        peak = torch.maximum(peak, gradient.abs().amax().reshape(1))
    return peak


def _even_power(count: int) -> int:
    """The least even power of two that brings `count` ones below _LARGEST_SUM."""
    power = max(0, math.ceil(math.log2(count / _LARGEST_SUM)))
    return power + power % 2


def _sum_of_squares(ratios: torch.Tensor, power: int) -> torch.Tensor:
    """[1]: the sum times 2^-power, in two steps if there are many entries."""
    squares = ratios * ratios
    axes = list(range(squares.ndim))
    first: list[int] = []
    while axes and math.prod(squares.shape[a] for a in (axes[-1], *first)) <= _LARGEST_SUM:
        first.append(axes.pop())
    if first:
        squares = squares.sum(first, keepdim=True)
    return (squares * 2.0**-power).sum().reshape(1)
