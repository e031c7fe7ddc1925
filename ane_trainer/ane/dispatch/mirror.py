"""The engine's state and its mirror in PyTorch: module parameters, buffers and the optimizer's state.

On the engine a number is `hi + lo / 2^k` in two fp16 ports, in a power-of-two unit; in PyTorch it is one fp32
number in torch's own units and layout, so that state dicts and checkpoints are what PyTorch writes.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ane_trainer.ane.capture.buffers import BufferChanges
from ane_trainer.ane.capture.gradients import ACCUMULATED
from ane_trainer.ane.capture.optimizers.rule import RESIDUAL, Rule, Slot
from ane_trainer.ane.capture.optimizers.table import check_counters, plain, uneven_groups, updates_seen
from ane_trainer.ane.capture.ports import Parameter, find_parameters, float_buffers
from ane_trainer.ane.capture.scaling import FITS, SCALING
from ane_trainer.ane.capture.trace.torch_private import version
from ane_trainer.ane.dispatch.devices import Session
from ane_trainer.ane.dispatch.feeds import RANGES
from ane_trainer.ane.dispatch.fingerprint import Fingerprints
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Port

#: The largest magnitude of state after its unit moved up.
MOVED_PEAK = 2.0**13


class LiveState(defaultdict[Any, Any]):
    """`optimizer.state` that calls `refresh` before anyone looks into it; copies of it are ordinary ones."""

    def __init__(self, entries: Mapping[torch.Tensor, Any], refresh: Callable[[], None]) -> None:
        super().__init__(dict, entries)
        self._refresh = refresh

    def __reduce__(self) -> tuple[Any, ...]:
        self._refresh()
        return defaultdict, (dict,), None, None, iter(dict.items(self))

    def __copy__(self) -> Any:
        self._refresh()
        return defaultdict(dict, dict.items(self))


def _nothing() -> None:
    pass


def _refreshed(name: str) -> Callable[..., object]:
    plain = getattr(defaultdict, name)

    def method(self: LiveState, *args: object, **kwargs: object) -> object:
        self._refresh()
        return plain(self, *args, **kwargs)

    return method


for _name in (
    "__getitem__ __setitem__ __delitem__ __iter__ __len__ __contains__ __eq__ keys values items get pop popitem clear "
    "setdefault update"
).split():
    setattr(LiveState, _name, _refreshed(_name))


class Mirror:
    """Copies between a session and a module with its optimizer. `ports` are the state ports by target."""

    def __init__(
        self,
        session: Session,
        ports: Iterable[Port],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        precision: str = "fp16",
        changes: BufferChanges = BufferChanges(),  # noqa: B008  (immutable)
    ) -> None:
        self._range, self._session, self._optimizer = RANGES[precision], session, optimizer
        self._ports = {port.target: port for port in ports if port.role == "state"}
        self._rule = rule
        found = find_parameters(model, optimizer)
        self._trained = [p for p in found if p.trained and f"{p.name}/{RESIDUAL}" in self._ports]
        self.tensors: dict[str, torch.Tensor] = {p.name: p.tensor for p in found} | float_buffers(model)
        self._sources = _sources(model, optimizer)
        # parameters that a step does not change keep their bits: frozen ones, and all if the host updates them
        self._changing = {p.name for p in self._trained} | set(float_buffers(model))
        self._unwritten: set[str] = set()
        self._model, self._changes = model, changes
        self._fingerprints = Fingerprints(self.tensors)
        self._moments: tuple[Any, ...] = ()
        #: How many updates each trained parameter is behind the step's count: it was frozen, or joined later.
        self.lags: dict[str, int] = {}
        self._settings = self._settings_now()

    # Weights and buffers

    def keep_unwritten(self, outputs: Iterable[Port]) -> None:
        """Buffers that are no output of the step keep their bits; frozen parameters that are one change."""
        written = {p.target for p in outputs if p.role == "state"}
        self._unwritten = set(float_buffers(self._model)) - written
        self._changing = (self._changing | (written & self.tensors.keys())) - self._unwritten

    @torch.no_grad()
    def pull_weights(self, steps: int) -> None:
        """Engine -> module, for everything that a step changes; `steps` ran since the last time."""
        for name in self._changing:
            self._combine(name, self.tensors[name])
        self._changes.count(self._model, steps)
        self._fingerprints.note(self._changing)

    @torch.no_grad()
    def pull_unwritten(self) -> None:
        """Engine -> module, for buffers that no step changes and that a checkpoint brought: others keep their bits."""
        for name in self._unwritten:
            value, held = self.tensors[name], torch.zeros(self.tensors[name].shape)
            self._combine(name, held)
            if not torch.equal(held, value.float().to(self._range.dtype).float()):
                value.copy_(held)
                self._fingerprints.note({name})

    @torch.no_grad()
    def push_weights(self, changed_only: bool = False) -> None:
        """Module -> engine; with `changed_only`, only tensors that were changed since the last copy."""
        for name in self._fingerprints.changed() if changed_only else self.tensors:
            if name in self._ports:
                self._split(name, self.tensors[name].detach().float())
            elif changed_only:
                raise UsageError(
                    f"{name}: needs to stay as it was compiled, a quantized constant of the program; got other values. "
                    "Compile the step again for another base.",
                    code="ANE133",
                )
        self._fingerprints.note()

    def shares(self, other: Mirror, name: str) -> bool:
        """Whether a parameter or buffer is the same tensor in both."""
        return self.tensors.get(name) is other.tensors.get(name)

    def current(self) -> bool:
        """Whether the model's parameters and buffers still are the tensors that this copies to and from."""
        found = _sources(self._model, self._optimizer)
        return found.keys() == self._sources.keys() and all(found[n] is t for n, t in self._sources.items())

    def changed(self) -> bool:
        """Whether a parameter or buffer was changed by someone else since the last copy."""
        return bool(self._fingerprints.changed())

    @torch.no_grad()
    def pull(self, name: str, out: torch.Tensor) -> None:
        """Engine -> `out`, one parameter as the engine holds it; the module stays as it is."""
        self._combine(name, out)

    # The optimizer's state

    @torch.no_grad()
    def pull_moments(self, count: int) -> None:
        """Engine -> `optimizer.state`, as torch would have it after `count` updates."""
        if count == 0:
            return
        self.follow_settings(count)
        for settings in self._optimizer.param_groups:
            settings.update(self._rule.group_counters(count))
        for parameter, group, slots in self._slots():
            own = count - self.lags.get(parameter.name, 0)
            if own < 1:
                continue
            state = self._optimizer.state[parameter.tensor]
            for name, number in self._rule.counters(group, own).items():
                state[name] = torch.tensor(number)
            for slot in slots:
                if (value := state.get(slot.name)) is None:
                    value = state[slot.name] = torch.zeros(slot.shape or parameter.tensor.shape)
                self._combine(f"{parameter.name}/{slot.name}", value, slot.bias(group, own))
        self._moments = self._moments_now()

    def show_moments(self, pull: Callable[[], None]) -> None:
        """Have the method `pull` called before anyone looks into `optimizer.state`, while its object lives."""
        if not isinstance(self._optimizer.state, LiveState):
            method = weakref.WeakMethod(pull)
            self._optimizer.state = LiveState(self._optimizer.state, lambda: (method() or _nothing)())
            self._moments = self._moments_now()

    def moments_changed(self) -> bool:
        """Whether someone else changed `optimizer.state` since the last copy."""
        return bool(self._trained) and self._moments != self._moments_now()

    def _moments_now(self) -> tuple[object, ...]:
        """Identities and versions of what `optimizer.state` holds."""
        state = self._optimizer.state
        held = [value for entries in dict.values(state) for value in entries.values()]
        return id(state), [(id(v), version(v)) if isinstance(v, torch.Tensor) else v for v in held]

    @torch.no_grad()
    def follow_settings(self, count: int) -> None:
        """Correct moments for the bias that other betas give them, if those changed: state is kept corrected."""
        now = self._settings_now()
        if now == self._settings:
            return
        before, self._settings = self._settings, now
        for parameter, group, slots in self._slots():
            own = count - self.lags.get(parameter.name, 0)
            old = {**group, **dict(before[parameter.group or 0])}
            for slot in slots if own > 0 else ():
                was, bias = slot.bias(old, own), slot.bias(group, own)
                if was != bias:
                    value = torch.zeros(slot.shape or parameter.tensor.shape)
                    self._combine(f"{parameter.name}/{slot.name}", value, was)
                    self._split(f"{parameter.name}/{slot.name}", value / bias)

    def crowded(self) -> dict[str, float]:
        """Parameters whose state in `optimizer.state` is beyond their unit's range, with a factor that makes it fit."""
        found: dict[str, float] = {}
        for parameter, group, slots in self._slots():
            state = dict.get(self._optimizer.state, parameter.tensor, {})
            count = max(updates_seen(self._optimizer, parameter.tensor), 1)
            for slot in slots:
                value, scale = state.get(slot.name), self._ports[f"{parameter.name}/{slot.name}"].scale
                if value is None or not slot.power:
                    continue
                peak = float(value.detach().abs().max()) / slot.bias(group, count) * scale
                if MOVED_PEAK * 4.0 < peak < math.inf:
                    factor = 2.0 ** -math.ceil(math.log2(peak / MOVED_PEAK) / slot.power)
                    found[parameter.name] = min(found.get(parameter.name, 1.0), factor)
        return found

    def _settings_now(self) -> list[tuple[tuple[str, object], ...]]:
        """What the bias of moments depends on, by group."""
        names = ("betas", "alpha", "rho")
        return [tuple((n, g[n]) for n in names if n in g) for g in self._optimizer.param_groups]

    @torch.no_grad()
    def push_moments(self, changed_only: bool = False, applied: int | None = None) -> int | None:
        """`optimizer.state` -> engine; returns the number of updates it stands for, or is said to (`applied`).

        With `changed_only`, those entries that were changed since the last copy; None if others were not, for their
        count goes on. A state that was cleared stands for no update.
        """
        before, self._moments = self._moments, self._moments_now()
        old = set(before[1]) if changed_only and before and before[0] == self._moments[0] else set()
        count, kept = 0, False
        for parameter, group, _ in self._slots():
            if state := dict.get(self._optimizer.state, parameter.tensor, {}):
                count = max(count, int((group if self._rule.group_counters(1) else state).get("step", 1)))
        self._settings = self._settings_now()
        if uneven_groups(self._optimizer, self._rule) or any(self.lags.values()) or applied is not None:
            counted = "step" in self._rule.counters(plain(self._optimizer.param_groups[0]), 1)
            count = count if applied is None else applied
            for parameter, _, _ in self._slots() if counted and not self._rule.group_counters(1) else ():
                self.lags[parameter.name] = count - updates_seen(self._optimizer, parameter.tensor)
        for parameter, group, slots in self._slots():
            state = dict.get(self._optimizer.state, parameter.tensor, {})
            own = count - self.lags.get(parameter.name, 0)
            check_counters(parameter.name, state, self._rule.counters(group, max(own, 1)))
            for slot in slots:
                value = state.get(slot.name)
                if value is not None and (id(value), version(value)) in old:
                    kept = True
                    continue
                bias = slot.bias(group, own) if own > 0 else 1.0
                value = torch.zeros(slot.shape or parameter.tensor.shape) if value is None else value / bias
                self._split(f"{parameter.name}/{slot.name}", value.float())
        return None if kept else count

    # Units

    def set_units(self, units: Mapping[str, float], shift: float) -> None:
        """The units that the state is kept in from here on, and the power of two after clipping; nothing is scaled."""
        for name, unit in units.items():
            for target, power, factor in self.in_units(name):
                own = unit if target.endswith(f"/{ACCUMULATED}") else unit * shift
                self._ports[target] = dataclasses.replace(self._ports[target], scale=factor * own**power)

    def scaled(self, ports: Iterable[Port]) -> tuple[Port, ...]:
        """The ports, those of the state with the scales that they have now."""
        return tuple(
            dataclasses.replace(port, scale=self._ports[port.target].scale) if port.role == "state" else port
            for port in ports
        )

    def room(self, name: str) -> float:
        """The largest power of two that a parameter's unit can grow by without its state leaving the precision."""
        found = 2.0**24
        for target, power, _ in self.in_units(name):
            peak = float(np.abs(self._session.values(self._ports[target].name)).max(initial=0.0))
            if peak > 0.0:
                found = min(found, 2.0 ** (math.floor(math.log2(MOVED_PEAK / peak)) // power))
        return max(found, 1.0)

    def move(self, name: str, before_clipping: float, after_clipping: float) -> None:
        """Scale a parameter's state to a unit that changed by these factors (powers of two)."""
        for target, power, _ in self.in_units(name):
            factor = before_clipping if target.endswith(f"/{ACCUMULATED}") else after_clipping
            port = self._ports[target]
            if factor != 1.0:
                self._write(port, self._session.values(port.name) * np.float32(factor**power))
                self._ports[target] = dataclasses.replace(port, scale=port.scale * factor**power)

    def in_units(self, name: str) -> list[tuple[str, int, float]]:
        """(target, power of the unit in it, factor besides) of a parameter's state that is kept in its unit."""
        found = [(f"{name}/{ACCUMULATED}", 1, 1.0)]
        for _, _, slots in self._slots(name):
            for slot in slots:
                target = f"{name}/{slot.name}"
                found.append((target, slot.power, slot.factor))
                found.append((f"{target}/{RESIDUAL}", slot.power, slot.factor * slot.residual_scale))
        return [(t, power, factor) for t, power, factor in found if t in self._ports and power]

    # Loss scaling

    def scaling(self, name: str) -> float:
        """One number of the loss scaling's state."""
        return float(self._session.values(self._ports[SCALING + name].name)[0])

    def set_scaling(self, scale: float, good_steps: float = 0.0) -> None:
        """Set the loss scale (a power of two), its inverse and the count of good steps; sums of gradients fit."""
        self.write_scale(scale, good_steps)
        if SCALING + FITS in self._ports:
            self._session.write(self._ports[SCALING + FITS].name, np.ones(1, np.float32))

    def write_scale(self, scale: float, good_steps: float) -> None:
        """The loss scale, its inverse and the count of good steps; nothing else changes."""
        values = {"loss_scale": scale, "loss_scale_inverse": 1.0 / scale, "good_steps": good_steps}
        for name, value in values.items():
            self._session.write(self._ports[SCALING + name].name, np.full(1, value, np.float32))

    def accumulated_fits(self) -> bool:
        """Whether all batches that are being accumulated fitted."""
        return SCALING + FITS not in self._ports or self.scaling(FITS) > 0.0

    def try_again(self, fits: bool) -> None:
        """After a run that did not fit: whether the batches before it did."""
        if SCALING + FITS in self._ports:
            self._session.write(self._ports[SCALING + FITS].name, np.full(1, float(fits), np.float32))

    def drop_accumulated(self) -> None:
        """Empty the sums of gradients: the update that they were for is lost."""
        for target, port in self._ports.items():
            if target.endswith(f"/{ACCUMULATED}"):
                self._session.write(port.name, np.zeros(port.shape, np.float32))

    # Everything, exactly

    def state(self) -> dict[str, torch.Tensor]:
        """Every state port by target, in the user's units; exact, since units are powers of two."""
        values = {target: (self._session.values(p.name), p.scale) for target, p in self._ports.items()}
        return {t: torch.from_numpy(v / np.float32(scale)) for t, (v, scale) in values.items()}

    def set_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` returned; targets that are missing keep their value."""
        for target, port in self._ports.items():
            if target in tensors:
                self._write(port, tensors[target].float().numpy() * np.float32(port.scale))

    def _slots(self, only: str = "") -> list[tuple[Parameter, Mapping[str, Any], tuple[Slot, ...]]]:
        """By parameter, its settings and what the program keeps of it: not what settings of just now would add."""
        groups = {id(t): group for group in self._optimizer.param_groups for t in group["params"]}
        trained = [p for p in self._trained if only in ("", p.name)]
        found = [(p, groups[id(p.tensor)]) for p in trained if id(p.tensor) in groups]
        every = [(p, g, self._rule.slots(g, tuple(p.tensor.shape) or (1,))) for p, g in found]
        return [(p, g, tuple(s for s in of if f"{p.name}/{s.name}" in self._ports)) for p, g, of in every]

    def _combine(self, target: str, out: torch.Tensor, factor: float = 1.0) -> None:
        """out = (hi + lo) in torch's units."""
        hi = self._ports[target]
        lo = self._ports.get(f"{target}/{RESIDUAL}")
        value = torch.from_numpy(self._session.values(hi.name)).reshape(out.shape)
        if lo is not None:
            rest = torch.from_numpy(self._session.values(lo.name)).reshape(out.shape)
            torch.add(value, rest, alpha=hi.scale / lo.scale, out=out)
        else:
            out.copy_(value)
        if factor != 1.0 or hi.scale != 1.0:
            out.mul_(factor / hi.scale)

    def _split(self, target: str, value: torch.Tensor) -> None:
        """hi = value rounded to the program's precision, lo = what is left."""
        hi = self._ports[target]
        lo = self._ports.get(f"{target}/{RESIDUAL}")
        scaled = value if hi.scale == 1.0 else value * hi.scale
        rounded = scaled.clamp(-self._range.largest, self._range.largest).to(self._range.dtype)
        self._write(hi, rounded.numpy())
        if lo is not None:
            self._write(lo, ((scaled - rounded.float()) * (lo.scale / hi.scale)).numpy())

    def _write(self, port: Port, array: Array) -> None:
        self._session.write(port.name, array.astype(self._range.numpy, copy=False).reshape(port.shape))


def _sources(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The model's own parameters and buffers that a step holds, by name."""
    return {p.name: p.tensor for p in find_parameters(model, optimizer)} | float_buffers(model, dense=False)
