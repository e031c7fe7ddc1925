"""How a user's optimizer's state is kept on the engine.

`v = 0.999 v + 0.001 g^2` is, for any such recursion `s = c s + q`, kept as the mean of its q so far,
m = s / kappa with kappa = c kappa + 1 on the host: its size is that of q from the first step on, whatever c is,
and a sum (c = 1) does not leave fp16. It has two terms, so that small changes add up. A state that is replaced
each step is one fp16 number; one that starts as a copy of a weight is kept like a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.capture.user_optimizer import coefficients as co
from ane_trainer.ane.capture.user_optimizer.coefficients import NOUGHT, UNIT, Coefficient, Environment
from ane_trainer.ane.capture.user_optimizer.following import Atom as Name
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed
from ane_trainer.ane.capture.user_optimizer.probing import UserStep

SlotId = tuple[int, str]
Pair = tuple[torch.Tensor, torch.Tensor | None]
#: 1 in the first step.
FIRST: Coefficient = ("leaf", "first")

#: Kinds of states: a mean, like a weight, replaced each step, or never changed.
MEAN, WEIGHT, REPLACED, KEPT = "mean", "weight", "replaced", "kept"
#: The sampled age of sums.
_LONG_SUM = 1e4


@dataclass(frozen=True)
class UserSlot:
    """One tensor of the optimizer's state on the engine: 2^exponent times its value, or times that of its mean.

    `residual_scale` is 0 for one of one term. `decay` is the c of a mean; its kappa's key.
    """

    kind: str
    shape: tuple[int, ...]
    exponent: int
    residual_scale: float = 0.0
    decay: Coefficient = NOUGHT
    positive: bool = False
    initial: float = 0.0
    copied: Name | None = None

    def kappa(self, when: str) -> Coefficient:
        """What the mean is to be multiplied with, before ("old") or after ("new") the step."""
        return ("kappa", self.decay, when) if self.kind == MEAN else UNIT


@dataclass(frozen=True)
class Kappas:
    """Kappas by decay, before the step. `advance` gives the environment of a step and the kappas after it."""

    values: Mapping[Coefficient, float]

    def advance(self, leaves: Environment, first: bool) -> tuple[dict[Coefficient, float], Kappas]:
        """Raises: NotFollowed if a decay left 0 ... 1."""
        environment = {**leaves, FIRST: float(first)}
        after = {}
        for decay, old in self.values.items():
            value = co.evaluate(decay, environment, {})
            if not 0.0 <= value <= 1.0:
                raise NotFollowed("lets its state grow", place=False)
            after[decay] = value * old + 1.0
            environment["kappa", decay, "old"] = old
            environment["kappa", decay, "new"] = after[decay]
        return environment, Kappas(after)

    def settled(self, leaves: Environment, sums: float = 1.0) -> Kappas:
        """As after many steps; `sums` are those of sums, which do not settle."""
        found = {}
        for decay in self.values:
            value = co.evaluate(decay, leaves, {})
            found[decay] = 1.0 / (1.0 - value) if value < 1.0 else sums
        return Kappas(found)


def environments(user: UserStep, decays: Sequence[Coefficient]) -> list[dict[Coefficient, float]]:
    """The sampled steps' environments: some in a row from the first on, others far ahead."""
    kappas = Kappas(dict.fromkeys(decays, 0.0))
    found = []
    everything: dict[Coefficient, float] = {}
    for sample in reversed(user.samples):
        everything |= sample.values
    for number_, sample in enumerate(user.samples):
        leaves = {**everything, **sample.values}
        if sample.late:
            kappas = kappas.settled(leaves, _LONG_SUM if number_ % 2 else 1.0)
        environment, kappas = kappas.advance(leaves, sample.first)
        found.append(environment)
    return found
