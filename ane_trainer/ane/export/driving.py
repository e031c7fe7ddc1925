"""The host's side of an exported step: each scalar as a formula, and when units move.

The manifest's `scalars` say for every port how its values follow from `settings` (by parameter group), the number `t`
of the update and each parameter's `unit`; `policy` has the numbers of `dispatch.units`, which moves a unit when a
gradient left its band. docs/export.md names a whole driver.
"""

from __future__ import annotations

from ane_trainer.ane.capture.calibrate import CALIBRATED_UNIT_PEAK
from ane_trainer.ane.capture.gradients import FLOORS, LIMITS, UNIT_SCALE, UNITS, GradientOptions
from ane_trainer.ane.capture.optimizers.formulas import Traced, formula, least, settings, traced_group
from ane_trainer.ane.capture.optimizers.rule import Group, Rule, largest_gradient
from ane_trainer.ane.capture.optimizers.table import plain, port_name
from ane_trainer.ane.capture.unit_bounds import least_gradient, unit_bounds
from ane_trainer.ane.dispatch.mirror import MOVED_PEAK, Mirror
from ane_trainer.ane.dispatch.units import ATTEMPTS, FADE, HIGH, LOW, UP_EVERY, UP_FIRST, GradientUnits
from ane_trainer.ane.mil.program import MAX_FP16

#: A scalar of the manifest: one value a step (`each` "step"), or one for each of `parameters`.
Scalar = dict[str, object]


def driving(units: GradientUnits, options: GradientOptions, mirror: Mirror) -> dict[str, object]:
    """`settings`, `parameters`, `scalars` and `policy` of a manifest."""
    groups = [plain(group) for group in units.optimizer.param_groups]
    return {
        "settings": [settings(group) for group in groups],
        "parameters": [
            {
                "name": p.name, "group": p.group or 0, "unit": unit, "unit_bounds": list(
                    unit_bounds(units.rule, groups[p.group or 0])
                ),
                "level": level, "least_gradient": least_gradient(p, units.rule, groups[p.group or 0]),
                "in_units": [{"target": target, "power": power} for target, power, _ in mirror.in_units(p.name)],
            }
            for p, unit, level in zip(units.parameters, units.values, units.levels, strict=True)
        ],
        "shift": units.shift,
        "scalars": _scalars(units, options, groups),
        "policy": {
            "peak": CALIBRATED_UNIT_PEAK, "high": HIGH, "low": LOW, "fade": FADE, "up_first": list(UP_FIRST),
            "up_every": UP_EVERY, "moved_peak": MOVED_PEAK, "accumulate": options.accumulate,
            "clipped": options.clip_norm is not None, "attempts": ATTEMPTS,
        },
    }  # fmt: skip


def _scalars(units: GradientUnits, options: GradientOptions, groups: list[Group]) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    limits = []
    for number, group in enumerate(groups):
        members = [p.name for p in units.parameters if (p.group or 0) == number]
        shared, own, limit = _of_group(units.rule, group, _unit(options))
        for name, text in shared.items():
            found[port_name(name, number, len(groups))] = {"each": "step", "group": number, "formula": text}
        for name, text in own.items() if members else ():
            found[port_name(name, number, len(groups))] = {
                "each": "parameter", "parameters": members, "formula": text,
            }  # fmt: skip
        limits.append(limit)
    names = [p.name for p in units.parameters]
    if names:
        found |= _of_gradients(options, names)
        found[LIMITS] = {"each": "parameter", "parameters": names, "formula_by_group": limits}
        found[FLOORS] = {"each": "parameter", "parameters": names, "formula": "0.0"}
    return found


def _of_group(rule: Rule, group: Group, unit: Traced) -> tuple[dict[str, str], dict[str, str], str]:
    """Formulas of the scalars that a group shares, of those by parameter, and of the largest gradient."""
    traced = traced_group(group)

    def shared(t: int) -> dict[str, float]:
        return rule.scalars(traced, t)

    def own(t: int) -> dict[str, float]:
        return rule.unit_scalars(traced, t, unit)

    return (
        {name: formula(lambda t, name=name: shared(t)[name]) for name in rule.scalars(group, 1)},
        {name: formula(lambda t, name=name: own(t)[name]) for name in rule.unit_scalars(group, 1, 1.0)},
        formula(lambda t: largest_gradient(shared(t), own(t))),
    )


def _unit(options: GradientOptions) -> Traced:
    """The unit that the optimizer's scalars know: after clipping, which multiplies it by `shift`."""
    unit = Traced(1.0, "unit")
    return unit if options.clip_norm is None else unit * Traced(1.0, "shift")


def _of_gradients(options: GradientOptions, parameters: list[str]) -> dict[str, Scalar]:
    """`capture.gradients.gradient_scalars` as formulas; `common` is the smallest unit."""
    unit, common, shift = (Traced(1.0, name) for name in ("unit", "common", "shift"))

    def each(value: float) -> Scalar:
        return {"each": "parameter", "parameters": parameters, "formula": _text(value)}

    found = {UNITS: each(unit / UNIT_SCALE)}
    if options.accumulate > 1:
        found["last"] = {"each": "step", "group": 0, "formula": "last"}
    if options.clip_value is not None:
        found["clip_value"] = each(least(unit * options.clip_value, MAX_FP16))
    if options.clip_norm is not None:
        bound = least(common * options.clip_norm * shift, MAX_FP16)
        found["clip_norm"] = {"each": "step", "group": 0, "formula": _text(bound)}
        found["clip_shift"] = {"each": "step", "group": 0, "formula": "shift"}
        found["clip_common"] = each(common / unit)
    return found


def _text(value: float) -> str:
    return value.text if isinstance(value, Traced) else repr(float(value))
