"""Kullback-Leibler divergences of two softmaxes as sums of terms that do not cancel.

    sum p (log p - log q) -> sum p (exp(-d) - 1 + d), d = log p - log q      (p and q add to 1)

`F.kl_div`, and the sum written out; p and q are softmaxes, or numbers divided by their sum.

Of a student near its teacher, or of both at a high temperature, the terms on the left are a hundred times their sum,
and fp16 keeps none of it. Those on the right are squares, `d^2 / 2 - d^3 / 6 + ...` for small d.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ane_trainer.ane.capture.rewrites.exponentials import Exponentials, Function, axes_of_sum
from ane_trainer.ane.capture.trace.torch_private import SideTable, version

#: Below this the series has what the exponential loses; its coefficients from the square's on.
_SMALL = 0.5
_SERIES = (1 / 2, -1 / 6, 1 / 24, -1 / 120, 1 / 720)


@dataclass(frozen=True)
class _Shares:
    """A tensor whose exponentials, or which itself, adds to 1 along `axis`."""

    axis: int
    version: int


@dataclass(frozen=True)
class _Difference:
    """`log p - log q`, or its product with p, of shares along `axis`; `read` with its versions."""

    axis: int
    log_p: torch.Tensor
    log_q: torch.Tensor
    read: tuple[tuple[torch.Tensor, int], ...]
    p: torch.Tensor | None = None


class Divergences(Exponentials):
    """What adds to 1, beside what exponentials were made of."""

    def __init__(self, item: Function = torch.Tensor.__getitem__) -> None:
        """`item` is what `x[...]` does otherwise."""
        super().__init__(item)
        self._logarithms: SideTable[_Shares] = SideTable()
        self._shares: SideTable[_Shares] = SideTable()
        self._sums: SideTable[tuple[int, torch.Tensor, int, int]] = SideTable()  # axis, terms, versions
        self._logs_of: SideTable[torch.Tensor] = SideTable()  # log p -> p, or what both were made of
        self._differences: SideTable[_Difference] = SideTable()
        self.rewrites |= {F.kl_div: self._kl_div, **dict.fromkeys(_LOG_SOFTMAX, self._log_softmax)}
        self.rewrites |= dict.fromkeys(
            (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply), self._product
        )
        self.rewrites |= {torch.Tensor.detach: self._detached}

    def _log_softmax(
        self, x: torch.Tensor, dim: int | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor:
        """`torch.log_softmax` and `F.log_softmax`; the other arguments are `_stacklevel` and `dtype`."""
        result: torch.Tensor = _LOG_OF_SHARES(x, dim, *args, **kwargs)
        if dim is not None:
            self._logarithms[result] = _Shares(dim % max(result.ndim, 1), version(result))
            self._logs_of[result] = x
        return result

    def _logarithm(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        result, shares = super()._logarithm(x, *args, **kwargs), _known(self._shares.get(x), x)
        if shares is not None and not args and not kwargs:
            self._logarithms[result] = _Shares(shares.axis, version(result))
            self._logs_of[result] = x
        return result

    def _sum(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """A sum that may stand below its terms, or of a divergence's."""
        axes = axes_of_sum(x.ndim, args, kwargs)
        terms = self._differences.get(x)
        if (
            terms is not None
            and terms.p is not None
            and axes is not None
            and terms.axis in axes
            and _unchanged(terms.read)
        ):
            return super()._sum(_terms(terms.p, terms.log_p, terms.log_q), *args, **kwargs)
        result = super()._sum(x, *args, **kwargs)
        if axes is not None and len(axes) == 1 and result.ndim == x.ndim:
            self._sums[result] = axes[0], x, version(x), version(result)
        return result

    def _quotient(self, x: object, y: object, *args: object, **kwargs: object) -> object:
        result, total = super()._quotient(x, y, *args, **kwargs), self._sums.get(y)
        if total is not None and isinstance(x, torch.Tensor) and isinstance(result, torch.Tensor):
            axis, terms, *versions = total
            if terms is x and versions == [version(x), version(y)] and not args and not kwargs:  # type: ignore[arg-type]
                self._shares[result] = _Shares(axis, version(result))
        return result

    def _difference(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        result = super()._difference(x, y, *args, **kwargs)
        own, other = self._logarithms.get(x), self._logarithms.get(y)
        if own is None or other is None or own.axis != other.axis or args or kwargs:
            return result
        assert isinstance(x, torch.Tensor)
        assert isinstance(y, torch.Tensor)
        if x.shape == y.shape and _known(own, x) and _known(other, y):
            read = tuple((t, version(t)) for t in (x, y, result))
            self._differences[result] = _Difference(own.axis, x, y, read)
        return result

    def _product(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        """`p * (log p - log q)`"""
        result: torch.Tensor = _MUL(x, y, *args, **kwargs)
        for p, other in ((x, y), (y, x)):
            found, shares = self._differences.get(other), self._shares.get(p)
            if found is None or shares is None or found.p is not None or args or kwargs:
                continue
            assert isinstance(p, torch.Tensor)
            source, made = self._logs_of.get(found.log_p), self._origin(p)
            other_made = self._origin(source)
            sources = (source, None if other_made is None else other_made.scores)
            same = source is p or (made is not None and any(made.scores is s for s in sources))
            if same and _known(shares, p) and shares.axis == found.axis and _unchanged(found.read):
                read = (*found.read, (p, version(p)), (result, version(result)))
                self._differences[result] = dataclasses.replace(found, p=p, read=read)
        return result

    def _detached(self, x: torch.Tensor) -> torch.Tensor:
        """A share stays one."""
        result = x.detach()
        shares = _known(self._shares.get(x), x)
        if shares is not None:
            self._shares[result] = _Shares(shares.axis, version(result))
        return result

    def _softmax(
        self, x: torch.Tensor, dim: int | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor:
        result = super()._softmax(x, dim, *args, **kwargs)
        if dim is not None:
            self._shares[result] = _Shares(dim % max(result.ndim, 1), version(result))
        return result

    def _kl_div(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> torch.Tensor:
        """`F.kl_div`."""
        own, other = (
            self._logarithms.get(input),
            (self._logarithms if log_target else self._shares).get(target),
        )
        if (
            (own, other) != (_known(own, input), _known(other, target))
            or own is None
            or other is None
            or own.axis != other.axis
            or input.shape != target.shape
            or reduction not in ("mean", "batchmean", "sum")
            or (size_average, reduce) != (None, None)
        ):
            return F.kl_div(input, target, size_average, reduce, reduction, log_target)
        logarithm = target if log_target else self._logarithm(target)
        total = _terms(target.exp() if log_target else target, logarithm, input)
        if reduction == "mean":
            return total.mean()
        return total.sum() / input.shape[0] if reduction == "batchmean" else total.sum()


def _known(shares: _Shares | None, x: torch.Tensor) -> _Shares | None:
    """None if the tensor was written to since."""
    return shares if shares is not None and shares.version == version(x) else None


def _unchanged(read: tuple[tuple[torch.Tensor, int], ...]) -> bool:
    return all(version(tensor) == number for tensor, number in read)


def _terms(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p (exp(-d) - 1 + d), each at least 0."""
    d = log_p - log_q
    small = d.abs() < _SMALL
    near = torch.where(small, d, 0.0)
    series = torch.full_like(near, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * near + coefficient
    return torch.where(small, p * near * (near * series), torch.exp(log_q) - p + p * d)


_MUL: Function = torch.mul
_LOG_OF_SHARES: Function = F.log_softmax
_LOG_SOFTMAX: tuple[Function, ...] = (torch.log_softmax, F.log_softmax, torch.Tensor.log_softmax)
