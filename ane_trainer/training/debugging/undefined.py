"""Finds the operation at which plain PyTorch itself leaves the numbers: nan or infinity in fp32."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ane_trainer.ane.capture import get_loss
from ane_trainer.ane.capture.calibrate import call_aside, call_loss
from ane_trainer.ane.capture.losses import loss_name
from ane_trainer.ane.capture.trace import sources
from ane_trainer.ane.capture.trace.torch_private import OpOverload, TorchDispatchMode, pytree, schema
from ane_trainer.ane.dispatch.agreement import copied
from ane_trainer.ane.dispatch.loading import Subject
from ane_trainer.training.debugging.report import Fault, Place
from ane_trainer.training.debugging.scores import Score
from ane_trainer.training.debugging.trials import NOT_FINITE

Args = tuple[object, ...]

_SOFTMAX = ("_softmax", "_log_softmax", "logsumexp")
#: What takes the place of -inf, and the least denominator, where a remedy is tried.
_LOW, _LEAST = -1e4, 1e-5

_MASK = (
    "Mask with a finite number ({low:g} in place of -inf), or take such rows out: "
    "torch.where(mask.any(-1, keepdim=True), softmax, 0)."
)
_AWAY = "Keep away from 0: an epsilon from 1e-5 on under the division, root or logarithm."
_DOMAIN = "Clamp what goes in to where the operation has values: x.clamp(min=1e-5)."
_RANGE = "Normalise before it, or clamp what goes in."


@dataclass
class _Event:
    """An operation that made nan or infinity of other numbers."""

    op: str
    place: str
    phase: str
    facts: str
    advice: str


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every operation: the first that makes nan, and the first that makes infinity of finite numbers.

    `instead` replaces the operands of one operation (name, place): how a remedy is tried.
    """

    def __init__(self, place: sources.Place, instead: tuple[str, str] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place, self.instead, self.phase = place, instead, "forward"
        self.nan: _Event | None = None
        self.infinite: _Event | None = None

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: dict[str, object] | None = None
    ) -> object:
        name = schema(func).name.partition("::")[2]
        if self.instead == (name, self.place.text or ""):
            args = tuple(_mended(name, i, a) for i, a in enumerate(args))
        before = _floats((args, kwargs))
        was_nan, was_infinite = any(map(_nan, before)), any(map(_infinite, before))
        result = func(*args, **(kwargs or {}))
        after = _floats(result)
        if self.nan is None and not was_nan and any(map(_nan, after)):
            self.nan = self._event(name, before, args, "nan")
        fresh = not (was_nan or was_infinite or _asked(args, kwargs))
        if self.infinite is None and fresh and any(map(_infinite, after)):
            self.infinite = self._event(name, before, args, "infinite")
        return result

    def _event(self, name: str, operands: list[torch.Tensor], args: Args, what: str) -> _Event:
        facts, advice = _masked(name, args) or _described(name, operands, what)
        return _Event(name, self.place.text or "", self.phase, facts, advice)

    def blamed(self) -> _Event | None:
        """Of nan: the operation that made it, or the one whose infinity it made it of; a mask's -inf is meant."""
        if self.nan is None or self.infinite is None or self.nan.op in _SOFTMAX:
            return self.nan or self.infinite
        return self.infinite


def undefined(subject: Subject) -> tuple[Fault, ...]:
    """The operation at which plain PyTorch's step on this batch leaves the numbers, none where it does not."""
    loss, numbers = _run(subject, None)
    event = numbers.blamed()
    if event is None:
        return ()
    mended, _ = _run(subject, (event.op, event.place))
    advice = event.advice
    if mended is not None and math.isfinite(mended) and not (loss is not None and math.isfinite(loss)):
        advice += f" With that plain PyTorch's loss is {mended:.4g}."
    place = Place.of(event.place, event.op)
    score = Score(False, note=NOT_FINITE)
    return (
        Fault(
            event.op.strip("_"), event.op, place, event.phase, "undefined", event.facts, score, advice=advice
        ),
    )


def _run(subject: Subject, instead: tuple[str, str] | None) -> tuple[float | None, _Numbers]:
    """Loss and what was seen of forward, loss and backward in plain PyTorch on copies; no loss where it raises."""
    model, loss, _ = copied(subject)
    if not (model.training or subject.as_it_is):
        model.train()
    place = sources.Place()
    numbers = _Numbers(place, instead)
    x, y = subject.example
    value = None
    with (
        _quiet(),
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        sources.watch_modules(model) as stack,
        contextlib.suppress(*sources.FAULTS),
        numbers,
    ):
        with sources.SourceMode(stack.here, place):
            output = call_aside(model, {}, x)
        numbers.phase, name = "loss", loss_name(subject.loss)
        with sources.SourceMode(partial(sources.loss_place, name), place):
            held = dict(model.named_parameters()) | dict(model.named_buffers())
            total = call_loss(get_loss(loss), output, y, subject.model, held)
        value = float(total.detach())
        numbers.phase = "backward"
        sources.follow_backward(total, place)
        torch.autograd.backward([total])
    return value, numbers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _masked(name: str, args: Args) -> tuple[str, str] | None:
    """Facts and advice for a softmax of rows that a mask leaves nothing of; None of anything else."""
    if name not in _SOFTMAX or len(args) < 2 or not isinstance(args[0], torch.Tensor):
        return None
    rows = args[0].isneginf()
    for dim in pytree.tree_leaves(args[1]):
        rows = rows.all(dim, keepdim=True)
    many = int(rows.sum())
    facts = (
        f"{many:,} of its rows are -inf throughout, masked entry by entry: their softmax is nan in PyTorch"
    )
    return (facts, _MASK.format(low=_LOW)) if many else None


def _described(name: str, operands: list[torch.Tensor], what: str) -> tuple[str, str]:
    """Facts and advice for an operation that made nan or infinity of these operands."""
    shown = f"makes {what} of finite numbers" if what == "infinite" else "makes nan"
    for kinds, of, facts, advice in _CAUSES:
        if name in kinds and operands and of(operands):
            return f"{facts}: plain PyTorch {shown}", advice
    return f"plain PyTorch {shown} here", _RANGE


def _zero_below(operands: list[torch.Tensor]) -> bool:
    return bool((operands[-1] == 0).any())


def _zero(operands: list[torch.Tensor]) -> bool:
    return bool((operands[0] == 0).any())


def _negative(operands: list[torch.Tensor]) -> bool:
    return bool((operands[0] < 0).any())


#: Operations, what their operands have, in words, and what helps.
_CAUSES: tuple[tuple[tuple[str, ...], Callable[[list[torch.Tensor]], bool], str, str], ...] = (
    (("div", "div_", "reciprocal"), _zero_below, "it divides by 0", _AWAY),
    (("log", "log2", "log10", "sqrt", "rsqrt", "pow"), _negative, "its operand is negative", _DOMAIN),
    (("log", "log2", "log10", "rsqrt", "pow"), _zero, "its operand is 0", _AWAY),
    (("exp", "exp2", "expm1"), lambda o: bool((o[0] > 88).any()), "its operand is beyond 88", _RANGE),
)


def _mended(name: str, index: int, operand: object) -> object:
    """An operand with the remedy applied."""
    if not isinstance(operand, torch.Tensor) or not operand.is_floating_point():
        return operand
    if name in _SOFTMAX:
        return operand.clamp_min(_LOW)
    if name.startswith("div") and index == 1:
        return torch.where(operand.abs() < _LEAST, torch.full_like(operand, _LEAST), operand)
    if name in ("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "pow"):
        return operand.clamp_min(_LEAST) if index == 0 else operand
    return operand


def _asked(args: object, kwargs: object) -> bool:
    """An infinity stands in the call: a mask's."""
    return any(isinstance(a, float) and math.isinf(a) for a in pytree.tree_leaves((args, kwargs)))


def _floats(values: object) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _nan(tensor: torch.Tensor) -> bool:
    return bool(tensor.isnan().any())


def _infinite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isinf().any())
