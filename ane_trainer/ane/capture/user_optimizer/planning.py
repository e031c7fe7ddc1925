"""A user's optimizer, planned: how everything is kept and scaled, and which scalars the host sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ane_trainer.ane.capture.optimizers.rules import RESIDUAL_SCALE
from ane_trainer.ane.capture.user_optimizer import coefficients as co
from ane_trainer.ane.capture.user_optimizer.coefficients import Coefficient, Environment
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed, Outgrown
from ane_trainer.ane.capture.user_optimizer.forms import TARGET, ScalarPort, Workshop
from ane_trainer.ane.capture.user_optimizer.keeping import MEAN, WEIGHT, Pair, SlotId, UserSlot, environments
from ane_trainer.ane.capture.user_optimizer.probing import UserStep
from ane_trainer.ane.capture.user_optimizer.updating import Pass

#: How far a number may grow beyond the sampled ones before the scales are chosen anew.
_GROWTH = 256.0


@dataclass(frozen=True, eq=False)
class UserUpdate:
    """A user's optimizer, planned: what `capture` needs to put it into the step and `dispatch` to feed it.

    `names` are the parameters', in the order of `user.parameters`. `decisions` repeat the choices of scale. `tops`
    are the largest magnitudes of the ports in the samples.
    """

    user: UserStep
    names: tuple[str, ...]
    units: tuple[float, ...]
    slots: Mapping[SlotId, UserSlot]
    ports: tuple[ScalarPort, ...]
    assumptions: Mapping[Coefficient, int]
    decisions: tuple[int, ...]
    decays: tuple[Coefficient, ...]
    samples: tuple[Environment, ...]
    floor: float
    tops: Mapping[str, float] = field(default_factory=dict)

    def apply(
        self, weights: Sequence[Pair], gradients: Sequence[torch.Tensor], states: Mapping[SlotId, Pair],
        feed: Callable[[ScalarPort], torch.Tensor], gate: torch.Tensor,
    ) -> tuple[dict[int, Pair], dict[SlotId, Pair]]:  # fmt: skip
        """(new weights, new states): hi and lo of each that changes."""
        workshop = Workshop(self.samples, feed, self.floor, self.decisions)
        run = Pass(
            self.user, workshop, weights, gradients, self.units, states, dict(self.slots), gate
        )  # fmt: skip
        run.run()
        return run.new_weights, run.new_states

    def known_leaves(self) -> dict[Coefficient, float]:
        """A value for every leaf: those that a step does not have keep these."""
        leaves: dict[Coefficient, float] = {}
        for sample in reversed(self.user.samples):
            leaves |= sample.values
        return leaves

    def scalars(self, environment: Environment) -> dict[str, float]:
        """Port name -> value.

        Raises: NotFollowed if a number has another sign than it was compiled for, or is none; Outgrown if one is
        far beyond the sampled ones, so that products with it might overflow.
        """
        known: dict[Coefficient, float] = {}
        for coefficient, sign in self.assumptions.items():
            if not co.evaluate(coefficient, environment, known) * sign >= 0:
                raise NotFollowed("uses a number of another sign than before", place=False)
        values = {p.name: p.value(environment, known) for p in self.ports}
        if not all(map(math.isfinite, values.values())):
            raise NotFollowed("computes with a number that is not finite", place=False)
        for name, value in values.items():
            if abs(value) > _GROWTH * self.tops[name]:
                raise Outgrown("uses a number far larger than those it was compiled for", place=False)
        return values


def plan_update(
    user: UserStep, names: Sequence[str], gradients: Sequence[torch.Tensor], units: Sequence[float],
    floor: float, exponents: Sequence[int] | None = None,
) -> UserUpdate:  # fmt: skip
    """Choose how everything is kept and scaled, from the weights as they are and example gradients.

    `exponents` are the choices of an earlier plan (`UserUpdate.choices`), to repeat them.

    Raises: NotFollowed with the reason why the optimizer cannot run on the engine.
    """
    weights = [_halves(p.detach().float()) for p in user.parameters]
    scaled_gradients = [_ranked(g * u) for g, u in zip(gradients, units, strict=True)]
    slots = {which: _unsized(user, which) for which in user.steady.slots}
    gate = torch.ones(1)
    found: dict[SlotId, UserSlot] = slots
    given = None if exponents is None else list(exponents)
    if given is not None and len(given) > len(slots):
        own, given = given[: len(slots)], given[len(slots) :]
    else:
        own, given = [], None
    states: dict[SlotId, Pair] = {which: _zeros(s.shape, s.initial) for which, s in slots.items()}
    for sizing in (True, False):
        decays = tuple(dict.fromkeys(s.decay for s in found.values() if s.kind == MEAN))
        samples = environments(user, decays)
        environment = samples[0] if sizing else samples[min(1, len(samples) - 1)]
        workshop = Workshop(samples, _feeder(environment), floor, None if sizing else given)
        run = Pass(
            user, workshop, weights, scaled_gradients, units, states, dict(found), gate, samples, sizing
        )  # fmt: skip

        run.run()
        found = run.slots
        if sizing and own:
            found = {w: replace(s, exponent=e) for (w, s), e in zip(found.items(), own, strict=True)}
        if sizing:
            states = _sampled(found, run, slots)
    return UserUpdate(
        user, tuple(names), tuple(units), found, tuple(workshop.ports.values()), dict(workshop.assumptions),
        tuple(workshop.decisions), decays, tuple(samples), floor, _tops(workshop),
    )  # fmt: skip


def _tops(workshop: Workshop) -> dict[str, float]:
    found = {}
    for port in workshop.ports.values():
        top = 2.0 ** (workshop.bound(port.coefficient) + port.power)
        found[port.name] = math.sqrt(top) if port.root else top
    return found


def choices(update: UserUpdate) -> tuple[int, ...]:
    """All powers of two that were chosen, to be given to `plan_update` again."""
    return (*(s.exponent for s in update.slots.values()), *update.decisions)


def _unsized(user: UserStep, which: SlotId) -> UserSlot:
    initial = user.initial.get(which, 0.0)
    copied = initial if isinstance(initial, tuple) else None
    value = 0.0 if isinstance(initial, tuple) else initial
    # in the sizing pass a state is a weight-like pair in the user's own unit
    return UserSlot(WEIGHT, user.steady.shapes[which], 0, RESIDUAL_SCALE, initial=value, copied=copied)


def _sampled(
    found: Mapping[SlotId, UserSlot], run: Pass, before: Mapping[SlotId, UserSlot]
) -> dict[SlotId, Pair]:
    """The states after the first step as the second pass finds them: about as large as they will be."""
    result: dict[SlotId, Pair] = {}
    for which, slot in found.items():
        hi, _ = run.new_states.get(which, run.states[which])
        peak = float(hi.detach().abs().amax()) if hi.numel() else 0.0
        brought = hi * (2.0**TARGET / peak) if peak > 0 else hi
        result[which] = (brought, torch.zeros_like(hi) if slot.residual_scale else None)
    return result


def _feeder(environment: Environment) -> Callable[[ScalarPort], torch.Tensor]:
    known: dict[Coefficient, float] = {}
    return lambda port: torch.tensor([port.value(environment, known)], dtype=torch.float32)


def _zeros(shape: tuple[int, ...], value: float = 0.0) -> Pair:
    return torch.full(shape or (1,), value), torch.zeros(shape or (1,))


def _halves(tensor: torch.Tensor) -> Pair:
    ranked = _ranked(tensor)
    return ranked, torch.zeros_like(ranked)


def _ranked(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().reshape(tuple(tensor.shape) or (1,))
