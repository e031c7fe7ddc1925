"""A trial of a planned update in fp32 against the optimizer's own steps in PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ane_trainer.ane.capture.optimizers.rules import RESIDUAL_SCALE
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed
from ane_trainer.ane.capture.user_optimizer.forms import ScalarPort
from ane_trainer.ane.capture.user_optimizer.keeping import Kappas, Pair, SlotId
from ane_trainer.ane.capture.user_optimizer.planning import UserUpdate
from ane_trainer.ane.capture.user_optimizer.snapshots import Snapshot

#: What the example's gradients are multiplied with, step by step.
_FACTORS = (1.0, -0.5, 0.7)
#: Where both differ by more than this share of how far the weights moved, the plan is wrong.
_TOLERANCE = 1e-2
#: The same where the optimizer computes in bf16 itself, whose numbers are right to 2^-8.
_COARSE_TOLERANCE = 0.1


@torch.no_grad()
def check_update(plan: UserUpdate, gradients: Sequence[torch.Tensor]) -> None:
    """Some steps both ways, from the optimizer's present state, which is left as it is.

    Raises: NotFollowed if the results differ.
    """
    if plan.user.tensors:  # in the middle of a run: the state on the engine is not known yet
        return
    user = plan.user
    before = Snapshot(user.optimizer, {})
    weights = [p.detach().clone() for p in user.parameters]
    others = [p.grad for p in user.parameters]
    try:
        own = _planned(dataclasses.replace(plan, floor=0.0), gradients)
        before.restore()
        reference = _pytorch(plan, gradients)
    finally:
        before.restore()
        for parameter, weight, gradient in zip(user.parameters, weights, others, strict=True):
            parameter.data.copy_(weight)
            parameter.grad = gradient
        user.tensors.clear()
    tolerance = _COARSE_TOLERANCE if plan.user.steady.coarse else _TOLERANCE
    for name, ours, theirs, start in zip(plan.names, own, reference, weights, strict=True):
        moved = (theirs - start).norm()
        error = (ours - theirs).norm()
        if not float(error) <= tolerance * float(moved) + 1e-6 * float(start.norm() + 1e-3):
            share = float(error / moved) if float(moved) else float("inf")
            raise NotFollowed(
                f"came out differently in a trial in fp32 (by {share:.1%} of the step of {name})", place=False
            )


def _planned(plan: UserUpdate, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    weights: list[Pair] = [(_ranked(p), torch.zeros_like(_ranked(p))) for p in plan.user.parameters]
    states: dict[SlotId, Pair] = {}
    for which, slot in plan.slots.items():
        start = torch.full(slot.shape or (1,), slot.initial * 2.0**slot.exponent)
        states[which] = (start, torch.zeros_like(start) if slot.residual_scale else None)
    kappas = Kappas(dict.fromkeys(plan.decays, 0.0))
    leaves = plan.known_leaves()
    for factor in _FACTORS:
        replay = plan.user.replay()
        leaves |= replay.values
        environment, kappas = kappas.advance(leaves, replay.first)
        values = plan.scalars(environment)

        def feed(port: ScalarPort, values: dict[str, float] = values) -> torch.Tensor:
            return torch.tensor([values[port.name]], dtype=torch.float32)

        arrived = [_ranked(g * factor) * u for g, u in zip(gradients, plan.units, strict=True)]
        new_weights, new_states = plan.apply(weights, arrived, states, feed, torch.ones(1))
        weights = [new_weights.get(i, pair) for i, pair in enumerate(weights)]
        states |= new_states
    pairs = zip(weights, plan.user.parameters, strict=True)
    return [(hi + (0 if lo is None else lo / RESIDUAL_SCALE)).reshape(p.shape) for (hi, lo), p in pairs]


def _pytorch(plan: UserUpdate, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    for factor in _FACTORS:
        for parameter, gradient in zip(plan.user.parameters, gradients, strict=True):
            parameter.grad = gradient.detach().clone().reshape(parameter.shape) * factor
        with torch.enable_grad():
            plan.user.optimizer.step()
    return [p.detach().clone() for p in plan.user.parameters]


def _ranked(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().reshape(tuple(tensor.shape) or (1,))
