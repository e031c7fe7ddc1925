"""The update of one parameter: what it starts from, and its next weight and slots by the optimizer's rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ane_trainer.ane.capture.optimizers.rule import RESIDUAL, Rule, Update, two_term_add
from ane_trainer.ane.capture.trace.sources import Place, Tensors


def slots_of(names: Iterable[str], state: Tensors) -> dict[str, Tensors]:
    """What the state holds besides each parameter, by its name and the slot's."""
    found: dict[str, Tensors] = {name: {} for name in names}
    for target, value in state.items():
        for place in (i for i, sign in enumerate(target) if sign == "/"):
            if target[:place] in found:
                found[target[:place]][target[place + 1 :]] = value
    return found


def next_state(rule: Rule, u: Update, group: int | None, place: Place) -> Tensors:
    """The next weight, as "", and slots, as "/residual" and so on; `group`: the number of the parameter's group.

    The slots of `u` have the weight's residual, which is no matter of the rule.
    """

    def update(own: Tensors, slots: Tensors, scalars: Tensors) -> Tensors:
        hi, g = own["weight"], -own["gradient"] if u.group.get("maximize") else own["gradient"]
        rest = {name: value for name, value in slots.items() if name != RESIDUAL}
        asked = dataclasses.replace(u, weight=hi, gradient=g, slots=rest, scalars=scalars)
        new, delta = rule.update(asked)
        new_hi, new_lo = two_term_add(hi, slots[RESIDUAL], delta)
        return {"": new_hi, f"/{RESIDUAL}": new_lo, **{f"/{name}": value for name, value in new.items()}}

    return place.stamp(
        ("update", group), update, {"weight": u.weight, "gradient": u.gradient}, u.slots, u.scalars
    )
