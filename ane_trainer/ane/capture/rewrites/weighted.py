"""Logarithms of sums of exponentials that are masked, added to others or to a number, and of quotients of such sums.

    log(1 + (exp(z) * mask).sum(1)) -> softplus(c + log((exp(z - c) * mask).sum(1))), c the largest z that is not masked
    log(exp(a) / (exp(a) + exp(b).sum(1))) -> a - logaddexp(a, logsumexp(b, 1))
    log(p / q) -> log(p) - log(q), p and q a softmax each, an epsilon added

Losses of metric learning are written so, with scores times 50: neither their exponentials nor the quotients of such
stand in fp16. A product with anything but a mask (truths, or truths as numbers) is left alone: its sum may be negative.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn import functional as F

from ane_trainer.ane.capture.rewrites.divergences import Divergences
from ane_trainer.ane.capture.rewrites.exponentials import Function, axes_of_sum
from ane_trainer.ane.capture.trace.torch_private import SideTable, version

_WHERE: Function = torch.where
#: What stands for the score of a masked entry, and the least sum whose logarithm is taken: where all are masked.
_MASKED, _LEAST = -1e4, 2.0**-20


@dataclass(frozen=True)
class _Masked:
    """A tensor `exp(scores)` where the mask is true, 0 elsewhere."""

    scores: torch.Tensor
    mask: torch.Tensor
    versions: tuple[int, ...]


class WeightedSums(Divergences):
    """Masks and masked exponentials, beside what `Divergences` knows."""

    def __init__(self, item: Function = torch.Tensor.__getitem__) -> None:
        """`item` is what `x[...]` does otherwise."""
        super().__init__(item)
        self._weighted: SideTable[_Masked] = SideTable()
        self._masks: SideTable[tuple[torch.Tensor, int]] = SideTable()  # truths as numbers -> truths
        self._zeros: SideTable[int] = SideTable()
        numbered = (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type)
        self.rewrites |= {function: functools.partial(self._numbered, function) for function in numbered}
        self.rewrites |= {torch.zeros_like: self._zeros_like}

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
        made, weighted = self._of(x, "exp"), self._weighted.get(x)
        if weighted is not None and weighted.versions == _versions(x, weighted.scores, weighted.mask):
            scores, truths = weighted.scores, torch.logical_and(weighted.mask, truths)
        elif made is not None:
            scores = made.scores
        else:
            return
        self._weighted[result] = _Masked(scores, truths, _versions(result, scores, truths))

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
        made, weighted = self._of(result, "sum"), self._weighted.get(x)
        if made is not None:
            self._remember_written(
                result,
                lambda: torch.logsumexp(made.scores, made.axes).reshape(result_shape),
                made.scores,
            )
        elif weighted is not None and weighted.versions == _versions(x, weighted.scores, weighted.mask):
            axes = axes_of_sum(x.ndim, args, kwargs)
            if axes is not None:
                shape = tuple(x.shape)
                self._remember_written(
                    result,
                    lambda: _logarithm_of_sum(weighted, shape, axes, result_shape),
                    weighted.scores,
                    weighted.mask,
                )
        result_shape = tuple(result.shape)
        return result

    def _total(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        """A sum of two, or of one and a number."""
        result = super()._total(x, y, *args, **kwargs)
        if args or kwargs or self._of(result, "one") is not None:
            return result
        first, second = self._origin(x), self._origin(y)
        if first is not None and second is not None:
            if first.written and second.written and _shape(x) == _shape(y):
                tensors = (*first.tensors(), *second.tensors())
                self._remember_written(result, lambda: _added(first.log(), second.log()), *tensors)
            return result
        origin, other = (second, x) if first is None else (first, y)
        if origin is not None and origin.written and isinstance(other, (int, float)) and other > 0:
            number = math.log(other)
            self._remember_written(
                result, lambda: number + F.softplus(origin.log() - number), *origin.tensors()
            )
        return result

    def _log1p(self, x: torch.Tensor, *args: object, **kwargs: object) -> object:
        origin = self._origin(x)
        if origin is None or not origin.written or self._of(x, "exp") is not None or args or kwargs:
            return super()._log1p(x, *args, **kwargs)
        return F.softplus(origin.log())

    def _quotient(self, x: object, y: object, *args: object, **kwargs: object) -> object:
        """The logarithm of a quotient is a difference of logarithms."""
        result = super()._quotient(x, y, *args, **kwargs)
        first, second = self._origin(x), self._origin(y)
        if first is None or second is None or not isinstance(result, torch.Tensor) or args or kwargs:
            return result
        if self._origin(result) is None and first.ends is None and second.ends is None:
            tensors = (*first.tensors(), *second.tensors())
            self._remember_written(result, lambda: first.log() - second.log(), *tensors)
        return result


def _logarithm_of_sum(
    terms: _Masked, shape: tuple[int, ...], axes: tuple[int, ...], result: tuple[int, ...]
) -> torch.Tensor:
    """log of the sum of exp(scores) where the mask is true."""
    scores, mask = terms.scores.expand(shape), terms.mask.expand(shape)
    chosen = torch.where(mask, scores, _MASKED)
    largest = chosen.amax(axes, keepdim=True).detach()
    total = torch.where(mask, torch.exp(chosen - largest), 0.0).sum(axes, keepdim=True)
    return (largest + torch.log(total.clamp(min=_LEAST))).reshape(result)


def _added(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """logaddexp"""
    return a + F.softplus(b - a)


def _versions(*tensors: object) -> tuple[int, ...]:
    return tuple(version(cast("torch.Tensor", t)) for t in tensors)


def _shape(x: object) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, torch.Tensor) else ()
