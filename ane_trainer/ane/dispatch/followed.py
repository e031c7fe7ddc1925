"""The host's side of a user's optimizer that runs on the engine: its numbers before each step, its state in PyTorch.

The optimizer object stays the user's: its own `step` is followed before each dispatch (without touching a
tensor), which advances its step counts and says with which numbers the program is to be fed. A skipped step is
taken back. `optimizer.state` holds tensors that follow the engine's when the step is synchronised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ane_trainer.ane.capture.optimizers.scalars import LARGEST
from ane_trainer.ane.capture.user_optimizer.forms import TARGET
from ane_trainer.ane.capture.user_optimizer.keeping import FIRST, Kappas
from ane_trainer.ane.capture.user_optimizer.plan import NotOnEngine, UserPlan, slot_target
from ane_trainer.ane.capture.user_optimizer.probing import moving_state
from ane_trainer.ane.capture.user_optimizer.snapshots import Snapshot
from ane_trainer.ane.dispatch.mirror import Mirror
from ane_trainer.ane.errors import UnsupportedModel, UsageError

_KAPPA, _NUMBER = "kappa/", "number/"


class FollowedOptimizer:
    """Runs along with a step whose program holds `plan`."""

    def __init__(self, plan: UserPlan) -> None:
        self._plan = plan
        self._optimizer = plan.user.optimizer
        self._leaves = plan.known_leaves()
        self._kappas = Kappas(dict.fromkeys(plan.decays, 0.0))
        self._values = plan.scalars(plan.samples[0])
        self._before: tuple[Snapshot, Kappas] | None = None

    def advance(self) -> dict[str, float]:
        """One step of the optimizer's numbers; port name -> value. `finish` says whether it counts.

        Raises: NotFollowed, with everything as before, if it does something else than what was compiled;
        UsageError for a number beyond fp16.
        """
        before = Snapshot(self._optimizer, self._plan.user.tensors), self._kappas
        try:
            replay = self._plan.user.replay()
            leaves = {**self._leaves, **replay.values}
            environment, kappas = self._kappas.advance(leaves, replay.first)
            values = self._plan.scalars(environment)
            _check_range(values)
        except BaseException:
            before[0].restore()
            raise
        self._before, self._leaves, self._kappas, self._values = before, leaves, kappas, values
        return values

    def finish(self, applied: bool) -> None:
        """The step of the last `advance` was applied, or skipped: then it is taken back."""
        if self._before is not None and not applied:
            self._before[0].restore()
            self._kappas = self._before[1]
        self._before = None

    def waiting(self) -> dict[str, float]:
        """Port name -> value for a batch that only adds to the gradients: only that it is not the first matters."""
        ports = self._plan.ports
        return {**self._values, **{p.name: 0.0 for p in ports if p.coefficient == FIRST}}

    def ahead(self, steps: int) -> dict[str, float]:
        """Port name -> value of the update that comes `steps` after the next one; nothing changes."""
        kept = Snapshot(self._optimizer, self._plan.user.tensors), self._leaves, self._kappas, self._values
        try:
            for _ in range(steps + 1):
                values = self.advance()
        finally:
            kept[0].restore()
            _, self._leaves, self._kappas, self._values = kept
            self._before = None
        return values

    # -- state

    @torch.no_grad()
    def pull(self, mirror: Mirror) -> None:
        """Engine -> `optimizer.state`."""
        for which, slot in self._plan.slots.items():
            tensor = self._plan.user.tensors.get(which)
            if tensor is not None:
                factor = self._kappas.values.get(slot.decay, 1.0)
                mirror.pull(slot_target(self._plan, which), tensor, factor)

    @torch.no_grad()
    def push(self, mirror: Mirror) -> None:
        """`optimizer.state` -> engine; states that are not there start as they do in a first step."""
        self._adopt()
        tensors = self._plan.user.tensors
        self._kappas = Kappas(dict.fromkeys(self._plan.decays, 0.0))
        if tensors:
            self._kappas = self._settled()
        for which, slot in self._plan.slots.items():
            value = tensors.get(which)
            if value is None:
                mirror.push(slot_target(self._plan, which), torch.full(slot.shape, slot.initial))
            else:
                factor = self._kappas.values.get(slot.decay, 1.0)
                mirror.push(slot_target(self._plan, which), value.float() / factor)

    def state(self) -> dict[str, torch.Tensor]:
        """What the optimizer and this object keep besides the engine's tensors, as float64 numbers."""
        found = {f"{_KAPPA}{i}": _number(v) for i, v in enumerate(self._kappas.values.values())}
        for place, entries in self._places():
            for key, value in entries.items():
                kind = self._kind(place, key, value)
                if kind is not None:
                    found[f"{_NUMBER}{place}/{kind}/{key}"] = _number(value)
        started = bool(self._plan.user.tensors) and bool(self._optimizer.state)
        return found | {"started": _number(started)}

    def set_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` returned; the engine's tensors are put back elsewhere."""
        user = self._plan.user
        if bool(tensors.get("started", _number(0.0))):
            for i, key in self._plan.slots:
                entries = self._optimizer.state[user.parameters[i]]
                if not isinstance(entries.get(key), torch.Tensor):
                    entries[key] = torch.zeros(self._plan.slots[i, key].shape)
        values = {d: float(tensors[f"{_KAPPA}{i}"]) for i, d in enumerate(self._plan.decays)}
        self._kappas = Kappas(values)
        for place, entries in self._places():
            prefix = f"{_NUMBER}{place}/"
            for name, number in tensors.items():
                if name.startswith(prefix):
                    kind, key = name.removeprefix(prefix).split("/", 1)
                    entries[key] = _KINDS[kind](number)
        self._adopt()

    def _adopt(self) -> None:
        """The tensors in the optimizer's state are the ones to fill from here on."""
        user = self._plan.user
        user.tensors.clear()
        for i, key, tensor in moving_state(self._optimizer, user.parameters):
            if (i, key) in self._plan.slots:
                user.tensors[i, key] = tensor

    def _settled(self) -> Kappas:
        """Kappas for a state of unknown age: any will do; sums are brought to the size of their means."""
        values = dict(self._kappas.settled(self._leaves).values)
        for which, slot in self._plan.slots.items():
            tensor = self._plan.user.tensors.get(which)
            if slot.decay in values and values[slot.decay] == 1.0 and tensor is not None:
                peak = float(tensor.abs().amax()) * 2.0 ** (slot.exponent - TARGET)
                values[slot.decay] = max(values[slot.decay], peak)
        return Kappas(values)

    def _places(self) -> list[tuple[str, dict[str, Any]]]:
        """The dictionaries with the optimizer's own numbers."""
        optimizer, parameters = self._optimizer, enumerate(self._plan.user.parameters)
        places = [(f"state/{i}", optimizer.state[p]) for i, p in parameters if p in optimizer.state]
        places += [(f"group/{i}", group) for i, group in enumerate(optimizer.param_groups)]
        return [*places, ("attribute", vars(optimizer))]

    def _kind(self, place: str, key: str, value: Any) -> str | None:
        """How a number is kept; None for what is no number, a setting, or on the engine."""
        if not place.startswith("state") and (place, key) not in self._plan.user.counting:
            return None
        if isinstance(value, torch.Tensor):
            moves = any(value is t for t in self._plan.user.tensors.values())
            return f"tensor{value.ndim}" if value.numel() == 1 and not moves else None
        return type(value).__name__ if isinstance(value, (bool, int, float)) else None


def host_reason(error: UnsupportedModel) -> str:
    """Why a user's optimizer cannot be on the engine; empty if not it, or not it alone, was refused."""
    if isinstance(error, NotOnEngine):
        return error.reason
    about = [finding for finding in error.findings if finding.where.startswith("optimizer ")]
    if len(about) < len(error.findings) or not about:
        return ""
    return f"does what the engine refuses: {about[0].op} {about[0].reason.rstrip('.')}"


#: How the numbers come back.
_KINDS: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "bool": lambda n: bool(n),
    "int": lambda n: int(n),
    "float": lambda n: float(n),
    "tensor0": lambda n: n.float().clone(),
    "tensor1": lambda n: n.float().reshape(1).clone(),
}


def _number(value: Any) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _check_range(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not math.fabs(value) <= LARGEST:
            raise UsageError(
                f"optimizer: {name} needs a magnitude of at most {LARGEST:g} in the engine's units; got "
                f"{value:g}. Choose a smaller learning rate, or compile the step with it."
            )
