"""An optimizer's numbers at one moment, to go back to: after probing, and when a step was skipped."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ane_trainer.ane.capture.user_optimizer.following import NotFollowed

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CODE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
#: What torch.optim.Optimizer keeps itself.
_OWN = frozenset({"state", "param_groups", "defaults"})
_HOOKS = ("_optimizer_", "_zero_grad", "_patch")
_LARGEST_COPIED = 1


def check_attributes(optimizer: torch.optim.Optimizer) -> None:
    """Raises: NotFollowed if the optimizer keeps objects whose changes could not be taken back."""
    for name, value in vars(optimizer).items():
        if name not in _OWN and not name.startswith(_HOOKS) and not _copyable(value):
            raise NotFollowed(
                f"keeps a {type(value).__name__} ({name}), whose changes cannot be followed", place=False
            )
    for key, value in optimizer.state.items():
        if not isinstance(key, torch.Tensor) or not isinstance(value, dict):
            raise NotFollowed(f"keeps state that belongs to no parameter ({key!r})", place=False)
        if not all(isinstance(name, str) for name in value):
            raise NotFollowed("names its state by other things than texts", place=False)


class Snapshot:
    """The optimizer's state entries, groups and attributes now. Tensors in `moving` are kept as they are."""

    def __init__(self, optimizer: torch.optim.Optimizer, moving: Mapping[Any, torch.Tensor]) -> None:
        self._optimizer = optimizer
        self._moving = {id(t) for t in moving.values()}
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._state = {p: self._copied(s) for p, s in optimizer.state.items()}
        self._groups = [
            {k: self._copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups
        ]
        self._attributes = {k: self._copied(v) for k, v in vars(optimizer).items() if k not in _OWN}

    def restore(self) -> None:
        """Put everything back, into the same dictionaries."""
        optimizer = self._optimizer
        optimizer.state.clear()
        optimizer.state.update({p: self._given(s) for p, s in self._state.items()})
        for group, kept in zip(optimizer.param_groups, self._groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **{k: self._given(v) for k, v in kept.items()}})
        for key in set(vars(optimizer)) - set(self._attributes) - _OWN:
            delattr(optimizer, key)
        for key, value in self._attributes.items():
            setattr(optimizer, key, self._given(value))
        with torch.no_grad():
            for tensor, content in self._tensors:
                tensor.copy_(content)

    def counters(self) -> list[Callable[[int], None]]:
        """For each number that has grown by 1 since: a function that sets it forward."""
        optimizer = self._optimizer
        pairs: list[tuple[Any, Any]] = [(optimizer.state[p], kept) for p, kept in self._state.items()]
        pairs += list(zip(optimizer.param_groups, self._groups, strict=True))
        pairs.append((vars(optimizer), self._attributes))
        found = [_advance(now, key) for now, kept in pairs for key in kept if _grown(now.get(key), kept[key])]
        for tensor, content in self._tensors:
            if tensor.numel() == 1 and float(tensor) == float(content) + 1:
                found.append(lambda n, t=tensor: t.add_(n))  # type: ignore[misc]
        return found

    def changed(self) -> list[tuple[str, str]]:
        """(place, key) of the single numbers of groups and of the optimizer itself that are others now."""
        optimizer = self._optimizer
        before = {id(t): float(c) for t, c in self._tensors if t.numel() == 1}
        places: list[tuple[str, Any, Any]] = [("attribute", vars(optimizer), self._attributes)]
        pairs = zip(optimizer.param_groups, self._groups, strict=True)
        places += [(f"group/{i}", now, kept) for i, (now, kept) in enumerate(pairs)]
        return [
            (place, key)
            for place, now, kept in places
            for key, value in now.items()
            if key not in ("params", *_OWN) and not key.startswith("_") and _single(value)
            if float(value) != before.get(id(value), _value(kept.get(key)))
        ]

    def _copied(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._copied(v) for k, v in value.items()}
        if isinstance(value, (list, set)):
            return type(value)(self._copied(v) for v in value)
        small = isinstance(value, torch.Tensor) and value.numel() <= _LARGEST_COPIED
        if small and id(value) not in self._moving:
            self._tensors.append((value, value.detach().clone()))
        return value

    def _given(self, value: Any) -> Any:
        """A copy of a copy, so that the snapshot can be used again."""
        if isinstance(value, dict):
            return {k: self._given(v) for k, v in value.items()}
        if isinstance(value, (list, set)):
            return type(value)(self._given(v) for v in value)
        return value


def _single(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float))


def _value(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _grown(now: Any, before: Any) -> bool:
    numbers = isinstance(now, (int, float)) and isinstance(before, (int, float)) and not isinstance(now, bool)
    return numbers and now == before + 1


def _advance(place: dict[str, Any], key: str) -> Callable[[int], None]:
    return lambda steps: place.__setitem__(key, place[key] + steps)


def _copyable(value: Any) -> bool:
    if isinstance(value, (*_PLAIN, *_CODE)):
        return True
    if isinstance(value, torch.Tensor):
        return value.numel() <= _LARGEST_COPIED
    if isinstance(value, dict):
        return all(_copyable(v) for v in value.values())
    return isinstance(value, (list, tuple, set, frozenset)) and all(map(_copyable, value))
