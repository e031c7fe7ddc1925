"""Units of gradients during training: chosen from an example, watched after each step, moved by powers of two.

A program takes each gradient times its unit, a power of two that the host feeds, and returns the largest magnitude of
each in that unit. One beyond what the update takes, or far below, makes the program skip the update; then, and when
gradients have slowly become small, the host moves the unit and scales the state that is kept in it. A batch that was
skipped runs again with the moved units. Nothing is compiled again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ane_trainer.ane.capture import StepCapture
from ane_trainer.ane.capture import unit_bounds as bounds_of
from ane_trainer.ane.capture.calibrate import CALIBRATED_UNIT_PEAK, LARGEST_UNIT_PEAK
from ane_trainer.ane.capture.gradients import FLOORS, LIMITS, SMALLEST_UNIT, GradientOptions, gradient_scalars
from ane_trainer.ane.capture.optimizers.rule import Group, Rule, largest_gradient
from ane_trainer.ane.capture.optimizers.table import plain, scalar_values
from ane_trainer.ane.capture.ports import Parameter, units_by_group
from ane_trainer.ane.capture.scaling import HEALTH, LARGEST_SCALE, OVERFLOW, STATISTICS
from ane_trainer.ane.capture.step import SHIFT
from ane_trainer.ane.capture.unit_bounds import largest_shift, least_gradient, unit_bounds
from ane_trainer.ane.dispatch.devices.protocol import Floats
from ane_trainer.ane.dispatch.loading import LoadedStep
from ane_trainer.ane.dispatch.saturation import left_fp16
from ane_trainer.ane.errors import NumericsWarning
from ane_trainer.ane.mil.weights import Array

#: Gradients above this in their unit move it down, those below LOW for a while up.
HIGH, LOW = LARGEST_UNIT_PEAK, CALIBRATED_UNIT_PEAK / 8.0
#: What is left of the level after a step with smaller gradients: from 8 to 1 in 20 steps.
FADE = 0.9
#: Gradients below the first in their unit wait for it to move up, in the first step and after changes from outside;
#: clipping to less than the second waits for the power of two behind it.
_FLOOR, _LEAST_FACTOR = CALIBRATED_UNIT_PEAK / 32.0, 2.0**-3
#: Units move up after these steps and then every UP_EVERY: it takes reading the state.
UP_FIRST, UP_EVERY = (1, 2, 4, 8), 16


#: Prefix of the lags among the levels that a state keeps.
_LAG = "lag of "

#: Runs of one batch until its gradients fit: units move, and each run halves a loss scale that is too large (14 times
#: for a loss 10,000 times the last one's). Where none fits, the loss scale is left as after the first.
ATTEMPTS = 16


@dataclass(frozen=True)
class Move:
    """A parameter's state is to be scaled: the factor of its unit, and of the unit after clipping."""

    name: str
    before_clipping: float
    after_clipping: float


@dataclass(frozen=True)
class Watched:
    """What the health of a run asks for: moves, whether it fitted, and the gradient that was too large, in words.

    `saturated`: a value of the forward pass was, which no loss scale changes.
    """

    moves: list[Move]
    fits: bool
    overflow: str = ""
    saturated: bool = False


@dataclass
class GradientUnits:
    """The present units of the trained parameters, in order. `levels`: recent largest magnitudes in them.

    `shift` is the power of two that follows clipping, `shift_level` the recent factor of clipping times it.
    `overflows` counts by parameter the batches in which its gradient was the one that did not fit. `fresh`: before the
    first step, and after changes from outside. `read_in`: the units after clipping of the results of the last run.
    `lags`: how many updates parameters are behind, as the mirror counts them. `guarded`: places of the forward pass
    that are watched; `saturations` counts the batches by place. `of_one_batch`: an update is of one batch's gradients,
    and the program looks at what clipping leaves of them. `last`: the batch completes an update. `norm`: what is
    clipped to; `follows`: the power after it can still move.
    """

    parameters: tuple[Parameter, ...]
    rule: Rule
    optimizer: torch.optim.Optimizer
    values: list[float]
    shift: float = 1.0
    levels: list[float] = field(default_factory=list)
    shift_level: float = 1.0
    overflows: dict[str, int] = field(default_factory=dict)
    fresh: bool = True
    read_in: Mapping[str, float] = field(default_factory=dict)
    lags: dict[str, int] = field(default_factory=dict)
    guarded: tuple[str, ...] = ()
    of_one_batch: bool = True
    last: bool = True
    norm: float | None = None
    follows: bool = True
    saturations: dict[str, int] = field(default_factory=dict)
    _counted: dict[str, int] = field(default_factory=dict)
    _warned: bool = False

    @classmethod
    def of(cls, capture: StepCapture, optimizer: torch.optim.Optimizer) -> GradientUnits:
        """Those that a capture chose."""
        trained = tuple(p for p in capture.parameters if p.trained)
        found = cls(trained, capture.rule, optimizer, [p.unit for p in trained])
        found.shift = capture.units.get(SHIFT, 1.0)
        found.levels, found.guarded = [0.0] * len(trained), capture.guarded
        return found

    def named(self) -> dict[str, float]:
        """The units by parameter, and the shift, as a state keeps them."""
        return {p.name: value for p, value in zip(self.parameters, self.values, strict=True)} | {
            SHIFT: self.shift
        }

    def after_clipping(self) -> dict[str, float]:
        """The unit of each gradient as the optimizer gets it."""
        return {p.name: value * self.shift for p, value in zip(self.parameters, self.values, strict=True)}

    def named_levels(self) -> dict[str, float]:
        """What decides about moves, as a state keeps it."""
        found = {p.name: v for p, v in zip(self.parameters, self.levels, strict=True)}
        return (
            found | {SHIFT: self.shift_level} | {_LAG + n: float(lag) for n, lag in self.lags.items() if lag}
        )

    def restore(self, units: Mapping[str, float], levels: Mapping[str, float]) -> None:
        """Take over what `named` and `named_levels` gave; missing levels start from zero."""
        self.values = [units[p.name] for p in self.parameters]
        self.levels = [levels.get(p.name, 0.0) for p in self.parameters]
        self.shift, self.shift_level = units.get(SHIFT, 1.0), levels.get(SHIFT, 1.0)
        self.lags.clear()
        self.lags |= {n.removeprefix(_LAG): int(v) for n, v in levels.items() if n.startswith(_LAG)}
        self.overflows.clear()
        self._warned = False

    def scalars(self, step: int, options: GradientOptions, *, last: bool) -> dict[str, list[float]]:
        """Port target -> values for update number `step`."""
        groups = self.optimizer.param_groups
        own = self.after_clipping()
        units = units_by_group(self.parameters, len(groups), own)
        lags = [
            [self.lags.get(p.name, 0) for p in self.parameters if p.group == i] for i in range(len(groups))
        ]
        found = scalar_values(self.optimizer, self.rule, step, units, lags)
        self.of_one_batch, self.last, self.norm = options.accumulate == 1, last, options.clip_norm
        if self.values:
            found |= gradient_scalars(options, self.values, self.shift, last=last)
            found[LIMITS] = self._limits(step, own)
            found[FLOORS] = [0.0] * len(self.values)
        return found

    def lower(self, name: str, factor: float) -> float:
        """Take a parameter's unit down; returns the factor, which ends at the smallest unit: that is announced."""
        place, parameter = next((i, p) for i, p in enumerate(self.parameters) if p.name == name)
        low = unit_bounds(self.rule, self._group(parameter))[0] / self.values[place]
        if factor * 2.0 < low:  # it is to come to an eighth of the range: there is room above
            self.warn(
                f"{name}: the optimizer's state that was set is of gradients of {2.0**6 / self.values[place]:.2g} and "
                "more, beyond what the engine holds of their squares; updates are wrong. Train with a smaller loss."
            )
        factor = min(max(factor, low), 1.0)
        self.values[place] *= factor
        self.levels[place] *= factor
        return factor

    def floors(self) -> list[float]:
        """For each parameter the gradient in its unit below which a step is to wait for the unit to move."""
        if not self.fresh:
            waits = self.norm is not None and self.last and self.follows
            waits = waits and self.shift < self._most_shift(self.values)
            return [-_LEAST_FACTOR if waits else 0.0, *[0.0] * (len(self.values) - 1)]
        largest = [unit_bounds(self.rule, plain(group))[1] for group in self.optimizer.param_groups]
        ends = (largest[p.group or 0] for p in self.parameters)
        return [
            _FLOOR if unit * self.shift < end else 0.0 for unit, end in zip(self.values, ends, strict=True)
        ]

    def _limits(self, step: int, units: Mapping[str, float]) -> list[float]:
        """For each parameter the largest gradient that its update takes."""
        groups = [plain(group) for group in self.optimizer.param_groups]
        steps = {p.name: max(step - self.lags.get(p.name, 0), 1) for p in self.parameters}
        kinds = {(p.group or 0, steps[p.name]) for p in self.parameters}
        shared = {kind: self.rule.scalars(groups[kind[0]], kind[1]) for kind in kinds}
        limits = []
        for p in self.parameters:
            number, own_step = p.group or 0, steps[p.name]
            own = self.rule.unit_scalars(groups[number], own_step, units[p.name])
            limits.append(largest_gradient(shared[number, own_step], own))
        return limits

    def _group(self, parameter: Parameter) -> Group:
        return plain(self.optimizer.param_groups[parameter.group or 0])

    def observe(
        self,
        health: Sequence[float],
        bounds: tuple[Sequence[float], Sequence[float]],
        number: int,
        room: Callable[[str], float],
    ) -> Watched:
        """What the health of step `number` asks for; the units are those after the moves.

        bounds: floors and limits as they were fed. room: the factor that a parameter's state can be scaled by.
        """
        count = len(self.parameters)
        end = len(health) - len(self.guarded)
        peaks = zip(self.guarded, health[end:], strict=True)
        beyond = dict.fromkeys(place for place, peak in peaks if not peak < OVERFLOW)
        if beyond and (found := self._saturated(list(beyond), number)) is not None:
            return found
        health = health[:end]
        if not health[count] > 0.0:  # the scaled gradients did not fit: the loss scale moves instead
            ratios = [peak / value for peak, value in zip(health[:count], self.values, strict=True)]
            largest = max(range(count), key=lambda i: _size(ratios[i]))
            self._count(largest, number)
            return Watched([], False, self._unscaled(largest))
        wanted, up = [1.0] * count, number in UP_FIRST or number % UP_EVERY == 0
        overflow, below = "", []
        clipped = len(health) > count + 1
        factor = max(health[count + 1], 1.0) if clipped and self.of_one_batch else 1.0
        near = not clipped or health[count + 2] > 0.0
        for i, (peak, floor, limit) in enumerate(zip(health[:count], *bounds, strict=True)):
            if not peak * factor < limit:
                overflow = overflow or self._overflow(i, peak * factor, limit)
                self._count(i, number)
            if peak < floor:
                below.append(i)
                self.levels[i] = peak
            wanted[i] = self._wanted(i, peak, limit, up or peak < floor)
        shift = self._wanted_shift(health[count + 1], up, near) if clipped and self.last else 1.0
        if clipped and min(wanted) < 1.0:
            most = self._most_shift([v * w for v, w in zip(self.values, wanted, strict=True)]) / self.shift
            shift = max(shift, min(bounds_of.kept_shift(self.values, wanted, self.shift, self.norm), most))
        if shift > 1.0:
            wanted, shift = bounds_of.within_rooms(wanted, [room(p.name) for p in self.parameters], shift)
        self.follows = near or shift > 1.0  # else what can be had was
        for i, p in enumerate(self.parameters):
            if shift < 1.0 and wanted[i] == 1.0 and 0.0 < health[i] < LOW:  # moments stay where they are
                high = unit_bounds(self.rule, self._group(p))[1] / (self.values[i] * self.shift * shift)
                wanted[i], self.levels[i] = bounds_of.raised(health[i], min(1.0 / shift, high)), health[i]
            if wanted[i] > 1.0:
                wanted[i] = min(wanted[i], max(1.0, room(p.name) / shift))
        return Watched(self._moved(wanted, shift), near and not overflow and not below, overflow)

    def _wanted(self, index: int, peak: float, limit: float, up: bool) -> float:
        """The factor that a unit is to change by."""
        parameter = self.parameters[index]
        if peak > 0.0:
            self.levels[index] = max(peak, FADE * self.levels[index]) if math.isfinite(peak) else 65504.0
        level = self.levels[index]
        if level == 0.0:  # no gradient so far
            return 1.0
        if level <= HIGH and peak < limit and (level >= LOW or not up):
            return 1.0
        group, unit = self._group(parameter), self.values[index]
        level = max(level, least_gradient(parameter, self.rule, group) * unit * self.shift)
        low, high = unit_bounds(self.rule, group)
        high = max(high / self.shift, low)  # the optimizer gets it times the shift
        target = unit * 2.0 ** math.floor(math.log2(CALIBRATED_UNIT_PEAK / level))
        return min(max(target, low), high) / unit

    def _count(self, index: int, number: int) -> None:
        """Once for each batch."""
        name = self.parameters[index].name
        if self._counted.get(name) != number:
            self._counted[name] = number
            self.overflows[name] = self.overflows.get(name, 0) + 1

    def overflows_by_module(self) -> dict[str, int]:
        """`overflows` summed over each module's parameters."""
        found: dict[str, int] = {}
        for name, count in self.overflows.items():
            module = name.rpartition(".")[0] or name
            found[module] = found.get(module, 0) + count
        for place, count in self.saturations.items():
            module = place.partition(" (")[0]
            found[module] = found.get(module, 0) + count
        return found

    def _overflow(self, index: int, peak: float, limit: float) -> str:
        """A gradient beyond its unit, in words."""
        parameter, unit = self.parameters[index], self.values[index]
        least = unit_bounds(self.rule, self._group(parameter))[0]
        fix = "Its power of two moves; training goes on."
        if unit <= least:  # of SGD the rate decides how small
            fix = (
                "Divide the loss by a power of two." if least <= SMALLEST_UNIT else "Lower the learning rate."
            )
        return (
            f"{parameter.name}: needs a gradient below {limit / unit:.3g} for this update; got {peak / unit:.3g}. "
            f"The update was skipped. {fix} Later ones are counted in `step.health`."
        )

    def _unscaled(self, index: int) -> str:
        """In words: gradients that no loss scale within reach brings into fp16."""
        return (
            f"{self.parameters[index].name}: its gradient, or one on the way to it, does not fit into fp16 at any loss "
            "scale that was tried. The update was skipped. Lower the learning rate, normalise the data, or clip "
            "(clip_grad_norm=). Later ones are counted in `step.health`."
        )

    def _saturated(self, places: Sequence[str], number: int) -> Watched | None:
        """Values of the forward pass that left fp16, counted by place; None if those are running statistics alone."""
        for place in (p for p in places if self._counted.get(p) != number):
            self._counted[place] = number
            self.saturations[place] = self.saturations.get(place, 0) + 1
        if (lost := next((p for p in places if not p.endswith(STATISTICS)), None)) is None:
            self.warn(left_fp16(places[0]), stacklevel=7)
            return None
        return Watched([], False, left_fp16(lost), saturated=True)

    def warn(self, text: str, stacklevel: int = 5) -> None:
        """Say it, once: the first gradient beyond its unit that cost an update."""
        if text and not self._warned:
            self._warned = True
            warnings.warn(text, NumericsWarning, stacklevel=stacklevel)

    def _wanted_shift(self, factor: float, up: bool, near: bool) -> float:
        """The factor that the power after clipping is to change by; at once where the gradients are not `near`."""
        self.shift_level = max(factor, FADE * self.shift_level) if near else max(factor, 2.0**-30)
        if near and self.shift_level <= 2.0 and (self.shift_level >= 0.125 or not up):
            return 1.0
        power = math.log2(self.shift_level)
        target = self.shift * 2.0 ** -(math.floor(power) if near or power < 0.0 else math.ceil(power))
        return max(1.0, min(target, self._most_shift(self.values))) / self.shift

    def _most_shift(self, values: Sequence[float]) -> float:
        own = dict(zip((p.name for p in self.parameters), values, strict=True))
        return largest_shift(self.rule, self.optimizer, self.parameters, own)

    def _moved(self, wanted: Sequence[float], shift: float) -> list[Move]:
        self.shift *= shift
        self.shift_level *= shift
        moves = []
        for i, factor in enumerate(wanted):
            self.values[i] *= factor
            self.levels[i] *= factor
            if factor != 1.0 or shift != 1.0:
                moves.append(Move(self.parameters[i].name, factor, factor * shift))
        return moves


def _size(value: float) -> float:
    """The value; what is no number counts as the largest."""
    return value if value == value else math.inf


def run_fitting(
    loaded: LoadedStep,
    units: GradientUnits,
    feeds: dict[str, Array],
    number: int,
    scalars: Callable[[], dict[str, Array]],
    last: bool,
) -> Mapping[str, Floats]:
    """Run step `number`; again where gradients left their bands, with units or a loss scale that moved.

    A run whose gradients do not fit changes nothing but the loss scale, so no update is lost. `scalars`: the host's
    numbers in the present units, by port; `last`: the batch completes an update.
    """
    mirror, run = loaded.mirror, loaded.session.run
    units.read_in = units.after_clipping()
    if not loaded.limits:
        return run(feeds)
    fits = mirror.accumulated_fits()
    for attempt in range(ATTEMPTS):
        if attempt:
            mirror.try_again(fits)
        floors = np.asarray(units.floors(), loaded.dtype)
        feeds = {**feeds, **(scalars() if attempt else {}), loaded.floors: floors}
        units.read_in = units.after_clipping()
        results = run(feeds)
        bounds = (floors.tolist(), feeds[loaded.limits].tolist())
        found = units.observe(results[HEALTH].tolist(), bounds, number, mirror.room)
        for move in found.moves:
            mirror.move(move.name, move.before_clipping, move.after_clipping)
        if results[HEALTH][len(units.parameters)] > 0.0:  # else the loss scale is what moves
            units.fresh &= not found.fits and bool(found.moves)
        if found.fits:
            return results
        if attempt == 0:
            scale = mirror.scaling("loss_scale"), mirror.scaling("good_steps")
        if found.saturated and attempt == 0:
            scale = min(2.0 * scale[0], LARGEST_SCALE), scale[1]
        if found.saturated or not math.isfinite(float(results["loss"][0])):
            break
    mirror.write_scale(*scale)
    units.warn(found.overflow)
    if last:
        mirror.drop_accumulated()
    return results
