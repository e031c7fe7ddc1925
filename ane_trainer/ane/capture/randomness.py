"""Random numbers that the host feeds: dropout masks and noise, drawn from the run's seed.

The engine's random ops are not reproducible, so each draw in training mode becomes a batch port. Its target
says what it holds: `dropout/<p>` (0 or 1/(1-p)), `random/normal`, `random/uniform`, `random/exponential`,
`random/bernoulli:<p>` (1 with probability p), `random/integer:<low>:<high>`, `random/permutation`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ane_trainer.ane.capture.rewrites import packed
from ane_trainer.ane.capture.rewrites.composites import COMPOSITES, RECURRENT, attention, drops, recurrent

#: function -> does it drop whole channels
_DROPOUTS: dict[Callable[..., object], bool] = {
    F.dropout: False, torch.dropout: False, torch.dropout_: False, F.dropout1d: True, F.dropout2d: True,
    F.dropout3d: True,
}  # fmt: skip
_LIKE = {torch.randn_like: "normal", torch.rand_like: "uniform"}
_NEW = {torch.randn: "normal", torch.rand: "uniform"}
#: Dropouts that keep mean and variance of SELU's outputs; function -> does it drop whole channels
_ALPHA_DROPOUTS: dict[Callable[..., object], bool] = {
    torch.alpha_dropout: False, torch.alpha_dropout_: False, torch.feature_alpha_dropout: True,
    torch.feature_alpha_dropout_: True, F.alpha_dropout: False, F.feature_alpha_dropout: True,
}  # fmt: skip
#: What SELU tends to for large negative inputs, negated (torch's own constant).
_SELU_FLOOR = 1.7580993408473766
#: What the target of a port with random numbers begins with.
PREFIX = ("dropout/", "random/")


@dataclass(frozen=True)
class RandomDraw:
    """One draw of the model, in order of execution."""

    shape: tuple[int, ...]
    target: str


class HostRandomMode(TorchFunctionMode):
    """Replaces random draws by given tensors, in order; without `draws` they are noted."""

    def __init__(self, draws: Sequence[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.noted: list[RandomDraw] = []
        self.composites = COMPOSITES
        self._given: Iterator[torch.Tensor] | None = None if draws is None else iter(draws)
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(func, *_arguments(*args, **kwargs))
        if func in _LIKE:
            return self.draw(tuple(args[0].shape), f"random/{_LIKE[func]}").to(args[0].dtype)
        if func in _NEW and "generator" not in kwargs:
            size = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
            return self.draw(tuple(kwargs.get("size", size)), f"random/{_NEW[func]}")
        if func in _ALPHA_DROPOUTS:
            return self._alpha_dropout(func, *_arguments(*args, **kwargs))
        if func in _DRAWS and "generator" not in kwargs:
            return _DRAWS[func](self, *args, **kwargs)
        if func is torch.normal:
            return self._normal(*args, **kwargs)
        if func is torch.bernoulli:
            return (self.draw(tuple(args[0].shape), "random/uniform") < args[0]).to(args[0].dtype)
        if func in _IN_PLACE:
            return args[0].copy_(_IN_PLACE[func](self, *args, **kwargs))
        if getattr(func, "__name__", "") in RECURRENT and packed.is_packed_call(args):
            with self:
                return packed.recurrent(func, *args, **kwargs)
        if getattr(func, "__name__", "") in RECURRENT and drops(*args):
            with self:
                return recurrent(func, *args, **kwargs)
        if func in self.composites:
            with self:
                return self.composites[func](*args, **kwargs)
        return func(*args, **kwargs)

    def draw(self, shape: tuple[int, ...], target: str) -> torch.Tensor:
        """The next random tensor."""
        self.noted.append(RandomDraw(shape or (1,), target))
        if self._given is not None:
            return next(self._given).reshape(shape)
        return torch.ones(shape) if target.startswith("dropout/") else draw(target, shape, self._generator)

    def _dropout(self, func: Any, x: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
        if not training or p == 0.0:
            return x
        shape = tuple(x.shape)
        if _DROPOUTS[func]:
            shape = (*shape[:2], *(1,) * (len(shape) - 2))
        mask = self.draw(shape, f"dropout/{p!r}")
        return x.mul_(mask) if inplace or func is torch.dropout_ else x * mask

    def _alpha_dropout(
        self, func: Any, x: torch.Tensor, p: float, training: bool, inplace: bool
    ) -> torch.Tensor:
        if not training or p == 0.0:
            return x
        shape = (*x.shape[:2], *(1,) * (x.dim() - 2)) if _ALPHA_DROPOUTS[func] else tuple(x.shape)
        mask = self.draw(tuple(shape), f"random/bernoulli:{1.0 - p!r}")
        gain = 1.0 / math.sqrt((_SELU_FLOOR**2 * p + 1.0) * (1.0 - p))
        shift = (mask - 1.0) * (_SELU_FLOOR * gain) + _SELU_FLOOR * gain * p
        result = x * (mask * gain) + shift
        return x.copy_(result) if inplace or func.__name__.endswith("_") else result

    def _normal(self, mean: object = 0.0, std: Any = 1.0, size: Any = None, **kwargs: object) -> torch.Tensor:
        shapes = [v.shape for v in (mean, std) if isinstance(v, torch.Tensor)]
        shape = tuple(size) if size is not None else torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        result: torch.Tensor = self.draw(tuple(shape), "random/normal") * std + mean
        return result


def bounds(entry: RandomDraw) -> tuple[float, float] | None:
    """Least and largest of a draw of integers; None for others."""
    kind, *limits = entry.target.partition("/")[2].split(":")
    if kind == "integer":
        return float(limits[0]), float(int(limits[1]) - 1)
    return (0.0, float(entry.shape[0] - 1)) if kind == "permutation" else None


def draw(target: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The numbers for a port with this target, in float32."""
    kind, _, amount = target.partition("/")
    if kind == "dropout":
        p = float(amount)
        if p >= 1.0:
            return torch.zeros(shape)
        return torch.empty(shape).bernoulli_(1.0 - p, generator=generator) / (1.0 - p)
    if amount.startswith("bernoulli:"):
        return torch.empty(shape).bernoulli_(float(amount.partition(":")[2]), generator=generator)
    if amount.startswith("integer:"):
        low, high = map(int, amount.split(":")[1:])
        return torch.randint(low, high, shape, generator=generator).float()
    if amount == "permutation":
        return torch.randperm(shape[0], generator=generator).float()
    empty = torch.empty(shape)
    if amount == "normal":
        return empty.normal_(generator=generator)
    if amount == "exponential":
        return empty.exponential_(generator=generator)
    return empty.uniform_(generator=generator)


@contextlib.contextmanager
def drawn_by(generator: torch.Generator) -> Iterator[None]:
    """Inside, plain PyTorch draws its dropouts and noise as the engine's host does; to compare the two."""
    mode = HostRandomMode()
    mode.composites = {**COMPOSITES, F.scaled_dot_product_attention: partial(attention, lowest=-1e30)}
    mode.draw = lambda shape, target: draw(target, shape, generator)  # type: ignore[method-assign]
    with mode:
        yield


def _arguments(
    input: torch.Tensor,
    p: float = 0.5,
    train: bool = True,
    inplace: bool = False,
    *,
    training: bool | None = None,
) -> tuple[torch.Tensor, float, bool, bool]:
    return input, float(p), train if training is None else training, inplace


def _bernoulli_(mode: HostRandomMode, x: torch.Tensor, p: Any = 0.5, **kwargs: object) -> torch.Tensor:
    if isinstance(p, torch.Tensor):
        return (mode.draw(tuple(x.shape), "random/uniform") < p).to(x.dtype)
    return mode.draw(tuple(x.shape), f"random/bernoulli:{float(p)!r}")


def _normal_(
    mode: HostRandomMode, x: torch.Tensor, mean: float = 0.0, std: float = 1.0, **kwargs: object
) -> torch.Tensor:
    return mode.draw(tuple(x.shape), "random/normal") * std + mean


def _uniform_(
    mode: HostRandomMode, x: torch.Tensor, low: float = 0.0, high: float = 1.0, **kwargs: Any
) -> torch.Tensor:
    low, high = kwargs.get("from", low), kwargs.get("to", high)
    return mode.draw(tuple(x.shape), "random/uniform") * (high - low) + low


def _exponential_(mode: HostRandomMode, x: torch.Tensor, rate: float = 1.0, **kwargs: object) -> torch.Tensor:
    return mode.draw(tuple(x.shape), "random/exponential") * (1.0 / rate)


def _rrelu(
    mode: HostRandomMode, x: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
    inplace: bool = False,
) -> torch.Tensor:  # fmt: skip
    slope: Any = (lower + upper) / 2
    if training:
        slope = mode.draw(tuple(x.shape), "random/uniform") * (upper - lower) + lower
    result = torch.where(x >= 0, x, x * slope)
    return x.copy_(result) if inplace else result


def _randint(mode: HostRandomMode, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`randint(high, size)`, `randint(low, high, size)`"""
    *bounds, size = args if "size" not in kwargs else (*args, kwargs["size"])
    low, high = kwargs.get("low", bounds[0] if len(bounds) == 2 else 0), kwargs.get("high", bounds[-1:])
    high = high[0] if isinstance(high, list) else high
    result = mode.draw(tuple(size), f"random/integer:{int(low)}:{int(high)}")
    return result.to(kwargs.get("dtype") or torch.int64)


def _randint_like(mode: HostRandomMode, x: torch.Tensor, *bounds: int, **kwargs: object) -> torch.Tensor:
    return _randint(mode, *bounds, tuple(x.shape), dtype=kwargs.get("dtype") or x.dtype)


def _randperm(mode: HostRandomMode, n: int, **kwargs: Any) -> torch.Tensor:
    return mode.draw((int(n),), "random/permutation").to(kwargs.get("dtype") or torch.int64)


def _multinomial(
    mode: HostRandomMode, weights: torch.Tensor, num_samples: int, replacement: bool = False, **kwargs: object
) -> torch.Tensor:
    """With replacement, the place of a uniform number among the sums of weights; else a race of exponential times."""
    if replacement or num_samples == 1:
        sums = weights.cumsum(-1)
        limits = mode.draw((*weights.shape[:-1], num_samples), "random/uniform") * sums[..., -1:]
        return (limits.unsqueeze(-1) >= sums[..., :-1].unsqueeze(-2)).sum(-1)
    times = mode.draw(tuple(weights.shape), "random/exponential")
    return (weights / times).topk(num_samples, -1)[1]


_DRAWS: dict[object, Callable[..., torch.Tensor]] = {
    torch.multinomial: _multinomial, torch.Tensor.multinomial: _multinomial, F.rrelu: _rrelu,
    torch.randint: _randint, torch.randint_like: _randint_like, torch.randperm: _randperm,
}  # fmt: skip
_IN_PLACE: dict[object, Callable[..., torch.Tensor]] = {
    torch.Tensor.bernoulli_: _bernoulli_, torch.Tensor.normal_: _normal_, torch.Tensor.uniform_: _uniform_,
    torch.Tensor.exponential_: _exponential_,
}  # fmt: skip
