"""Side effects of a forward: buffers written in place or reassigned, counters, cumulative averages.

Float buffers are state of the engine. Integers are not: fp16 counts to 2048 only. So the host counts, and sends a
counter's value as a scalar where the step reads it. Batch norms with `momentum=None` average over all batches: the
host sends the weight of the newest.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ane_trainer.ane.capture.ports import float_buffers, identifier
from ane_trainer.ane.capture.trace.sources import FAULTS
from ane_trainer.ane.capture.trace.torch_private import pytree
from ane_trainer.ane.errors import Finding, NumericsWarning, UnsupportedModel, UsageError
from ane_trainer.ane.stages import Port

Tensors = dict[str, torch.Tensor]

#: What the targets of the host's scalars begin with: a counter's value, a batch norm's weight of the newest batch.
COUNTER, AVERAGE = "counter/", "average/"
_COUNT = "num_batches_tracked"
#: A counter is sent in two numbers that fp16 holds: how many of these it has, and the rest.
DIGIT = 1400  # its square is within what two numbers hold (2^21), with room for sums
#: How far counters are moved to see that every step adds the same.
_AHEAD = (1_000_003, 1)


@dataclass(frozen=True)
class BufferChanges:
    """`counters`: what a step adds to each integer buffer that it changes. `averaged`: paths of the batch norms."""

    counters: Mapping[str, int] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()

    def scalars(self) -> list[Port]:
        """Ports of the host's scalars; of a counter two, counted in DIGITs and what is left."""
        counts = [(COUNTER + name, 2, (-float(DIGIT), DIGIT - 1.0)) for name in self.counters]
        found = [*counts, *((AVERAGE + path, 1, None) for path in self.averaged)]
        return [
            Port(identifier(name), (size,), "scalar", name, bounds=bounds) for name, size, bounds in found
        ]

    def stand_ins(self, model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Tensors:
        """The counters by name, made of the host's scalars (by target)."""
        buffers, found = dict(model.named_buffers()), {}
        for name in self.counters:
            digits = values[COUNTER + name].to(torch.int64)
            found[name] = (
                (digits[:1] * DIGIT + digits[1:]).reshape(buffers[name].shape).to(buffers[name].dtype)
            )
        return found

    def averages(self, old: Tensors, newest: Tensors, values: Mapping[str, torch.Tensor]) -> Tensors:
        """Running statistics with the newest batch's in them: old + (newest - old) * weight."""
        names = [(f"{path}.{n}", path) for path in self.averaged for n in ("running_mean", "running_var")]
        return {n: old[n] + (newest[n] - old[n]) * values[AVERAGE + path] for n, path in names}

    def host_values(self, model: torch.nn.Module, steps: int) -> dict[str, list[float]]:
        """The scalars of the step after `steps` that the module's counters do not include yet.

        Raises: UsageError for a counter beyond DIGIT * DIGIT, other than a batch norm's.
        """
        buffers = dict(model.named_buffers())
        now = {n: int(buffers[n]) + each * steps for n, each in self.counters.items()}
        weights = {p: (self.counters[f"{p}.{_COUNT}"], now[f"{p}.{_COUNT}"]) for p in self.averaged}
        large = [n for n, value in now.items() if abs(value) >= DIGIT * DIGIT and not n.endswith(_COUNT)]
        if large:
            raise UsageError(
                f"{large[0]}: needs a count below {DIGIT * DIGIT}; got {now[large[0]]}. Count in larger units."
            )
        values = {COUNTER + n: [float(value // DIGIT), float(value % DIGIT)] for n, value in now.items()}
        return values | {AVERAGE + p: [each / (count + each)] for p, (each, count) in weights.items()}

    @torch.no_grad()
    def count(self, model: torch.nn.Module, steps: int) -> None:
        """Bring the module's counters up to date."""
        buffers = dict(model.named_buffers())
        for name, each in self.counters.items():
            if buffers[name].dtype == torch.bool:
                buffers[name].fill_(each > 0)
            else:
                buffers[name] += each * steps


def kept(state: Tensors, buffers: Tensors, ok: torch.Tensor) -> Tensors:
    """The new buffers, or the old ones where the batch did not fit."""
    return {
        name: torch.where(ok.reshape([1] * new.ndim) > 0, new, state[name].reshape(new.shape))
        for name, new in buffers.items()
    }


@contextlib.contextmanager
def forwarded(model: torch.nn.Module) -> Iterator[Tensors]:
    """A dictionary that holds the model's buffers as they are after a forward."""
    final: Tensors = {}
    handle = model.register_forward_hook(lambda *_: final.update(model.named_buffers()))
    try:
        yield final
    finally:
        handle.remove()


@contextlib.contextmanager
def newest_statistics(model: torch.nn.Module, changes: BufferChanges) -> Iterator[None]:
    """Batch norms that average over all batches give the newest batch's statistics."""
    modules = [model.get_submodule(path) for path in changes.averaged]
    for module in modules:
        module.momentum = 1.0  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.momentum = None  # type: ignore[assignment]


@contextlib.contextmanager
def kept_views(model: torch.nn.Module, stand_ins: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Attributes that are views of parameters and buffers (`self.row = self.memory[1:2]`) show the stand-ins."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    homes = {
        t.untyped_storage().data_ptr(): (t, stand_ins[n])
        for n, t in named.items()
        if n in stand_ins and t.numel() and t.layout == torch.strided
    }
    kept: list[tuple[dict[str, object], str, object]] = []
    try:
        for module in model.modules():
            space = vars(module)
            for name, value in list(space.items()):
                shown = _shown(value, homes)
                if shown is not value:
                    kept.append((space, name, value))
                    space[name] = shown
        yield
    finally:
        for space, name, value in kept:
            space[name] = value


def _shown(value: object, homes: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> object:
    """The same view of the tensor's stand-in; of a list or tuple, its items; other things as they are."""
    if type(value) in (list, tuple):
        items = [_shown(item, homes) for item in value]  # type: ignore[attr-defined]
        same = all(new is old for new, old in zip(items, value, strict=True))  # type: ignore[call-overload]
        return value if same else type(value)(items)  # type: ignore[call-arg]
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.numel():
        return value
    tensor, stand_in = homes.get(value.untyped_storage().data_ptr(), (None, None))
    if tensor is None or stand_in is None or not tensor.is_contiguous() or value.dtype != tensor.dtype:
        return value
    whole = stand_in if value.requires_grad else stand_in.detach()
    return whole.as_strided(value.shape, value.stride(), value.storage_offset() - tensor.storage_offset())


def find_changes(model: torch.nn.Module, final: Mapping[str, torch.Tensor]) -> BufferChanges:
    """What a calibrated forward changed: `final` are the buffers after it, the model's own are as before.

    Raises: UnsupportedModel listing the buffers that neither the engine nor the host keeps.
    """
    kept, counters, findings = float_buffers(model), {}, []
    for name, buffer in model.named_buffers():
        after = final.get(name, buffer)
        if after.shape == buffer.shape and (name in kept or torch.equal(after, buffer)):
            continue
        if after.shape == buffer.shape and buffer.numel() == 1 and not buffer.is_floating_point():
            counters[name] = int(after) - int(buffer)
        else:
            findings.append(_finding(name, buffer, after))
    if findings:
        raise UnsupportedModel("The forward changes buffers that are not kept from step to step:", findings)
    averaged = [
        path
        for path, module in model.named_modules()
        if f"{path}.{_COUNT}" in counters and getattr(module, "momentum", 0.0) is None
    ]
    return BufferChanges(counters, tuple(averaged))


def tell_of_stalls(
    model: torch.nn.Module,
    final: Mapping[str, torch.Tensor],
    carried: Collection[str],
    forward: Callable[[], object],
) -> None:
    """A NumericsWarning names float buffers that change by less than fp16 resolves at their size, but for `carried`.

    Not those that each `forward` recreates, as a power iteration its vectors: what is rounded there does not add up.
    """
    kept = float_buffers(model)
    for name, buffer in model.named_buffers():
        after = final.get(name, buffer)
        slow = name in kept and name not in carried and after.shape == buffer.shape and _stalls(buffer, after)
        if slow and _stays(model, buffer, after, name, forward):
            _warn_of_stall(name, buffer, after)


def _stays(
    model: torch.nn.Module,
    buffer: torch.Tensor,
    after: torch.Tensor,
    name: str,
    forward: Callable[[], object],
) -> bool:
    """Whether the forward leaves most of a difference in a buffer where it is, as a count or an average does."""
    before = buffer.detach().clone()
    try:
        with torch.no_grad(), forwarded(model) as final:
            buffer.mul_(1.125)
            forward()
            moved = float((final[name] - after).norm())
    except FAULTS:
        return True
    finally:
        with torch.no_grad():
            buffer.copy_(before)
    return moved > 0.5 * 0.125 * float(before.norm())


def _stalls(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether eleven bits take most of the changed entries' changes for others, by a quarter or more."""
    if not before.is_floating_point() or before.layout != torch.strided:
        return False
    old, new = before.float(), after.float()
    change = new - old
    moved = change.abs() > 2.0**-21 * old.abs()  # fp32's own rounding is no change
    wrong = (_eleven_bits(new) - _eleven_bits(old) - change).abs() > 0.25 * change.abs()
    return bool(moved.any()) and bool((wrong & moved).sum() > 0.5 * moved.sum())


def _eleven_bits(values: torch.Tensor) -> torch.Tensor:
    """Rounded as to fp16, at any exponent: small statistics are kept with a power of two."""
    significand, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(significand * 2048.0) / 2048.0, exponent)


def _warn_of_stall(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    at = int((after.float() - before.float()).abs().argmax())
    change = float(after.flatten()[at]) - float(before.flatten()[at])
    warnings.warn(
        f"{name}: the forward adds {change:.3g} to {float(before.flatten()[at]):g}, less than fp16 resolves there, in "
        "which the engine keeps float buffers: it will stand still or drift. Keep a count as an integer buffer, which "
        "the host counts, and an average nearer to 0 (of differences from a constant).",
        NumericsWarning,
        stacklevel=2,
    )


def check_counters(
    model: torch.nn.Module, changes: BufferChanges, example: object, forward: Callable[[Any], object]
) -> None:
    """The counters are counted by the host, so another batch at another count must add the same.

    `forward(example)` runs the model on a batch like this; one that it cannot take is passed over.

    Raises: UnsupportedModel listing the integer buffers to which a step adds now this, now that.
    """
    buffers = dict(model.named_buffers())
    names = [n for n in changes.counters if not n.endswith(_COUNT) and buffers[n].dtype != torch.bool]
    before = {n: buffers[n].clone() for n in names}
    for ahead in _AHEAD if names else ():
        try:
            with torch.no_grad(), forwarded(model) as final:
                for n in names:
                    buffers[n] += ahead
                forward(pytree.tree_map(_another, example))
                added = {n: int(final[n]) - int(buffers[n]) for n in names}
        except FAULTS:
            continue
        finally:
            for n in names:
                buffers[n].copy_(before[n])
        uneven = [
            Finding(
                n, "counter", f"grows by {changes.counters[n]} in one forward and by {added[n]} in another.",
                "Add the same number in each forward (self.n += 4), and take remainders where it is read; keep counts "
                "of what is in the data in a float buffer (exact up to 2048).",
            )
            for n in names
            if added[n] != changes.counters[n]
        ]  # fmt: skip
        if uneven:
            raise UnsupportedModel("The host counts integer buffers, by one number a step:", uneven)
        return


def _another(value: object) -> object:
    """A tensor of the same shape with other values that a model is likely to take."""
    if not isinstance(value, torch.Tensor) or not value.numel() or value.layout != torch.strided:
        return value
    if value.is_floating_point():
        return -value
    return ~value if value.dtype == torch.bool else torch.full_like(value, int(value.min()))


def _finding(name: str, buffer: torch.Tensor, after: torch.Tensor) -> Finding:
    if after.shape != buffer.shape:
        reason = f"changes its shape in the forward, from {tuple(buffer.shape)} to {tuple(after.shape)}."
        return Finding(name, "buffer", reason, "Register it in the shape that it will have.")
    if buffer.is_floating_point():
        return Finding(
            name, "buffer", "is changed by the forward, but not saved with the model (persistent=False).",
            "Register it with persistent=True.",
        )  # fmt: skip
    reason = f"holds {buffer.numel()} integers that the forward changes."
    return Finding(name, "buffer", reason, "Keep them as a float buffer (exact up to 2048).")
