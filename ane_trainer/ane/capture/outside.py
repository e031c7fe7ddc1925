"""Effects of a forward outside its tensors: draws from Python's and NumPy's generators, and counters in Python numbers.

A program runs no Python, so that both would stay what they were when it was captured. The calibration's forward is
watched: what it draws or counts, and what its numbers depend on, is refused by module and name.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ane_trainer.ane.errors import Finding, UnsupportedModel

#: How far counters are moved to see whether the loss depends on them: the next step's, and one of a later epoch.
_AHEAD = (1, 1000)
Number = int | float
Key = tuple[object, str]


def refuse_gradient_hooks(model: torch.nn.Module) -> None:
    """Raises: UnsupportedModel for hooks on the gradients of parameters: a program calls none."""
    hooked = [
        Finding(
            name, "hook", "has a hook on its gradient, which no program calls.",
            "Clip with the gradient options, do the same to a tensor of the forward (h.register_hook is followed), or "
            'use torch.compile(model, backend="ane") with your own loop, where hooks run.',
        )
        for name, p in model.named_parameters()
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
    ]  # fmt: skip
    if hooked:
        raise UnsupportedModel("The step runs code of yours on finished gradients:", hooked)


@contextlib.contextmanager
def nothing_outside(model: torch.nn.Module, loss: object, value: Callable[[], float]) -> Iterator[None]:
    """Watch the block, a forward and its loss; `value()` runs both once more, for the loss as a number.

    Python numbers that the block changes have their old values afterwards.

    Raises: UnsupportedModel for draws from foreign generators, and for counters that the loss depends on.
    """
    draws: dict[str, Finding] = {}
    before, states = _numbers(model, loss), _generators()
    with _watched_draws(model, draws):
        yield
    if not draws and _generators() != states:
        draws["loss"] = _drawn("loss", states, _generators())
    after = _numbers(model, loss)
    counted = {key: old for key, old in before.items() if after.get(key, old) != old}
    _set(counted)
    if draws:
        raise UnsupportedModel("The step draws random numbers that no program can:", list(draws.values()))
    found = [
        _counted(key, model, old, after[key])
        for key, old in counted.items()
        if _matters(key, old, value, counted)
    ]
    if found:
        raise UnsupportedModel("The step counts in Python numbers, and no program runs Python:", found)


@contextlib.contextmanager
def numbers_kept(model: torch.nn.Module, loss: object) -> Iterator[None]:
    """Python numbers that a forward within the block counts have their old values afterwards."""
    before = _numbers(model, loss)
    try:
        yield
    finally:
        after = _numbers(model, loss)
        _set({key: old for key, old in before.items() if after.get(key, old) != old})


@contextlib.contextmanager
def _watched_draws(model: torch.nn.Module, found: dict[str, Finding]) -> Iterator[None]:
    """Note the innermost modules in whose forward a foreign generator moves on."""
    stack: list[Any] = []
    handles = []
    for path, module in model.named_modules():

        def leave(_module: torch.nn.Module, _args: object, _output: object, path: str = path) -> None:
            states, now = stack.pop(), _generators()
            inner = any(name.startswith(f"{path}." if path else "") for name in found)
            if states != now and not inner:
                found[path] = _drawn(path or type(model).__name__, states, now)

        handles.append(module.register_forward_pre_hook(lambda *_: stack.append(_generators()), prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _generators() -> tuple[object, ...]:
    state: Any = np.random.get_state(legacy=False)
    return random.getstate(), (state["state"]["pos"], state["state"]["key"].tobytes(), state["has_gauss"])


def _drawn(where: str, before: tuple[object, ...], after: tuple[object, ...]) -> Finding:
    name = "random" if before[0] != after[0] else "numpy.random"
    return Finding(
        where, name, f"draws from Python's {name} in the forward; every step would have the same number.",
        "Draw with torch (torch.rand, torch.randint), which is drawn again each step, or draw in your loop and put the "
        "numbers into the batch.",
    )  # fmt: skip


def _numbers(model: torch.nn.Module, loss: object) -> dict[Key, Number]:
    """Every Python number among the attributes of modules, and of a loss that is an object."""
    owners: list[object] = [
        *model.modules(),
        *([loss] if hasattr(loss, "__dict__") and callable(loss) else []),
    ]
    found: dict[Key, Number] = {}
    for owner in owners:
        names = {**_class_numbers(type(owner)), **vars(owner)}
        found |= {(owner, n): v for n, v in names.items() if type(v) in (int, float)}
    return found


def _class_numbers(kind: type) -> dict[str, object]:
    """Class attributes, which `self.count += 1` reads first."""
    found: dict[str, object] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith(("torch", "builtins")):
            found |= {
                n: v for n, v in vars(base).items() if type(v) in (int, float) and not n.startswith("__")
            }
    return found


def _set(numbers: dict[Key, Number]) -> None:
    for (owner, name), value in numbers.items():
        setattr(owner, name, value)


def _matters(key: Key, old: Number, value: Callable[[], float], counted: dict[Key, Number]) -> bool:
    """Whether the loss is another one where the counter is further on."""
    results = []
    for ahead in (0, *_AHEAD):
        _set(counted | {key: old + ahead})
        results.append(value())
    _set(counted)
    return any(result != results[0] and result == result for result in results[1:])


def _counted(key: Key, model: torch.nn.Module, old: Number, new: Number) -> Finding:
    owner, name = key
    path = next((path for path, module in model.named_modules() if module is owner), "loss")
    where = f"{path}.{name}" if path else f"{type(model).__name__}.{name}"
    return Finding(
        where, "counter", f"is counted by the forward ({old} -> {new}), and the loss depends on it.",
        "Keep it as an integer buffer (register_buffer), which the host counts, or put it into the batch.",
    )  # fmt: skip
