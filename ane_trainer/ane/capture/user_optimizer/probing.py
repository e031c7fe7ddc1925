"""What a user's optimizer does in its first and in its later steps, and which of its numbers change.

`probe` follows the real optimizer object's `step` some times (`following.py`) and puts everything back: at the
first steps, at high step counts, with changed settings. Numbers that never change are compiled in; those that
change together become one leaf of the host's scalars (`coefficients.py`). `UserStep.replay` follows the step once
more before each update, which gives the leaves' values and tells whether the code still does the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ane_trainer.ane.capture.user_optimizer.coefficients import NOUGHT, Coefficient, Environment, number
from ane_trainer.ane.capture.user_optimizer.following import (
    Atom,
    Follower,
    NotFollowed,
    Trace,
    following,
    is_marked,
    unmark,
)
from ane_trainer.ane.capture.user_optimizer.snapshots import Snapshot, check_attributes
from ane_trainer.ane.capture.user_optimizer.unifying import Binding, matched

#: Steps in a row that are followed at compile time, and how far step counts are then set forward.
_STEPS_IN_A_ROW = 12
_JUMPS = (1000, 100_000)
_DRAWS = 3
#: What settings that are 0 are tried with.
_SMALL = 1e-2


@dataclass(frozen=True)
class Leaves:
    """Of a trace's numbers: the coefficient of each, and how to check and read their values."""

    coefficients: tuple[Coefficient, ...]
    representatives: Mapping[Coefficient, int]
    constants: np.ndarray[Any, Any] = field(repr=False)
    fixed: np.ndarray[Any, Any] = field(repr=False)
    leader: np.ndarray[Any, Any] = field(repr=False)

    def read(self, values: Sequence[float]) -> dict[Coefficient, float] | None:
        """Leaf -> value; None if a number changed that is compiled in, or two that were equal differ."""
        array = np.asarray(values)
        fixed = array[self.fixed] == self.constants
        if not bool(fixed.all()) or not bool((array == array[self.leader]).all()):
            return None
        return {leaf: float(array[i]) for leaf, i in self.representatives.items()}


@dataclass(frozen=True)
class Replay:
    """One followed step: whether it was the first, the leaves' values, and whether it follows many others."""

    first: bool
    values: Environment
    late: bool = False


@dataclass(eq=False)
class UserStep:
    """A user's optimizer, followed. `first` is None if the first step is like the others, or is in the past.

    `initial`: slot -> what it holds before the first step: a number, or an atom of a weight or gradient.
    `samples` are leaves' values at several steps, for choices of scale; the first one is the first step's.
    `tensors` are those of the state that live on the engine; `counting`: (place, key) of the numbers outside of the
    parameters' state that steps change.
    """

    optimizer: torch.optim.Optimizer
    parameters: tuple[torch.Tensor, ...]
    steady: Trace
    leaves: Leaves
    first: Trace | None
    first_leaves: Leaves | None
    initial: Mapping[tuple[int, str], float | Atom]
    samples: tuple[Replay, ...]
    tensors: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    counting: tuple[tuple[str, str], ...] = ()

    def replay(self) -> Replay:
        """Advance the optimizer's own numbers by one step and read them.

        Raises: NotFollowed if it does something else than what was compiled.
        """
        fresh = not any(True for _ in moving_state(self.optimizer, self.parameters))
        trace = _follow(self.optimizer, self.parameters, self.tensors, (fresh and self.first) or self.steady)
        if fresh and self.first is not None and trace.same_form(self.first):
            values = self._read(trace, self.first_leaves)
            return Replay(True, values)
        if trace.same_form(self.steady):
            return Replay(False, self._read(trace, self.leaves))
        binding = matched(trace, self.steady) if fresh and self.first is None else None
        if binding is None or not all(self._begins(trace, *item) for item in binding.slots.items()):
            raise NotFollowed("does other operations than in the steps before", place=False)
        known = _padded(trace.renumbered(binding.leaves), len(self.steady.values))
        return Replay(True, self._read(known, self.leaves))

    def _begins(self, trace: Trace, which: tuple[int, str], atom: Atom) -> bool:
        """Whether a state that stands for `atom` starts as compiled."""
        wanted = self.initial.get(which, 0.0)
        return atom == wanted if isinstance(wanted, tuple) else _filled(trace, atom) == wanted

    def _read(self, trace: Trace, leaves: Leaves | None) -> Environment:
        assert leaves is not None
        values = leaves.read(trace.values)
        if values is None:
            raise NotFollowed("uses another number where one is compiled in", place=False)
        return values


def _filled(trace: Trace, atom: Atom) -> float | None:
    return trace.values[atom[1]] if atom[0] == "fill" else None


def moving_state(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> Iterator[tuple[int, str, torch.Tensor]]:  # fmt: skip  # noqa: E501
    """(number of the parameter, key, tensor) for each tensor of the optimizer's state."""
    for i, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                yield i, key, value


def _follow(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
    slots: dict[tuple[int, str], torch.Tensor],
    model: Trace | None = None,
) -> Trace:
    """Follow one step. `slots` are the moving tensors of the state; new ones are added, all stay in the state."""
    follower = Follower(model)
    own = {id(p) for p in parameters}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    kept_gradients = [p.grad for p in others]
    for i, parameter in enumerate(others):
        parameter.grad = None
        follower.mark(parameter, ("foreign", i))
    gradients = [torch.empty_like(p) for p in parameters]
    states = [(i, k, t) for i, k, t in moving_state(optimizer, parameters) if (i, k) in slots]
    for i, parameter in enumerate(parameters):
        parameter.grad = gradients[i]
        follower.mark(parameter, ("weight", i))
        follower.mark(gradients[i], ("gradient", i))
    for i, key, tensor in states:
        follower.mark(tensor, ("slot", i, key))
    try:
        with following(follower):
            optimizer.step()
        _note_ends(follower, optimizer, parameters, slots)
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter, gradient in zip(others, kept_gradients, strict=True):
            parameter.grad = gradient
        unmark([*parameters, *others, *(t for _, _, t in states), *slots.values()])
    return follower.trace


def _note_ends(
    follower: Follower,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
    slots: dict[tuple[int, str], torch.Tensor],
) -> None:
    """Put the final values of weights and states into the trace, and the kept tensors into the state."""
    trace = follower.trace
    for i, parameter in enumerate(parameters):
        trace.weights[i] = follower.value(parameter) or ()
    for i, key, tensor in list(moving_state(optimizer, parameters)):
        atom = follower.value(tensor)
        if atom is None:
            continue
        trace.slots[i, key] = atom
        trace.shapes[i, key] = tuple(tensor.shape)
        kept = slots.get((i, key))
        if kept is None:
            kept = slots[i, key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        optimizer.state[parameters[i]][key] = kept


def probe(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> UserStep:
    """Follow `optimizer` over `parameters` (those that get gradients), and leave it as it was.

    Raises: NotFollowed with the reason why it cannot run on the engine.
    """
    check_attributes(optimizer)
    others = {id(p): p.grad for group in optimizer.param_groups for p in group["params"]}
    known = {p.dtype for p in parameters} | {torch.float32}
    if known != {torch.float32}:
        raise NotFollowed("has parameters that are not fp32", place=False)
    start = Snapshot(optimizer, {})
    try:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        with torch.random.fork_rng(devices=[]):
            return _probe(optimizer, tuple(parameters), start)
    except NotFollowed:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise NotFollowed(f"fails on tensors without content ({type(error).__name__}: {error})") from None
    finally:
        start.restore()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = others[id(p)]


def _probe(
    optimizer: torch.optim.Optimizer, parameters: tuple[torch.Tensor, ...], start: Snapshot
) -> UserStep:
    """The traces of the first and of later steps, in three settings: as they are, in a row, changed."""
    slots = _loaded_slots(optimizer, parameters)
    fresh = not any(True for _ in moving_state(optimizer, parameters))

    models: dict[bool, Trace] = {}  # by whether the state is there: shapes need not be found twice

    def run() -> Trace:
        there = any(True for _ in moving_state(optimizer, parameters))
        trace = _follow(optimizer, parameters, slots, models.get(there))
        models.setdefault(there, trace)
        return trace

    def again() -> None:
        slots.clear()
        start.restore()

    first = run() if fresh else None
    if first is None:
        slots |= _written(run(), slots)
        start.restore()
    before = Snapshot(optimizer, slots)
    rows = [run() for _ in range(_STEPS_IN_A_ROW)]
    counting = before.changed()
    other = next((i for i, trace in enumerate(rows) if not trace.same_form(rows[0])), None)
    if other is not None:
        raise NotFollowed(f"does other operations in step {other + 1 + fresh} than before", place=False)
    jumped = _jumps(optimizer, parameters, slots, rows[0])
    back = again if fresh else start.restore
    back()
    prospects = _prospects(optimizer, run, back, first, rows[0])
    changed_first, changed = _changes(optimizer, run, back, first, rows[0])
    _check_repeatable(run, back, first or rows[0])
    steady = [*rows, *jumped, *prospects, *changed]
    counts = (len(rows) if fresh else 0, len(rows) + len(jumped) + len(prospects))
    firsts = [] if first is None else [first, *changed_first]
    user = _assembled(optimizer, parameters, firsts, steady, counts, {} if fresh else slots)
    user.counting = tuple(counting)
    return user


def _assembled(
    optimizer: torch.optim.Optimizer, parameters: tuple[torch.Tensor, ...], firsts: list[Trace],
    steady: list[Trace], counts: tuple[int, int], slots: dict[tuple[int, str], torch.Tensor],
) -> UserStep:  # fmt: skip
    """`counts`: how many of `steady` follow each other from the first step on, and how many may be samples."""
    first, later = (firsts[0] if firsts else None), steady[0]
    binding = None if first is None else matched(first, later)
    initial = None if first is None or binding is None else _starts(binding, _leaves(firsts, first.used()))
    if first is None or (binding is not None and initial is not None):
        moved = []
        if binding is not None:
            moved = [_padded(t.renumbered(binding.leaves), len(later.values)) for t in firsts]
        leaves = _leaves([*moved, *steady], later.used())
        opening = [Replay(True, _known(leaves, moved[0]))] if moved else []
        samples = (*opening, *_samples(leaves, steady, counts))
        return UserStep(optimizer, parameters, later, leaves, None, None, initial or {}, samples, slots)
    leaves, first_leaves = _leaves(steady, later.used()), _leaves(firsts, first.used(), 1_000_000)
    samples = (Replay(True, _known(first_leaves, first)), *_samples(leaves, steady, counts))
    return UserStep(optimizer, parameters, later, leaves, first, first_leaves, {}, samples, slots)


def _starts(binding: Binding, leaves: Leaves) -> dict[tuple[int, str], float | Atom] | None:
    """What each state holds before the first step; None if that is a number that changes."""
    initial: dict[tuple[int, str], float | Atom] = {}
    for slot, atom in binding.slots.items():
        if atom[0] == "fill":
            constant = leaves.coefficients[atom[1]]
            if constant[0] != "number":
                return None
            initial[slot] = float(constant[1])
        else:
            initial[slot] = atom
    return initial


def _samples(leaves: Leaves, traces: list[Trace], counts: tuple[int, int]) -> list[Replay]:
    return [Replay(False, _known(leaves, t), i >= counts[0]) for i, t in enumerate(traces[: counts[1]])]


def _known(leaves: Leaves, trace: Trace) -> Environment:
    values = leaves.read(trace.values)
    assert values is not None
    return values


def _padded(trace: Trace, count: int) -> Trace:
    return Trace(values=trace.values + [0.0] * (count - len(trace.values)))


def _leaves(traces: Sequence[Trace], used: set[int], offset: int = 0) -> Leaves:
    """Numbers that are equal in all traces are constants; those with equal courses are one leaf.

    The ones that are not `used` do not matter.
    """
    table = np.array([t.values for t in traces])
    coefficients: list[Coefficient] = []
    seen: dict[bytes, int] = {}
    leader = []
    fixed = []
    for i in range(table.shape[1]):
        column = table[:, i]
        if i not in used:
            coefficients.append(NOUGHT)
            leader.append(i)
            continue
        if not np.isfinite(column).all():
            raise NotFollowed("computes with a number that is not finite", place=False)
        first = seen.setdefault(column.tobytes(), i)
        if (column == column[0]).all():
            coefficients.append(number(column[0]))
            fixed.append(i)
            leader.append(i)
        else:
            coefficients.append(("leaf", offset + first))
            leader.append(first)
    index = np.array(fixed, dtype=np.int64)
    named = {("leaf", offset + i): i for i in seen.values() if coefficients[i][0] == "leaf"}
    return Leaves(tuple(coefficients), named, table[0][index], index, np.array(leader, dtype=np.int64))


def _loaded_slots(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:  # fmt: skip  # noqa: E501
    """The state that is there already: everything but single numbers moves."""
    return {(i, k): t for i, k, t in moving_state(optimizer, parameters) if t.numel() > 1}


def _written(trace: Trace, slots: dict[tuple[int, str], torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    return {slot: torch.zeros(trace.shapes[slot]) for slot in trace.slots if slot not in slots}


def _jumps(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor],
    slots: dict[tuple[int, str], torch.Tensor], model: Trace,
) -> list[Trace]:  # fmt: skip
    """Steps with everything set forward that counts steps."""
    before = Snapshot(optimizer, slots)
    _follow(optimizer, parameters, slots, model)
    counting = before.counters()
    traces = []
    for jump in _JUMPS:
        for advance in counting:
            advance(jump)
        trace = _follow(optimizer, parameters, slots, model)
        if not trace.same_form(model):
            raise NotFollowed(f"does other operations after {jump} steps than before", place=False)
        traces.append(trace)
    return traces


def _usable(
    optimizer: torch.optim.Optimizer, run: Callable[[], Trace], again: Callable[[], None],
    first: Trace | None, steady: Trace,
) -> list[_Setting]:  # fmt: skip
    """The settings that can move: those that are 0 if the operations stay the same when they are not."""
    usable = []
    for place in _settings(optimizer):
        same = place.value != 0.0
        if not same:
            again()
            place.set(_SMALL)
            try:
                same = (first is None or run().same_form(first)) and run().same_form(steady)
            except (NotFollowed, ArithmeticError, RuntimeError, ValueError):
                same = False
        if same:
            usable.append(place)
    again()
    return usable


def _prospects(
    optimizer: torch.optim.Optimizer, run: Callable[[], Trace], again: Callable[[], None],
    first: Trace | None, steady: Trace,
) -> list[Trace]:  # fmt: skip
    """Later steps with what settings may become: what is 0 another number, a learning rate its schedule's largest."""
    zeros = [s for s in _usable(optimizer, run, again, first, steady) if s.value == 0.0]
    for place in zeros:
        place.set(_SMALL)
    raised = False
    for group in optimizer.param_groups:
        ends = [group.get(key) for key in ("lr", "initial_lr", "max_lr")]
        known = [float(rate) for rate in ends if isinstance(rate, (int, float))]
        if isinstance(group.get("lr"), float) and max(known) > group["lr"]:
            group["lr"], raised = max(known), True
    traces = []
    if zeros or raised:
        if first is not None:
            run()
        traces = [run()]
    again()
    return traces


def _changes(
    optimizer: torch.optim.Optimizer, run: Callable[[], Trace], again: Callable[[], None],
    first: Trace | None, steady: Trace,
) -> tuple[list[Trace], list[Trace]]:  # fmt: skip
    """(first, later) steps with other settings: every setting that can move without changing the operations."""
    generator = random.Random(0)
    usable = _usable(optimizer, run, again, first, steady)
    found: tuple[list[Trace], list[Trace]] = ([], [])
    for _ in range(_DRAWS):
        again()
        for place in usable:
            place.set(
                place.value * generator.uniform(0.9, 0.999)
                if place.value
                else generator.uniform(_SMALL / 2, _SMALL)
            )
        traces = ([] if first is None else [run()], [run(), run()])
        for kind, model in ((0, first), (1, steady)):
            for trace in traces[kind]:
                if model is not None and not trace.same_form(model):
                    raise NotFollowed("chooses its operations by the exact value of a setting", place=False)
            found[kind].extend(traces[kind])
    again()
    return found


def _check_repeatable(run: Callable[[], Trace], again: Callable[[], None], model: Trace) -> None:
    again()
    if run().values != model.values:
        raise NotFollowed("uses numbers that do not come from its settings and state alone", place=False)
    again()


@dataclass(frozen=True)
class _Setting:
    """One float of a parameter group."""

    value: float
    set: Callable[[float], None]


def _settings(optimizer: torch.optim.Optimizer) -> Iterator[_Setting]:
    for group in optimizer.param_groups:
        for key, value in list(group.items()):
            if key != "params":
                yield from _floats_of(group, key, value)


def _floats_of(group: dict[str, Any], key: str, value: Any) -> Iterator[_Setting]:
    if isinstance(value, float) and math.isfinite(value):
        yield _Setting(value, lambda new: group.__setitem__(key, new))
    elif isinstance(value, torch.Tensor) and value.numel() == 1 and not is_marked(value):
        shape, dtype = value.shape, value.dtype
        yield _Setting(float(value), lambda new: group.__setitem__(key, torch.full(shape, new, dtype=dtype)))
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            if isinstance(part, float):

                def put(new: float, i: int = i) -> None:
                    present = list(group[key])
                    present[i] = new
                    group[key] = tuple(present)

                yield _Setting(part, put)
