"""Kullback-Leibler divergences of two softmaxes as sums of terms that do not cancel.

    sum p (log p - log q) -> sum p (exp(-d) - 1 + d), d = log p - log q      (p and q add to 1)

Of a student near its teacher, or of both at a high temperature, the terms on the left are a hundred times their sum,
and fp16 keeps none of it. Those on the right are squares, `d^2 / 2 - d^3 / 6 + ...` for small d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ane_trainer.ane.capture.rewrites.exponentials import Exponentials, Function
from ane_trainer.ane.capture.trace.torch_private import SideTable, version

#: Below this the series has what the exponential loses; its coefficients from the square's on.
_SMALL = 0.5
_SERIES = (1 / 2, -1 / 6, 1 / 24, -1 / 120, 1 / 720)


@dataclass(frozen=True)
class _Shares:
    """A tensor whose exponentials, or which itself, adds to 1 along `axis`."""

    axis: int
    version: int


class Divergences(Exponentials):
    """What adds to 1, beside what exponentials were made of."""

    def __init__(self, item: Function = torch.Tensor.__getitem__) -> None:
        """`item` is what `x[...]` does otherwise."""
        super().__init__(item)
        self._logarithms: SideTable[_Shares] = SideTable()
        self._shares: SideTable[_Shares] = SideTable()
        self.rewrites |= {F.kl_div: self._kl_div, **dict.fromkeys(_LOG_SOFTMAX, self._log_softmax)}

    def _log_softmax(
        self, x: torch.Tensor, dim: int | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor:
        """`torch.log_softmax` and `F.log_softmax`; the other arguments are `_stacklevel` and `dtype`."""
        result: torch.Tensor = _LOG_OF_SHARES(x, dim, *args, **kwargs)
        if dim is not None:
            self._logarithms[result] = _Shares(dim % max(result.ndim, 1), version(result))
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


def _terms(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p (exp(-d) - 1 + d), each at least 0."""
    d = log_p - log_q
    small = d.abs() < _SMALL
    near = torch.where(small, d, 0.0)
    series = torch.full_like(near, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * near + coefficient
    return torch.where(small, p * near * (near * series), torch.exp(log_q) - p + p * d)


_LOG_OF_SHARES: Function = F.log_softmax
_LOG_SOFTMAX: tuple[Function, ...] = (torch.log_softmax, F.log_softmax, torch.Tensor.log_softmax)
