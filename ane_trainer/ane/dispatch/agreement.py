"""The proof of a step: its loss and its update of each parameter against plain PyTorch in fp32."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ane_trainer.ane.capture import get_loss
from ane_trainer.ane.capture.batches import program_form
from ane_trainer.ane.capture.calibrate import call_aside, call_loss, module_mode, state_copies
from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.capture.randomness import drawn_by
from ane_trainer.ane.capture.range.departure import Departure, Rounded
from ane_trainer.ane.capture.rewrites.keras_variables import copy_of, has_layers
from ane_trainer.ane.capture.stand_ins import StandIns
from ane_trainer.ane.capture.trace.torch_private import optimizers_without_dynamo, step_without_dynamo
from ane_trainer.ane.dispatch.loading import Subject
from ane_trainer.ane.errors import NumericsWarning

#: Relative differences up to which a step agrees without question; beyond, fp16's own error is asked for.
LOSS_TOLERANCE, UPDATE_TOLERANCE = 0.01, 0.02
#: A weight in two fp16 numbers is exact to this share of itself, which may move updates by the second.
_RESOLUTION, _UNRESOLVED_TOLERANCE = 2.0**-22, 0.05
#: A step may differ by this many times what rounding every result to fp16 does.
_OWN_ERRORS, _LARGEST_OWN = 3.0, 0.1
#: Share of a gradient's mean size by which its entries may be off, at first and where a step seems to depart (the
#: engine's tables), and how much an update may change by that.
_NOISE, _LARGEST_NOISE, _ALIKE = 2.0**-9, 0.01, 0.1
#: Below this share of the largest gradient's size one counts as what cancellation left; and one of which rounding
#: leaves nothing below the second.
_LEAST_GRADIENT, _CANCELLED = 1e-4, 1e-3
#: What an entry with next to no gradient counts, against one of at least the mean size.
_LEAST_WEIGHT = 0.05
_HALVES = (torch.bfloat16, torch.float16)
#: What running a user's model, loss and optimizer on copies may raise: then there is nothing to compare with.
_CANNOT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Agreement:
    """How step number `step` compares with fp32: relative differences of the loss, of all updates together, and of
    each parameter's, over the entries that rounding leaves determined, small gradients counting less.

    `fp16` is what rounding alone does to the gradients, None where it was not asked for; `first` names the
    operation that departs. `resolved`: of all updates, beyond what a weight in two numbers cannot resolve.
    """

    step: int
    loss: float
    update: float
    updates: Mapping[str, float] = field(repr=False)
    fp16: float | None = None
    first: Departure | None = None
    resolved: float = math.inf

    @property
    def agrees(self) -> bool:
        """Whether the differences are within what fp16 itself costs."""
        own = _OWN_ERRORS * min(self.fp16 or 0.0, _LARGEST_OWN)
        small = self.resolved <= UPDATE_TOLERANCE and self.update <= _UNRESOLVED_TOLERANCE
        return self.loss <= max(LOSS_TOLERANCE, own) and (small or self.update <= max(UPDATE_TOLERANCE, own))

    def __str__(self) -> str:
        if math.isnan(self.loss):
            return "the loss of this batch is nan in fp32"
        verb = "agrees with" if self.agrees else "departs from"
        if not self.updates:
            return f"{verb} fp32: loss {self.loss:.0e}, no update to compare".replace("e-0", "e-")
        update = f"{100 * self.update:.1f} %" if self.update < 10.0 else "10 times too far or more"
        text = f"{verb} fp32: loss {self.loss:.0e}, updates {update}".replace("e-0", "e-")
        if not self.agrees or self.update <= UPDATE_TOLERANCE:
            return text
        if self.resolved <= UPDATE_TOLERANCE:
            return f"{text}, less than its weights resolve"
        return f"{text} (rounding alone costs {100 * (self.fp16 or 0.0):.1f} %)"

    def to_json(self) -> dict[str, object]:
        """As it stands in result.json."""
        worst = max(self.updates, key=lambda name: self.updates[name], default=None)
        return {
            "step": self.step, "agrees": self.agrees, "loss": self.loss, "update": self.update,
            "worst_parameter": worst, "worst_update": None if worst is None else self.updates[worst],
            "fp16": self.fp16, "first": None if self.first is None else str(self.first),
        }  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What PyTorch makes of a batch: the loss, each parameter's change (None while batches accumulate, or if the
    optimizer draws random numbers), and what each entry of the change counts, for a relative error of gradients and the
    parameters of which rounding leaves no gradient.
    """

    loss: float
    changes: Mapping[str, torch.Tensor] | None
    weights: Callable[[float, Collection[str]], Mapping[str, torch.Tensor]] = field(
        default=lambda noise, lost: {}, repr=False
    )
    before: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def without_update(self) -> Reference:
        """The loss alone, of a step that was skipped."""
        return Reference(self.loss, None)


def reference(
    subject: Subject, options: GradientOptions, draws: torch.Generator, parts: Sequence[tuple[object, object]]
) -> Reference | None:
    """One step in fp32 on copies of model, loss and optimizer; None where that cannot run, or is infinite.

    A model with Keras layers, which deep copies do not always keep, runs itself, and is put back. Of a loss that is nan
    there is no more than that.

    The loss is the mean of those of the batch's `parts` (x, y). Dropout and noise come from `draws`; PyTorch's own
    generator is left as it is.
    """
    in_place = has_layers(subject.model)
    try:
        model, loss, optimizer = copied(subject, of_model=not in_place)
        as_it_is = model.training or subject.as_it_is
        if not in_place and any(p.dtype in _HALVES for p in model.parameters()):
            model.float()  # whose updates are of eight bits in PyTorch, and of more here
            parts = [(program_form(x), program_form(y)) for x, y in parts]
        with (
            _put_back(model) if in_place else contextlib.nullcontext(),
            contextlib.nullcontext() if as_it_is else module_mode(model, training=True),
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
            optimizers_without_dynamo(),
        ):
            optimizer.zero_grad()
            start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            copies = dict(model.named_parameters()) | dict(model.named_buffers())
            # the stand-ins are for hooks and losses that hold the originals
            with drawn_by(draws), StandIns(subject.model, copies):
                values = [
                    call_loss(get_loss(loss), call_aside(model, {}, x), y, model, {}) / len(parts)
                    for x, y in parts
                ]
                torch.autograd.backward(values)
            for p in model.parameters():  # of an embedding(sparse=True)
                p.grad = p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad
            mean = float(torch.stack(values).sum().detach())
            found = _stepped(model, optimizer, options, mean, start)
        if in_place:
            found = dataclasses.replace(found, weights=functools.partial(_weights_in_place, model, found))
    except _CANNOT:
        return None
    lost = next((n for n, c in (found.changes or {}).items() if not bool(c.isfinite().all())), None)
    if lost is None and math.isfinite(found.loss):
        return found
    nan = math.isnan(found.loss)
    what = "the loss of this batch" if nan or math.isinf(found.loss) else f"the update of {lost}"
    fault, advice = ("nan", _NAN) if nan else ("not finite", _INFINITE)
    warnings.warn(f"{what} is {fault} in plain PyTorch: {advice}", NumericsWarning, stacklevel=4)
    return found.without_update() if nan else None


#: What is to be said of a batch of which PyTorch makes no numbers.
_NAN = """the engine has no nan, and what it computes instead means nothing. \
Look for logarithms and roots of negative numbers, and for 0 / 0."""
_INFINITE = """the engine computes what it can, compared with nothing. Look for \
logarithms and roots of 0, and exponentials that overflow: add an epsilon, or torch.where before."""
#: What is to be said of a loss of 0 that is nan in PyTorch.
NAN_LOSS = (
    "the loss of this batch is nan in plain PyTorch (0 / 0: a mean over labels that are all left out, say); the engine "
    "has no nan and gives 0. Leave such batches out, or divide by the count clamped to 1."
)


def nan_in_pytorch(subject: Subject, x: object, y: object) -> bool:
    """Whether the model's weights, as they are now, have a loss on this batch that is nan in plain PyTorch.

    The model and PyTorch's generator are left as they were.
    """
    model = subject.model
    own = state_copies(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), module_mode(model, training=True):
            with drawn_by(torch.Generator()):
                value = call_loss(get_loss(subject.loss), call_aside(model, own, x), y, model, own)
            return bool(value.isnan().any())
    except _CANNOT:
        return False


def _stepped(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    options: GradientOptions,
    loss: float,
    start: Mapping[str, torch.Tensor],
) -> Reference:
    """The reference of a model whose gradients are there; `start` are its parameters before the forward, which may
    change some itself (`nn.Embedding(max_norm=...)`).
    """
    if options.accumulate > 1:
        return Reference(loss, None)
    parameters = [p for p in model.parameters() if p.grad is not None]
    if options.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, options.clip_value)
    if options.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = {
        n: start[n] if torch.equal(p, start[n]) else p.detach().clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    drawn = torch.get_rng_state()
    trained = {n: p for n, p in model.named_parameters() if n in gradients}  # the rest of the copy may go
    changes = _changes(trained, optimizer, before)
    if not torch.equal(drawn, torch.get_rng_state()):
        return Reference(loss, None)
    weights = functools.partial(_weights, trained, optimizer, before, gradients, changes)
    whole = {n: c if before[n] is start[n] else c + (before[n] - start[n]) for n, c in changes.items()}
    return Reference(loss, whole, weights, before, gradients)


def _weights_in_place(
    model: torch.nn.Module, found: Reference, noise: float, lost: Collection[str]
) -> Mapping[str, torch.Tensor]:
    """`found.weights(noise, lost)`, for which the model has its parameters of then, and is put back."""
    with _put_back(model), torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found.before:
                parameter.copy_(found.before[name])
        return found.weights(noise, lost)


@contextlib.contextmanager
def _put_back(model: torch.nn.Module) -> Iterator[None]:
    """After the block parameters, gradients and buffers are what they were."""
    gradients = {p: p.grad for p in model.parameters()}
    values = {t: t.detach().clone() for t in (*model.parameters(), *model.buffers())}
    for p in gradients:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in gradients.items():
            p.grad = gradient
        for tensor, value in values.items():
            tensor.data.copy_(value)


def copied(subject: Subject, *, of_model: bool = True) -> tuple[Any, Any, torch.optim.Optimizer]:
    """Copies of model, loss and optimizer that refer to one another as these do; or a copy of the optimizer alone.

    `torch.optim.Optimizer` leaves out what a subclass keeps as attributes: those follow, but for a step that a
    scheduler wrapped, and hooks.
    """
    kept: dict[int, Any] = {} if of_model else {id(p): p for p in subject.model.parameters()}
    model = copy_of(subject.model, kept) if of_model else subject.model
    loss = copy.deepcopy(subject.loss, kept) if of_model else subject.loss
    optimizer = copy.deepcopy(subject.optimizer, kept)
    for name, value in vars(subject.optimizer).items():
        if name not in vars(optimizer) and name != "step" and not name.endswith("_hooks"):
            vars(optimizer)[name] = copy.deepcopy(value, kept)
    return model, loss, optimizer


def _changes(
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    before: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What `optimizer.step()` does to each parameter with a gradient; parameters and state are put back."""
    with optimizers_without_dynamo():
        kept = copy.deepcopy(optimizer.state_dict())
        step_without_dynamo(optimizer)
    changes = {}
    for name, parameter in trained.items():
        if parameter.grad is not None and name in before:
            changes[name] = parameter.detach() - before[name]
            parameter.data.copy_(before[name])
    with optimizers_without_dynamo():
        optimizer.load_state_dict(kept)
    return changes


def _weights(
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    before: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    changes: Mapping[str, torch.Tensor],
    noise: float,
    lost: Collection[str],
) -> dict[str, torch.Tensor]:
    """What each entry counts: nothing of a small gradient `lost` in rounding, nothing if it moves otherwise once
    its gradient changes by `noise` of the mean size, up or down; then as its gradient's share of that size, 1 at most.

    Adam's first step is the gradient's sign: of the smallest no arithmetic of eleven bits can tell it, and a ReLU
    that opens for one sample more turns small ones, which hardly matter, as far as the largest.
    """
    sure = {name: torch.ones_like(change, dtype=torch.bool) for name, change in changes.items()}
    sizes = {name: float(g.square().mean().sqrt()) for name, g in gradients.items()}
    least = _LEAST_GRADIENT * max(sizes.values(), default=0.0)  # a bias before a batch norm has 1e-9
    for sign in (noise, -noise):
        for name, parameter in trained.items():
            parameter.grad = gradients[name] + sign * max(sizes[name], least)
        for name, moved in _changes(trained, optimizer, before).items():
            sure[name] &= (moved - changes[name]).abs() <= max(_ALIKE, 2 * noise) * changes[name].abs()
    return {
        name: torch.zeros_like(changes[name])
        if name in lost and sizes[name] < _CANCELLED * max(sizes.values())
        else alike * (gradients[name].abs() / max(sizes[name], 1e-38)).clamp(_LEAST_WEIGHT, 1.0)
        for name, alike in sure.items()
    }


def compare(
    step: int,
    loss: float,
    changes: Mapping[str, torch.Tensor],
    expected: Reference,
    noise: float = _NOISE,
    lost: Collection[str] = (),
) -> Agreement:
    """The relative differences between what a step did and what it should have done."""
    updates, errors, sizes, unresolved = {}, 0.0, 0.0, 0.0
    weights = expected.weights(noise, lost)
    for name, want in (expected.changes or {}).items():
        weight = weights[name]
        apart = ((changes[name] - want) * weight).abs()
        error, size = float(apart.norm()), float((want * weight).norm())
        if name in expected.before:
            apart = (apart - expected.before[name].abs() * _RESOLUTION).clamp(min=0.0)
        unresolved += float(apart.norm()) ** 2
        updates[name] = error / size if size else 0.0 if not error else math.inf
        errors, sizes = errors + error**2, sizes + size**2
    update = math.sqrt(errors / sizes) if sizes else 0.0
    scale = max(abs(expected.loss), 1e-12)
    resolved = math.sqrt(unresolved / sizes) if sizes else update
    return Agreement(step, abs(loss - expected.loss) / scale, update, updates, resolved=resolved)


def explained(
    agreement: Agreement,
    changes: Mapping[str, torch.Tensor],
    expected: Reference,
    loss: float,
    rounded: Callable[[], Rounded],
    at_random: Iterable[float],
) -> Agreement:
    """The agreement with fp16's own error and the first operation that departs; warns if it is beyond that.

    Where no operation departs, the error is `at_random`'s too: of runs rounded up or down, until they explain it.
    """
    if (result := compare(agreement.step, loss, changes, expected, _LARGEST_NOISE)).agrees:
        return result  # the tables explain it, and no run in rounded arithmetic is needed
    run, more = rounded(), iter(at_random)
    result = _explained(agreement, changes, expected, loss, run)
    while not result.agrees and run.first is None and (error := next(more, None)) is not None:
        run = Rounded(max(run.gradient_error, error), None, run.lost)
        result = _explained(agreement, changes, expected, loss, run)
    if not result.agrees:
        worst = max(result.updates, key=lambda n: result.updates[n], default="none")
        place = f" First {run.first}." if run.first is not None else ""
        own = f"{100 * run.gradient_error:.1f} %" if run.gradient_error < 1.0 else "the whole gradient"
        warnings.warn(
            f"step {result.step} {result}; rounding to fp16 alone costs {own}. "
            f"Most in {worst}.{place} step.agreement.updates has every parameter.",
            NumericsWarning,
            stacklevel=4,
        )
    return result


def _explained(
    agreement: Agreement, changes: Mapping[str, torch.Tensor], expected: Reference, loss: float, run: Rounded
) -> Agreement:
    noise = max(_LARGEST_NOISE, 2.0 * run.gradient_error)
    again = compare(agreement.step, loss, changes, expected, noise, run.lost)
    return dataclasses.replace(again, fp16=run.gradient_error, first=run.first)


def judged(
    step: int, loss: float, changes: Mapping[str, torch.Tensor], expected: Reference, fp16: float | None
) -> Agreement:
    """The agreement, where `fp16` is known (of another run of this batch) with what that leaves undetermined."""
    found = compare(step, loss, changes, expected)
    if found.agrees or fp16 is None:
        return found
    return _explained(found, changes, expected, loss, Rounded(fp16, None))
