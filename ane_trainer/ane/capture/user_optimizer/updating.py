"""Runs through what a user's optimizer does, on tensors of the engine: new weights and new state.

A weight changes by the difference of its form, as under the known optimizers: `w * (1 - a) + u` adds u - a w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ane_trainer.ane.capture.optimizers.rules import RESIDUAL_SCALE, SQUARE_RESIDUAL_SCALE, two_term_add
from ane_trainer.ane.capture.user_optimizer import coefficients as co
from ane_trainer.ane.capture.user_optimizer.coefficients import NOUGHT, UNIT, Coefficient, number
from ane_trainer.ane.capture.user_optimizer.following import Atom as Name
from ane_trainer.ane.capture.user_optimizer.following import Event, NotFollowed, Trace
from ane_trainer.ane.capture.user_optimizer.form_rules import RULES, Value, constant
from ane_trainer.ane.capture.user_optimizer.forms import (
    TARGET,
    Atom,
    Form,
    Mask,
    Workshop,
    combine,
    finite,
    scaled,
    without,
)
from ane_trainer.ane.capture.user_optimizer.keeping import (
    FIRST,
    KEPT,
    MEAN,
    REPLACED,
    WEIGHT,
    Pair,
    SlotId,
    UserSlot,
    environments,
)
from ane_trainer.ane.capture.user_optimizer.probing import Leaves, UserStep


@dataclass(eq=False)
class Pass:
    """One run through the traces: tensors in, new state out.

    `weights`: hi and lo; `slots`: how the states are kept, which a `sizing` run finds out and notes there and in
    `samples`. `pairs`: weights, and states that are kept like them.
    """

    user: UserStep
    workshop: Workshop
    weights: Sequence[Pair]
    gradients: Sequence[torch.Tensor]
    units: Sequence[float]
    states: Mapping[SlotId, Pair]
    slots: dict[SlotId, UserSlot]
    gate: torch.Tensor
    samples: Sequence[dict[Coefficient, float]] = ()
    sizing: bool = False
    new_weights: dict[int, Pair] = field(default_factory=dict)
    new_states: dict[SlotId, Pair] = field(default_factory=dict)
    pairs: dict[Atom, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _inputs: dict[Name, Form] = field(default_factory=dict)

    def run(self) -> None:
        """Everything, into `new_weights` and `new_states`."""
        self._make_inputs()
        steady = _Reading(self, self.user.steady, self.user.leaves)
        steady.run()
        deltas = {i: steady.delta(i) for i in self.user.steady.weights}
        if self.user.first is not None:
            self._join_first(deltas)
        for i, delta in deltas.items():
            if delta is not None:
                hi, lo = self.weights[i]
                assert lo is not None
                self.new_weights[i] = two_term_add(hi, lo, delta)

    def know(self, decay: Coefficient) -> None:
        """Put a mean's kappas into the samples."""
        if decay != NOUGHT:
            found = environments(self.user, [decay])
            for sample, environment in zip(self.samples, found, strict=True):
                sample.update({k: v for k, v in environment.items() if k[0] == "kappa"})

    def first(self) -> torch.Tensor:
        """[1]: whether this is the first step."""
        return self.workshop.port(FIRST, 0) > 0.5

    def _make_inputs(self) -> None:
        w = self.workshop
        for i, (hi, lo) in enumerate(self.weights):
            atom = Atom(hi, 0, w.peak(hi, 0.0), root=True)
            assert lo is not None
            self.pairs[atom] = hi, lo
            self._inputs["weight", i] = Form({atom: UNIT}, _shape(self.user.parameters[i]))
            unit = int(math.log2(self.units[i]))
            # one that is all but 0 in the example may be rounding errors, which are larger on the engine
            peak = max(w.peak(self.gradients[i], 4.0), 0.0)
            gradient = Atom(self.gradients[i], unit, peak)
            self._inputs["gradient", i] = Form({gradient: UNIT}, _shape(self.user.parameters[i]))
        for (i, key), slot in self.slots.items():
            hi, rest = self.old((i, key))
            peak = -math.inf if self.sizing else float(TARGET)
            atom = Atom(
                hi, slot.exponent, peak, slot.positive, states=frozenset({(i, key)}),
                factor=slot.kappa("old"), root=True,
            )  # fmt: skip
            if slot.kind == WEIGHT and slot.copied is not None and slot.copied[0] == "weight":
                assert rest is not None
                self.pairs[atom] = hi, rest
            self._inputs["slot", i, key] = Form({atom: UNIT}, slot.shape)

    def old(self, which: SlotId) -> Pair:
        """The state before the step; in the first one a copy of a weight or gradient where it is made as one."""
        slot, (hi, lo) = self.slots[which], self.states[which]
        if slot.copied is None:
            return hi, lo
        source = self._inputs[slot.copied]
        if slot.kind == WEIGHT and slot.copied[0] == "weight":
            start, start_lo = self.weights[slot.copied[1]]
            assert lo is not None
            assert start_lo is not None
            return torch.where(self.first(), start, hi), torch.where(self.first(), start_lo, lo)
        start = self.workshop.total(source, slot.exponent)
        rest = None if lo is None else torch.where(self.first(), torch.zeros_like(lo), lo)
        return torch.where(self.first(), start, hi), rest

    def _join_first(self, deltas: dict[int, torch.Tensor | None]) -> None:
        """Where the first step is another one, its results instead of the others'."""
        assert self.user.first is not None
        assert self.user.first_leaves is not None
        opening = _Reading(self, self.user.first, self.user.first_leaves)
        opening.run(slots=False)
        for i, later in list(deltas.items()):
            now = opening.delta(i)
            zero = torch.zeros_like(self.weights[i][0])
            if now is not later:
                deltas[i] = torch.where(
                    self.first(), zero if now is None else now, zero if later is None else later
                )
        for which, slot in list(self.slots.items()):
            form = opening.form(self.user.first.slots[which])
            if self.sizing:
                top = TARGET - self.workshop.magnitude(form)
                exponent = round(finite(top)) if math.isfinite(top) else slot.exponent
                self.slots[which] = replace(slot, exponent=min(slot.exponent, exponent))
            if slot.kind == MEAN and any(v == 1.0 for v in self.workshop.values(slot.decay)):
                raise NotFollowed(f"adds to its state {which[1]} without end", place=False)
            start = _broadcast(self.workshop.total(form, slot.exponent, self.gate), slot.shape)
            hi, lo = self.new_states.get(which, self.states[which])
            rest = None if lo is None else torch.where(self.first(), torch.zeros_like(lo), lo)
            self.new_states[which] = torch.where(self.first(), start, hi), rest


class _Reading:
    """Runs through one trace, event by event."""

    def __init__(self, owner: Pass, trace: Trace, leaves: Leaves) -> None:
        self._owner, self._trace, self._leaves = owner, trace, leaves
        self._values: dict[Name, Value] = dict(owner._inputs)

    def run(self, slots: bool = True) -> None:
        """Compute all events; with `slots`, a state's new value as soon as it is there."""
        finals: dict[Name, list[SlotId]] = {}
        for which, name in self._trace.slots.items():
            finals.setdefault(name, []).append(which)
        if slots:
            for name, those in finals.items():
                if name[0] != "node":
                    self._settle(name, those)
        limits = self._limits()
        for number_, event in enumerate(self._trace.events):
            name = ("node", number_)
            self._owner.workshop.limit = limits.get(name)
            self._values[name] = self._event(event)
            if slots and name in finals:
                self._settle(name, finals[name])

    def _limits(self) -> dict[Name, float]:
        """Values that are only used to be clamped to a number -> log2 of the number."""
        uses: dict[Name, int] = {}
        for event in self._trace.events:
            for _, value in event.args:
                if isinstance(value, tuple) and value[:1] == ("node",):
                    uses[value] = uses.get(value, 0) + 1
        found: dict[Name, float] = {}
        for number_, event in reversed(list(enumerate(self._trace.events))):
            args = dict(event.args)
            limit = args.get("max", args.get("other") if event.name == "minimum" else None)
            if event.name not in ("clamp", "clamp_max", "minimum"):
                limit = None
            top = -math.inf
            if isinstance(limit, tuple) and limit[0] in ("number", "fill"):
                top = self._owner.workshop.bound(self._leaves.coefficients[limit[1]])
            elif event.name in ("abs", "neg"):
                top = found.get(("node", number_), top)
            if math.isfinite(top) and uses.get(args["self"]) == 1:
                found[args["self"]] = top
        return found

    def form(self, name: Name) -> Form:
        """The value of an atom of the trace, which must be a tensor of numbers."""
        value = self._value(name)
        if isinstance(value, Mask):
            raise NotFollowed("keeps truth values as state", place=False)
        return value

    def delta(self, i: int) -> torch.Tensor | None:
        """What is added to weight i times RESIDUAL_SCALE; None if it does not change."""
        owner = self._owner
        form = self.form(self._trace.weights[i])
        (root,) = owner._inputs["weight", i].terms
        coefficient, rest = without(form, root)
        if coefficient == NOUGHT:
            raise NotFollowed(
                "replaces a weight by other numbers instead of changing it by a sum, a multiple or a mean, "
                "in which fp16 would lose small steps",
                place=False,
            )
        change = combine(rest, Form({root: UNIT}, form.shape), co.minus(coefficient, UNIT), form.shape)
        change = _apart(owner, change, root)
        if not change.terms and change.constant == NOUGHT:
            return None
        scale = int(math.log2(RESIDUAL_SCALE))
        return _broadcast(owner.workshop.total(change, scale, owner.gate), form.shape)

    def _value(self, name: Name) -> Value:
        if name[0] == "number":
            return constant(self._leaves.coefficients[name[1]], ())
        if name[0] == "fill":
            return constant(self._leaves.coefficients[name[1]], name[2])
        if name[0] == "undefined":  # what it is multiplied with must be 0
            return constant(number(math.nan), ())
        return self._values[name]

    def _event(self, event: Event) -> Value:
        rule = RULES.get(event.name)
        if rule is None:
            raise NotFollowed(f"uses {event.name}, which has no rule{_at(event)}", place=False)
        arguments = {k: self._argument(v) for k, v in event.args}
        try:
            return rule(self._owner.workshop, event.shape, **arguments)
        except NotFollowed as error:
            raise NotFollowed(f"{error.reason}{_at(event)}", place=False) from None
        except TypeError:
            raise NotFollowed(
                f"uses {event.name} in a form without a rule{_at(event)}", place=False
            ) from None

    def _argument(self, value: object) -> object:
        if isinstance(value, tuple) and value and isinstance(value[0], str):
            return self._value(value)
        return tuple(map(self._argument, value)) if isinstance(value, tuple) else value

    def _settle(self, name: Name, those: Sequence[SlotId]) -> None:
        """The new values of the states that end as `name`; from here on its readers take the first of them."""
        owner, form = self._owner, self.form(name)
        for number_, which in enumerate(those):
            if owner.sizing:
                owner.slots[which] = _sized(owner, which, form)
                owner.know(owner.slots[which].decay)
            atom = _renewed(owner, which, form)
            free = name[0] == "node" and name not in self._trace.weights.values()
            if number_ == 0 and atom is not None and free:
                self._values[name] = Form({atom: UNIT}, form.shape)


def _apart(owner: Pass, change: Form, root: Atom) -> Form:
    """Other weights (slow ones, averages) in the change of one as their distance from it: a (z - w) + (a + b) w.

    The distance of two pairs is exact where the weights are close; their multiples would not be.
    """
    pairs = {a: p for a, p in owner.pairs.items() if a in change.terms and a is not root}
    if root not in owner.pairs or not pairs:
        return change
    hi, lo = owner.pairs[root]
    scale = int(math.log2(RESIDUAL_SCALE))
    for other, (other_hi, other_lo) in pairs.items():
        coefficient, rest = without(change, other)
        gap = (other_hi - hi) * RESIDUAL_SCALE + (other_lo - lo)
        atom = Atom(gap, scale, owner.workshop.peak(gap, 0.0), states=other.states)
        moved = combine(rest, Form({root: UNIT}, change.shape), coefficient, change.shape)
        change = combine(moved, Form({atom: UNIT}, change.shape), coefficient, change.shape)
    return change


def _renewed(owner: Pass, which: SlotId, form: Form) -> Atom | None:
    """Compute a state's new value into `new_states`; what to read instead of `form`."""
    w, slot = owner.workshop, owner.slots[which]
    hi, lo = owner.old(which)
    states = form.states | {which}
    if slot.kind == KEPT:
        if slot.copied is not None:
            owner.new_states[which] = hi, lo
        return None
    if slot.kind == REPLACED:
        new = _broadcast(w.total(form, slot.exponent), slot.shape)
        owner.new_states[which] = torch.where(owner.gate > 0.5, new, hi), None
        return Atom(new, slot.exponent, w.peak(new, TARGET), slot.positive, states=states)
    assert lo is not None
    (root,) = owner._inputs["slot", *which].terms
    decay, rest = without(form, root)
    new_kappa = slot.kappa("new")
    plain = root if root.factor == UNIT else replace(root, factor=UNIT)
    kept = co.minus(co.over(co.times(decay, slot.kappa("old")), new_kappa), UNIT)
    change = combine(
        scaled(rest, co.over(UNIT, new_kappa)), Form({plain: UNIT}, form.shape), kept, form.shape
    )
    change = _apart(owner, change, root)
    exponent = slot.exponent + int(math.log2(slot.residual_scale))
    delta = _broadcast(w.total(change, exponent, owner.gate), slot.shape)
    new, new_lo = two_term_add(hi, lo, delta, slot.residual_scale)
    owner.new_states[which] = new, new_lo
    if root in owner.pairs:
        return None
    return Atom(new, slot.exponent, w.peak(new, TARGET), slot.positive, states=states, factor=new_kappa)


def _sized(owner: Pass, which: SlotId, form: Form) -> UserSlot:
    """How a state is kept, from the form of its new value."""
    w, slot = owner.workshop, owner.slots[which]
    (root,) = owner._inputs["slot", *which].terms
    decay, rest = without(form, root)
    if decay == UNIT and not rest.terms and rest.constant == NOUGHT:
        size = w.magnitude(owner._inputs[slot.copied]) if slot.copied else _log(slot.initial)
        return replace(slot, kind=KEPT, exponent=round(finite(TARGET - size)))
    positive = w.positive(rest) and slot.initial >= 0 and slot.copied is None
    if decay == NOUGHT:
        if which in rest.states and not _chosen(rest):
            raise NotFollowed(f"multiplies its state {which[1]} by a tensor", place=False)
        return replace(slot, kind=REPLACED, exponent=_exponent(w, form), positive=w.positive(form))
    if not all(0.0 <= v <= 1.0 for v in w.values(decay)):
        raise NotFollowed(f"lets its state {which[1]} grow", place=False)
    endless = any(v == 1.0 for v in w.values(decay))
    if endless and which in rest.states:
        raise NotFollowed(
            f"changes its state {which[1]} in a way whose size is not known beforehand", place=False
        )
    if slot.copied is None and slot.initial == 0.0:
        return replace(
            slot, kind=MEAN, exponent=_exponent(w, rest), residual_scale=SQUARE_RESIDUAL_SCALE, decay=decay,
            positive=positive,
        )  # fmt: skip
    if slot.copied is not None and slot.copied[0] == "weight":
        return replace(slot, kind=WEIGHT, exponent=0, residual_scale=RESIDUAL_SCALE)
    if endless:
        raise NotFollowed(f"adds to its state {which[1]} without end", place=False)
    start = w.magnitude(owner._inputs[slot.copied]) if slot.copied else _log(slot.initial)
    limit = w.magnitude(scaled(rest, co.over(UNIT, co.minus(UNIT, decay))))
    exponent = round(finite(TARGET - max(start, limit)))
    return replace(
        slot, kind=WEIGHT, exponent=exponent, residual_scale=SQUARE_RESIDUAL_SCALE, positive=positive
    )


def _chosen(form: Form) -> bool:
    """Whether it is one tensor that was chosen from others (`maximum`), so not larger than these."""
    return len(form.terms) == 1 and form.constant == NOUGHT and all(a.chosen for a in form.terms)


def _exponent(w: Workshop, form: Form) -> int:
    return round(finite(TARGET - w.magnitude(form)))


def _log(value: float) -> float:
    return math.log2(abs(value)) if value else -math.inf


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _broadcast(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    shape = shape or (1,)
    return tensor if tuple(tensor.shape) == shape else tensor.expand(shape)


def _at(event: Event) -> str:
    return f" ({event.place})" if event.place else ""
