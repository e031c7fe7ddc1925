"""From an optimizer without a rule to its part of the captured step: followed, planned, checked, given ports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ane_trainer.ane.capture.calibrate import Rehearsal
from ane_trainer.ane.capture.optimizers.rules import RESIDUAL
from ane_trainer.ane.capture.optimizers.updates import RULES
from ane_trainer.ane.capture.ports import Parameter, identifier
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed
from ane_trainer.ane.capture.user_optimizer.forms import ScalarPort
from ane_trainer.ane.capture.user_optimizer.keeping import SlotId
from ane_trainer.ane.capture.user_optimizer.planning import UserUpdate, plan_update
from ane_trainer.ane.capture.user_optimizer.probing import probe
from ane_trainer.ane.capture.user_optimizer.trial import check_update
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.stages import Port

UserPlan = UserUpdate


class NotOnEngine(UnsupportedModel):
    """The optimizer cannot run on the engine; `reason` says why."""

    def __init__(self, optimizer: torch.optim.Optimizer, reason: str) -> None:
        names = ", ".join(f"torch.optim.{cls.__name__}" for cls in RULES)
        fix = f'Use one of {names}, or optimizer_on="host".'
        finding = Finding("optimizer", type(optimizer).__name__, f"{reason}.", fix)
        super().__init__("The optimizer cannot run on the engine:", [finding])
        self.reason = reason


def find_user_plan(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Parameter], rehearsal: Rehearsal, floor: float,
    choices: Sequence[int] | None,
) -> UserPlan:  # fmt: skip
    """Follow the optimizer over its parameters, plan its update and try it against PyTorch.

    Raises: NotOnEngine with the reason if any of it fails.
    """
    trained = [p for p in parameters if p.trained]
    gradients = [rehearsal.gradients[p.name] for p in trained]
    try:
        user = probe(optimizer, [p.tensor for p in trained])
        subject = user, [p.name for p in trained], gradients, [p.unit for p in trained], floor
        try:
            plan = plan_update(*subject, choices)
        except IndexError:  # choices for another plan
            plan = plan_update(*subject)
        check_update(plan, gradients)
    except NotFollowed as error:
        raise NotOnEngine(optimizer, error.reason) from None
    return plan


def slot_target(plan: UserPlan, which: SlotId) -> str:
    """The target of a state's port."""
    return f"{plan.names[which[0]]}/state.{which[1]}"


def user_ports(plan: UserPlan) -> list[Port]:
    """The ports of the optimizer's state."""
    ports = []
    for which, slot in plan.slots.items():
        target, shape, scale = slot_target(plan, which), slot.shape or (1,), 2.0**slot.exponent
        ports.append(Port(identifier(target), shape, "state", target, scale))
        if slot.residual_scale:
            target = f"{target}/{RESIDUAL}"
            ports.append(Port(identifier(target), shape, "state", target, scale * slot.residual_scale))
    return ports


def user_update(
    plan: UserPlan, state: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor],
    scalars: Mapping[str, torch.Tensor], gate: torch.Tensor,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The next state by target; `scalars` by port name."""
    weights = [(state[name], state[f"{name}/{RESIDUAL}"]) for name in plan.names]
    targets = {which: slot_target(plan, which) for which in plan.slots}
    states = {which: (state[t], state.get(f"{t}/{RESIDUAL}")) for which, t in targets.items()}

    def feed(port: ScalarPort) -> torch.Tensor:
        return scalars[port.name]

    new_weights, new_states = plan.apply(weights, [gradients[n] for n in plan.names], states, feed, gate)
    changed = {plan.names[i]: pair for i, pair in new_weights.items()}
    changed |= {targets[which]: pair for which, pair in new_states.items()}
    result = {target: hi for target, (hi, _) in changed.items()}
    return result | {f"{target}/{RESIDUAL}": lo for target, (_, lo) in changed.items() if lo is not None}
