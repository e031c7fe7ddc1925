"""Runs a set-up and judges it: right, announced, silent or a raw exception, against PyTorch in fp64.

Right is within LOSS and UPDATE, or within OWN times what plain fp16 costs, over the entries of the update that it
leaves determined. That cost is measured: the same steps with batch, weights and each result of forward and backward
rounded to eleven bits (`Rounded`, without limits of range), to nearest once and up or down at random otherwise; the
largest error of FEW such runs, and of MANY where the step is beyond that: which of two near entries a max pool takes,
or whether a ReLU is open, is decided by the rounding, and a few runs may all decide alike.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import ane_trainer as at
from tests.hunt.further import CHANGES, OPTIMIZERS
from tests.hunt.setups import Setup

LOSS, UPDATE, OWN, NOISE = 0.02, 0.05, 3.0, 0.01
#: Beyond this own error rounding leaves nothing to be compared.
LARGEST_OWN = 0.3


@dataclass
class Way:
    """What a run shows: losses of steps, gradients of updates, parameters and buffers before and after the last."""

    losses: list[float] = field(default_factory=list)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def changes(self) -> dict[str, torch.Tensor]:
        return {n: self.after[n] - b for n, b in self.before.items()}


class Rounded(TorchDispatchMode):
    """Rounds each float result to eleven significant bits, of any exponent; with a seed up or down at random."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.draws = None if seed is None else torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = _tabled(func, args, kwargs or {})
        if any(r.alias_info is not None for r in func._schema.returns):
            return result
        return tree_map(self.rounded, result)

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The model's parameters with eleven bits; their gradients are those of the parameters."""
        return {n: p + (self.rounded(p.detach()) - p.detach()) for n, p in model.named_parameters()}

    def rounded(self, value: Any) -> Any:
        """The value, if it is a tensor of floats, with eleven significant bits."""
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        significand, exponent = torch.frexp(value)
        draws = self.draws
        half = 0.5 if draws is None else torch.rand(value.shape, generator=draws, dtype=value.dtype)
        return torch.ldexp(torch.floor(significand * 2048.0 + half) / 2048.0, exponent)


#: Steps of the engine's tables of activations: it interpolates between their knots.
TABLES = {
    "sigmoid": 0.5, "tanh": 0.125, "gelu": 0.25, "silu": 0.5, "softplus": 0.5, "mish": 0.25, "log_sigmoid_forward": 0.5,
    "gelu_backward": 0.25, "silu_backward": 0.5, "softplus_backward": 0.5, "mish_backward": 0.25,
    "log_sigmoid_backward": 0.5,
}  # fmt: skip


def _tabled(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The operation; of an activation, and of its derivative, what lies between two knots of its argument."""
    step = TABLES.get(func._schema.name.removeprefix("aten::"))
    if step is None:
        return func(*args, **kwargs)
    place = 1 if func._schema.name.endswith("_backward") else 0
    low = torch.floor(args[place] / step) * step
    share = (args[place] - low) / step
    ends = [func(*args[:place], low + more, *args[place + 1 :], **kwargs) for more in (0.0, step)]
    if isinstance(ends[0], tuple):
        return torch.lerp(ends[0][0], ends[1][0], share), *ends[0][1:]
    return torch.lerp(*ends, share)


def _floats(value: Any, like: torch.dtype) -> Any:
    return value.to(like) if value.is_floating_point() else value


def reference(
    setup: Setup,
    noise: Mapping[str, float] | None = None,
    rounded: Rounded | None = None,
) -> Way:
    """The set-up in fp64; each gradient changed by its share (`noise`) of its mean size, or everything rounded."""
    model = copy.deepcopy(setup.drawn.model).double()
    optimizer = OPTIMIZERS[setup.optimizer](model.parameters())
    way, count = Way(), int(setup.options.get("accumulate", 1))  # type: ignore[call-overload]
    for number, (x, y) in enumerate(setup.batches):
        last = number == len(setup.batches) - 1
        if last or (setup.often and number):
            CHANGES[setup.change](model, optimizer)
        if last:
            way.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        if number % count == 0:
            optimizer.zero_grad()
        x, y = _floats(x, torch.float64), _floats(y, torch.float64)
        weights: dict[str, torch.Tensor] = {}
        if rounded is not None:  # not within its block, where each result of this arithmetic would be rounded
            x, y, weights = rounded.rounded(x), rounded.rounded(y), rounded.weights(model)
        with rounded or contextlib.nullcontext():
            loss = setup.loss(torch.func.functional_call(model, weights, (x,)), y)
            torch.autograd.backward(loss / count)
        way.losses.append(float(loss.detach()))
        if (number + 1) % count == 0:
            way.gradients.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
            _disturb(model, noise or {})
            _clip(model, setup.options)
            optimizer.step()
    way.after = {n: p.detach().clone() for n, p in model.named_parameters()}
    way.buffers = {n: b.detach().clone() for n, b in model.named_buffers() if b.is_floating_point()}
    return way


def _disturb(model: nn.Module, noise: Mapping[str, float]) -> None:
    """Change gradients by a share of their size; the least counts as 1e-4 of the largest."""
    sizes = [float(p.grad.square().mean().sqrt()) for p in model.parameters() if p.grad is not None]
    least = 1e-4 * max(sizes, default=0.0)
    for n, p in model.named_parameters():
        if p.grad is not None and n in noise:
            p.grad += noise[n] * max(float(p.grad.square().mean().sqrt()), least)


def _clip(model: nn.Module, options: Mapping[str, Any]) -> None:
    parameters = [p for p in model.parameters() if p.grad is not None]
    if "clip_grad_value" in options:
        nn.utils.clip_grad_value_(parameters, options["clip_grad_value"])
    if "clip_grad_norm" in options:
        nn.utils.clip_grad_norm_(parameters, options["clip_grad_norm"])


def engine(setup: Setup) -> tuple[Way, str]:
    """The set-up as the product runs it, and what it announced."""
    model = copy.deepcopy(setup.drawn.model)
    optimizer = OPTIMIZERS[setup.optimizer](model.parameters())
    way, skipped = Way(), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run: Stepped | Looped = (Stepped if setup.door == "step" else Looped)(setup, model, optimizer)
        for number, (x, y) in enumerate(setup.batches):
            last = number == len(setup.batches) - 1
            if last or (setup.often and number):
                run.sync()
                CHANGES[setup.change](model, optimizer)
            if last:
                way.before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
            way.losses.append(run(number, x, y))
        run.sync()
        if run.skipped:
            skipped = f"{run.skipped} skipped"
    way.after = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    way.buffers = {n: b.detach().double().clone() for n, b in model.named_buffers() if b.is_floating_point()}
    told = [str(w.message)[:300] for w in caught if issubclass(w.category, at.NumericsWarning)]
    return way, "; ".join([*told, skipped] if skipped else told)


class Stepped:
    """The whole step, compiled."""

    def __init__(self, setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.step = at.compile_step(model, setup.loss, optimizer, setup.batches[0], **setup.options)  # type: ignore[arg-type]

    def __call__(self, number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        return float(self.step(x, y))

    def sync(self) -> None:
        self.step.sync()

    @property
    def skipped(self) -> int:
        return self.step.skipped_steps


class Looped:
    """A loop of the user's around the model that `torch.compile` gives, alone or with its loss."""

    skipped = 0

    def __init__(self, setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch._dynamo.reset()
        self.model, self.optimizer, self.options = model, optimizer, setup.options
        options = {"device": "sim", **{k: setup.options[k] for k in ("chip", "fidelity")}}
        if setup.door == "loss":
            self.loss = torch.compile(lambda x, y: setup.loss(model(x), y), backend="ane", options=options)
        else:
            compiled = torch.compile(model, backend="ane", options=options)
            self.loss = lambda x, y: setup.loss(compiled(x), y)

    def __call__(self, number: int, x: torch.Tensor, y: torch.Tensor) -> float:
        count = int(self.options.get("accumulate", 1))  # type: ignore[call-overload]
        if number % count == 0:
            self.optimizer.zero_grad()
        loss = self.loss(x, y)
        (loss / count).backward()
        if (number + 1) % count == 0:
            _clip(self.model, self.options)
            self.optimizer.step()
        return float(loss.detach())

    def sync(self) -> None:
        """Nothing to do: the weights are the user's."""


def judge(setup: Setup) -> tuple[str, str]:
    """(right, announced, silent, raw or void; what happened). Void: PyTorch itself gives no finite numbers."""
    try:
        want = reference(setup)
    except RuntimeError as error:
        return "void", str(error).splitlines()[0]
    if not all(map(math.isfinite, want.losses)) or not all(
        bool(v.isfinite().all()) for v in want.after.values()
    ):
        return "void", "not finite in fp64"
    try:
        got, told = engine(setup)
    except at.AneTrainerError as error:
        return "announced", f"{type(error).__name__} {error.code}: " + " ".join(str(error).split())[:300]
    except Exception as error:  # noqa: BLE001  (what is hunted)
        return "raw", f"{type(error).__name__}: {error}"
    facts, right = _compared(setup, want, got)
    if told:
        return "announced", f"{'(right) ' if right else ''}{facts}; {told}"
    return ("right" if right else "silent"), facts


#: Roundings whose largest error is fp16's own.
FEW, MANY = 3, 16


def _compared(setup: Setup, want: Way, got: Way) -> tuple[str, bool]:
    ways: list[Way] = []
    for count in (FEW, MANY):
        ways += [reference(setup, rounded=Rounded(seed or None)) for seed in range(len(ways), count)]
        text, right = _against(setup, want, got, ways)
        if right:
            break
    return text, right


def _against(setup: Setup, want: Way, got: Way, ways: Sequence[Way]) -> tuple[str, bool]:
    found = [_gradient_errors(way, want) for way in ways]
    noise = {n: max(NOISE, OWN * max(errors[n] for errors in found)) for n in found[0]}
    sure = _sure(setup, want, noise)
    own = [_errors(setup, way, want, sure) for way in ways]
    pairs = [(g, max(o), b) for g, o, b in zip(_errors(setup, got, want, sure), zip(*own, strict=True),
                                               (LOSS, UPDATE, UPDATE, LOSS), strict=True)]  # fmt: skip
    right = all(a <= max(bound, OWN * b) or b > LARGEST_OWN for a, b, bound in pairs)
    names = ("loss", "update", "way", "buffers")
    text = ", ".join(f"{n} {a:.2g} (own {b:.1g})" for n, (a, b, _) in zip(names, pairs, strict=True))
    worst = max(want.after, key=lambda n: _distance({n: got.changes()[n]}, {n: want.changes()[n]}, sure))
    return f"{text}, most in {worst}, loss {got.losses[-1]:.4g} for {want.losses[-1]:.4g}", right


def _errors(
    setup: Setup, way: Way, want: Way, sure: Mapping[str, torch.Tensor]
) -> tuple[float, float, float, float]:
    """Of losses, of the last update, of the whole way, of buffers."""
    whole = {n: torch.ones_like(v, dtype=torch.bool) for n, v in want.buffers.items()}
    weights = dict(setup.drawn.model.named_parameters())
    sizes = {n: torch.maximum(weights[n].detach().abs().double(), want.before[n].abs()) for n in want.after}
    least = {n: size * RESOLUTION for n, size in sizes.items()}
    return (
        max(_apart(g, w) for g, w in zip(way.losses, want.losses, strict=True)),
        _distance(way.changes(), want.changes(), sure, least),
        _distance(_gone(setup, way), _gone(setup, want), sure, least),
        _distance(way.buffers, want.buffers, whole),
    )


def _gradient_errors(way: Way, want: Way) -> dict[str, float]:
    """The largest relative error of each gradient; one counts as 1e-4 of the largest of its update at least."""
    errors: dict[str, float] = {}
    for got, true in zip(way.gradients, want.gradients, strict=True):
        sizes = {n: float(g.square().mean().sqrt()) for n, g in true.items()}
        least = 1e-4 * max(sizes.values(), default=0.0) or 1e-30
        for n, g in true.items():
            error = float((got[n] - g).square().mean().sqrt()) / max(sizes[n], least)
            errors[n] = max(errors.get(n, 0.0), error)
    return errors


def _gone(setup: Setup, way: Way) -> dict[str, torch.Tensor]:
    start = dict(setup.drawn.model.named_parameters())
    return {n: v - start[n].detach().double() for n, v in way.after.items()}


def _apart(got: float, want: float) -> float:
    return abs(got - want) / max(abs(want), 1e-9) if math.isfinite(got) else math.inf


def _sure(setup: Setup, want: Way, noise: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Entries of the update that an error of the gradients, relative to their mean size, leaves as they are.

    None of a gradient that cancels to less than rounding leaves of it (a norm over groups of two is a sign).
    """
    known = {n: noise.get(n, 0.0) <= OWN * LARGEST_OWN for n in want.after}
    sure = {n: torch.full_like(v, known[n], dtype=torch.bool) for n, v in want.after.items()}
    for sign in (1.0, -1.0):
        near = reference(setup, {n: sign * share for n, share in noise.items()})
        for changed, original in ((near.changes(), want.changes()), (_gone(setup, near), _gone(setup, want))):
            for name, value in original.items():
                sure[name] &= (changed[name] - value).abs() <= max(
                    0.2, 2 * noise.get(name, 0.0)
                ) * value.abs()
    return sure


#: A weight in two fp16 numbers is exact to this share of itself; smaller steps are lost.
RESOLUTION = 2.0**-22


def _distance(
    got: Mapping[str, torch.Tensor],
    want: Mapping[str, torch.Tensor],
    sure: Mapping[str, torch.Tensor],
    least: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """Of all tensors together, relative; entries may differ by `least`."""
    sure = {n: sure[n] & ((got[n] != w) | w.isfinite()) for n, w in want.items()}  # infinities of masks agree
    want = {n: w.masked_fill(~sure[n], 0.0) for n, w in want.items()}
    apart = {n: (got[n].masked_fill(~sure[n], 0.0) - w).abs() for n, w in want.items()}
    if least is not None:
        apart = {n: (a - least[n]).clamp(min=0.0) for n, a in apart.items()}
    error = math.sqrt(sum(float(a.norm()) ** 2 for a in apart.values()))
    size = math.sqrt(sum(float(w.norm()) ** 2 for w in want.values()))
    return error / size if size else 0.0


def each(numbers: Sequence[int], draw: Callable[[int], Setup]) -> Iterator[tuple[Setup, str, str]]:
    """Each set-up with its verdict."""
    for number in numbers:
        setup = draw(number)
        yield setup, *judge(setup)
