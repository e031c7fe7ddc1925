"""Logarithms of sums of exponentials that are masked, weighted, added to others or to a number, and of their quotients.

    log(1 + (exp(z) * mask).sum(1)) -> softplus(c + log((exp(z - c) * mask).sum(1))), c the largest z that is not masked
    log((exp(z) * p / s).sum(1)) -> c + log((exp(z + log p - c) / s).sum(1)), p a softmax: a mixture of densities
    log(cosh(x)) -> |x| + softplus(-2 |x|) - log(2), a series below 0.5
    log(exp(a) / (exp(a) + exp(b).sum(1))) -> a - logaddexp(a, logsumexp(b, 1))
    log(p / q) -> log(p) - log(q), p and q a softmax each, an epsilon added

Losses of metric learning are written so, with scores times 50, and mixture densities: neither their exponentials nor
the quotients of such stand in fp16. A sum with weights that may be negative is positive only where nothing but a small
epsilon is added before its logarithm is taken: others are left alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn import functional as F

from ane_trainer.ane.capture.rewrites.divergences import Divergences
from ane_trainer.ane.capture.rewrites.exponentials import Function, axes_of_sum
from ane_trainer.ane.capture.rewrites.logits import LARGEST_EPSILON
from ane_trainer.ane.capture.trace.torch_private import SideTable, version

_MEAN: Function = torch.mean
_COSH: Function = torch.cosh
#: What stands for the score of a masked entry, and the least sum whose logarithm is taken: where all are masked.
_MASKED, _LEAST = -1e4, 2.0**-20
#: Below this a logarithm of a hyperbolic cosine is a series in the square.
_NEAR = 0.5


@dataclass(frozen=True)
class _Terms:
    """A tensor `exp(scores)` where the mask is true, 0 elsewhere, times the factors.

    A factor is (value, whether it is a denominator), with its logarithm where that is known. `read` with its versions.
    """

    scores: tuple[torch.Tensor, ...]
    mask: torch.Tensor | None
    factors: tuple[tuple[object, bool, Callable[[], torch.Tensor] | None], ...]
    read: tuple[tuple[torch.Tensor, int], ...]

    def reread(self, *more: object) -> tuple[tuple[torch.Tensor, int], ...]:
        """What is read, with more tensors."""
        return self.read + tuple((t, version(t)) for t in more if isinstance(t, torch.Tensor))

    @property
    def positive(self) -> bool:
        """Whether no factor is negative, as far as is known."""
        return all(log is not None or (_is_number(f) and f > 0) for f, _, log in self.factors)  # type: ignore[operator]


class WeightedSums(Divergences):
    """Masks and masked exponentials, beside what `Divergences` knows."""

    def __init__(self, item: Function = torch.Tensor.__getitem__) -> None:
        """`item` is what `x[...]` does otherwise."""
        super().__init__(item)
        self._weighted: SideTable[tuple[_Terms, int]] = SideTable()
        self._masks: SideTable[tuple[torch.Tensor, int]] = SideTable()  # truths as numbers -> truths
        self._zeros: SideTable[int] = SideTable()
        numbered = (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type)
        self.rewrites |= {function: functools.partial(self._numbered, function) for function in numbered}
        self.rewrites |= {torch.zeros_like: self._zeros_like}
        self.rewrites |= dict.fromkeys((torch.mean, torch.Tensor.mean), self._mean)
        self.rewrites |= dict.fromkeys((torch.cosh, torch.Tensor.cosh), self._cosh)

    def _numbered(self, function: Function, x: object, *args: object, **kwargs: object) -> object:
        """`mask.float()`; of probabilities a copy."""
        plain = function is torch.Tensor.float
        result = self._moved(function, x, *args, **kwargs) if plain else function(x, *args, **kwargs)
        if (
            isinstance(x, torch.Tensor)
            and isinstance(result, torch.Tensor)
            and x.dtype == torch.bool
            and result.dtype != torch.bool
        ):
            self._masks[result] = x, version(result)
        return result

    def _zeros_like(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        zeros: Function = torch.zeros_like
        result: torch.Tensor = zeros(x, *args, **kwargs)
        self._zeros[result] = version(result)
        return result

    def _difference(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        """`1 - mask` is a mask, too."""
        result = super()._difference(x, y, *args, **kwargs)
        truths = self._truths(y)
        if type(x) in (int, float) and x == 1 and truths is not None and not args and not kwargs:
            self._masks[result] = torch.logical_not(truths), version(result)
        return result

    def _product(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        result = super()._product(x, y, *args, **kwargs)
        for each, other in ((x, y), (y, x)):
            truths = self._truths(other)
            if truths is not None:
                own = self._truths(each)
                if own is not None:
                    self._masks[result] = torch.logical_and(own, truths), version(result)
                else:
                    self._note_masked(each, truths, result)
                return result
        for each, other in ((x, y), (y, x)):
            if not args and not kwargs and self._note_weighted(each, other, result, below=False):
                break
        return result

    def _either(self, condition: object, x: object = None, y: object = None, **kwargs: object) -> object:
        """`where(mask, exp(z), 0)`"""
        result = super()._either(condition, x, y, **kwargs)
        zero = (
            self._zeros.get(y) == version(y)
            if isinstance(y, torch.Tensor)
            else type(y) in (int, float) and y == 0
        )
        if zero and isinstance(condition, torch.Tensor) and isinstance(result, torch.Tensor):
            self._note_masked(x, condition, result)
        return result

    def _note_masked(self, x: object, truths: torch.Tensor, result: torch.Tensor) -> None:
        terms = self._terms(x)
        if terms is not None:
            mask = truths if terms.mask is None else torch.logical_and(terms.mask, truths)
            found = _Terms(terms.scores, mask, terms.factors, terms.reread(mask))
            self._weighted[result] = found, version(result)

    def _note_weighted(self, x: object, factor: object, result: object, *, below: bool) -> bool:
        """Note that a result is exponentials times, or divided by, something; whether it is."""
        terms, others = self._terms(x), self._terms(factor)
        if (
            terms is None
            or not isinstance(result, torch.Tensor)
            or not (_is_number(factor) or _is_float(factor))
        ):
            return False
        scores, mask, factors, read = terms.scores, terms.mask, terms.factors, terms.reread(factor)
        if others is not None and not below and (mask is None or others.mask is None):
            scores, factors = (*scores, *others.scores), (*factors, *others.factors)
            mask, read = others.mask if mask is None else mask, (*terms.read, *others.read)
        else:
            origin = self._origin(factor)
            factors = (*factors, (factor, below, None if origin is None or origin.signed else origin.log))
            read = read if origin is None else (*read, *((t, version(t)) for t in origin.tensors()))
        self._weighted[result] = _Terms(scores, mask, factors, read), version(result)
        return True

    def _terms(self, x: object) -> _Terms | None:
        """What a tensor of exponentials, masked or weighted, is made of."""
        if (made := self._of(x, "exp")) is not None:
            return _Terms((made.scores,), None, (), ((made.scores, version(made.scores)),))
        held = self._weighted.get(x)
        if held is None or held[1] != version(cast("torch.Tensor", x)):
            return None
        return held[0] if all(version(tensor) == number for tensor, number in held[0].read) else None

    def _truths(self, x: object) -> torch.Tensor | None:
        """The truths that a tensor is, or is made of."""
        if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
            return x
        known = self._masks.get(x)
        return known[0] if known is not None and known[1] == version(cast("torch.Tensor", x)) else None

    def _exp(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        result = super()._exp(x, *args, **kwargs)
        if x.is_floating_point() and not args and not kwargs:
            self._remember_written(result, lambda: x, x)
        return result

    def _sum(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        result = super()._sum(x, *args, **kwargs)
        made = self._of(result, "sum")
        if made is not None:
            self._remember_written(
                result,
                lambda: torch.logsumexp(made.scores, made.axes).reshape(result_shape),
                made.scores,
            )
        elif self._weighted.get(x) is not None:
            self._note_sum(x, result, axes_of_sum(x.ndim, args, kwargs))
        result_shape = tuple(result.shape)
        return result

    def _cosh(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        result: torch.Tensor = _COSH(x, *args, **kwargs)
        if x.is_floating_point():
            self._remember_written(result, lambda: _log_cosh(x), x)
        return result

    def _mean(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """A mean of exponentials, whose logarithm is the sum's less that of their number."""
        result: torch.Tensor = _MEAN(x, *args, **kwargs)
        if result.numel():
            self._note_sum(x, result, axes_of_sum(x.ndim, args, kwargs), x.numel() // result.numel())
        return result

    def _note_sum(
        self, x: torch.Tensor, result: torch.Tensor, axes: tuple[int, ...] | None, count: int = 1
    ) -> None:
        terms, shape, below = self._terms(x), tuple(x.shape), tuple(result.shape)
        if terms is not None and axes:
            logarithm = lambda: _logarithm_of_sum(terms, shape, axes, below) - math.log(count)  # noqa: E731
            read = (tensor for tensor, _ in terms.read)
            self._remember_written(result, logarithm, *read, signed=not terms.positive)

    def _total(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        """A sum of two, or of one and a number."""
        result = super()._total(x, y, *args, **kwargs)
        if args or kwargs or self._of(result, "one") is not None:
            return result
        first, second = self._origin(x), self._origin(y)
        if first is not None and second is not None:
            if all(o.written and not o.signed for o in (first, second)) and _shape(x) == _shape(y):
                tensors = (*first.tensors(), *second.tensors())
                self._remember_written(result, lambda: _added(first.log(), second.log()), *tensors)
            return result
        origin, other = (second, x) if first is None else (first, y)
        if origin is None or not origin.written or not isinstance(other, (int, float)):
            return result
        if 0 < other <= (LARGEST_EPSILON if origin.signed else math.inf):
            number = math.log(other)
            self._remember_written(
                result, lambda: number + F.softplus(origin.log() - number), *origin.tensors()
            )
        return result

    def _log1p(self, x: torch.Tensor, *args: object, **kwargs: object) -> object:
        origin = self._origin(x)
        if (
            origin is None
            or not origin.written
            or origin.signed
            or self._of(x, "exp") is not None
            or args
            or kwargs
        ):
            return super()._log1p(x, *args, **kwargs)
        return F.softplus(origin.log())

    def _quotient(self, x: object, y: object, *args: object, **kwargs: object) -> object:
        """The logarithm of a quotient is a difference of logarithms."""
        result = super()._quotient(x, y, *args, **kwargs)
        first, second = self._origin(x), self._origin(y)
        if not args and not kwargs and self._of(y, "sum", "one") is None:
            self._note_weighted(x, y, result, below=True)
        if first is None or second is None or not isinstance(result, torch.Tensor) or args or kwargs:
            return result
        if first.signed or second.signed:
            return result
        if self._origin(result) is None and first.ends is None and second.ends is None:
            tensors = (*first.tensors(), *second.tensors())
            self._remember_written(result, lambda: first.log() - second.log(), *tensors)
        return result


def _logarithm_of_sum(
    terms: _Terms, shape: tuple[int, ...], axes: tuple[int, ...], result: tuple[int, ...]
) -> torch.Tensor:
    """log of the sum of exp(scores) times the factors, where the mask is true."""
    chosen = functools.reduce(torch.add, terms.scores)
    plain = []
    for factor, below, log in terms.factors:
        if log is not None:
            chosen = chosen - log() if below else chosen + log()
        else:
            plain.append((factor, below))
    chosen = chosen.expand(shape)
    if terms.mask is not None:
        chosen = torch.where(terms.mask.expand(shape), chosen, _MASKED)
    largest = chosen.amax(axes, keepdim=True).detach()
    each = torch.exp(chosen - largest)
    for factor, below in plain:
        each = each / factor if below else each * factor  # type: ignore[operator]
    if terms.mask is not None:
        each = torch.where(terms.mask.expand(shape), each, 0.0)
    total = each.sum(axes, keepdim=True)
    total = total.clamp(min=_LEAST) if terms.mask is not None and terms.positive else total
    return (largest + torch.log(total)).reshape(result)


def _log_cosh(x: torch.Tensor) -> torch.Tensor:
    size = x.abs()
    small = size < _NEAR
    square = torch.where(small, x, 0.0).square()
    series = torch.full_like(square, 31 / 14175)
    for coefficient in (-17 / 2520, 1 / 45, -1 / 12, 1 / 2):
        series = series * square + coefficient
    return torch.where(small, series * square, size + F.softplus(-2.0 * size) - math.log(2.0))


def _added(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """logaddexp"""
    return a + F.softplus(b - a)


def _is_number(x: object) -> bool:
    return type(x) in (int, float)


def _is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _shape(x: object) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, torch.Tensor) else ()
