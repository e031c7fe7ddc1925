"""Losses of probabilities as losses of the scores they came from.

    log(softmax(x)) -> log_softmax(x)                binary_cross_entropy(sigmoid(x), y) -> `_of_sigmoid(x, y)`
    1 - sigmoid(x) -> sigmoid(-x)                     log(sigmoid(x) + e) -> logaddexp(logsigmoid(x), log e)
    log(clamp(sigmoid(x), low, high)) -> clamp(logsigmoid(x), log low, log high)

Probabilities lose everything where fp16 rounds them to 1 or 0; the same functions of x do not. A sigmoid's or
softmax's result remembers x through views and reshapes, as long as it is not written to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ane_trainer.ane.capture.rewrites.criteria import reduced
from ane_trainer.ane.capture.trace.torch_private import SideTable, version

Function = Callable[..., Any]

#: torch's functions, for arguments of any kind, and what they return.
_ADD: Function = torch.add
_SUB: Function = torch.sub
_RSUB: Function = torch.rsub
_CLAMP: Function = torch.clamp
_WHERE: Function = torch.where
_LOG1P: Function = torch.log1p


#: An epsilon is added to probabilities up to here; more is arithmetic of its own.
LARGEST_EPSILON = 1e-3


#: PyTorch's `binary_cross_entropy` of a sigmoid in fp32: its largest logarithm, the score from which on the sigmoid is
#: 1 (exp(-x) is half a step of 1), the one where p (1 - p) is 1e-12, the one below which p is 0 (exp(-x) is infinite).
_MOST, _ONE, _FAINT, _NONE = 100.0, 24 * math.log(2.0), -12 * math.log(10.0), -88.72


@dataclass(frozen=True)
class _Origin:
    """What a tensor of probabilities was made of: `logarithm(scores)` is its logarithm.

    `ends`: what a sigmoid was clamped to. `read`: what else the logarithm reads, with its version. `written`: whether
    it is no probability, but a sum of exponentials (`weighted`).
    """

    scores: torch.Tensor
    logarithm: Function
    version: int
    ends: tuple[float | None, float | None] | None = None
    read: tuple[tuple[torch.Tensor, int], ...] = ()
    written: bool = False
    signed: bool = False

    def log(self) -> torch.Tensor:
        """The logarithm."""
        found: torch.Tensor = self.logarithm(self.scores)
        return found

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the logarithm reads."""
        return (self.scores, *(tensor for tensor, _ in self.read))


class Origins:
    """What probabilities were made of, for each tensor of one capture that lives; `rewrites` are its functions."""

    def __init__(self) -> None:
        self._origins: SideTable[_Origin] = SideTable()
        self._negatives: SideTable[tuple[torch.Tensor, int, int]] = SideTable()
        self.rewrites: dict[Function, Function] = {
            torch.sigmoid: self._sigmoid, torch.Tensor.sigmoid: self._sigmoid, torch.softmax: self._softmax,
            F.softmax: self._softmax, torch.Tensor.softmax: self._softmax, torch.log: self._logarithm,
            torch.Tensor.log: self._logarithm, F.binary_cross_entropy: self._binary_cross_entropy,
            torch.Tensor.__rsub__: self._taken_from, torch.rsub: self._taken_from,
            **dict.fromkeys((torch.sub, torch.Tensor.sub, torch.subtract), self._difference),
            **dict.fromkeys((torch.add, torch.Tensor.add), self._total),
            **dict.fromkeys((torch.clamp, torch.clip, torch.Tensor.clamp, torch.Tensor.clip), self._clamp),
            **dict.fromkeys((torch.clamp_min, torch.Tensor.clamp_min), self._clamp_min),
            torch.neg: self._negated, torch.Tensor.neg: self._negated, torch.Tensor.__neg__: self._negated,
            torch.log1p: self._log1p, torch.Tensor.log1p: self._log1p, torch.where: self._either,
            **{function: functools.partial(self._moved, function) for function in _VIEWS},
            **{function: functools.partial(Origins._moved, self, function) for function in _CHOICES},
        }  # fmt: skip

    def _sigmoid(self, x: torch.Tensor, *args: object, **kwargs: Any) -> torch.Tensor:
        return self._remember(torch.sigmoid(x, *args, **kwargs), x, F.logsigmoid)

    def _softmax(self, x: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`torch.softmax` and `F.softmax`; the other arguments are `_stacklevel` and `dtype`."""
        if dim is None:
            return F.softmax(x, dim, *args, **kwargs)
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        result = torch.softmax(x, dim, dtype=dtype)
        return self._remember(result, x, lambda scores: F.log_softmax(scores, dim, dtype=dtype))

    def _logarithm(self, x: torch.Tensor, *args: object, **kwargs: Any) -> torch.Tensor:
        """`torch.log`: of a sigmoid `logsigmoid`, of a softmax `log_softmax`."""
        origin = self._origin(x)
        if origin is None or args or kwargs:
            return torch.log(x, *args, **kwargs)
        return origin.log()

    def _binary_cross_entropy(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """`F.binary_cross_entropy`; of a sigmoid it is `binary_cross_entropy_with_logits`."""
        origin, options = self._origin(input), (weight, size_average, reduce, reduction)
        if origin is not None and origin.ends is not None and size_average is None and reduce is None:
            return self._of_clamped(input, target, weight, reduction)
        if origin is None or origin.logarithm is not F.logsigmoid:
            return F.binary_cross_entropy(input, target, *options)
        if size_average is not None or reduce is not None:
            return F.binary_cross_entropy_with_logits(origin.scores, target, *options)
        each = _of_sigmoid(origin.scores, target)
        return reduced(each if weight is None else each * weight, reduction)

    def _of_clamped(
        self, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: str
    ) -> torch.Tensor:
        """The binary cross entropy of clamped probabilities, from the logarithms of both sides."""
        no, yes = self._logarithm(self._difference(1, input)), self._logarithm(input)
        each = -(target * yes + (1 - target) * no)
        return reduced(each if weight is None else each * weight, reduction)

    def _taken_from(self, x: object, other: object, *args: object, **kwargs: object) -> object:
        """`1 - x`, as Python calls it for a number: of a sigmoid the sigmoid of -scores."""
        return _RSUB(x, other, *args, **kwargs) if args or kwargs else self._difference(other, x)

    def _difference(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        origin = self._origin(y)
        whole = type(x) in (int, float) and x == 1 and not args and not kwargs
        if origin is None or not whole or (origin.logarithm is not F.logsigmoid and origin.ends is None):
            found: torch.Tensor = _SUB(x, y, *args, **kwargs)
            return found
        flipped = torch.sigmoid(-origin.scores).clone()  # which may be written to, as the difference may
        self._remember(flipped, -origin.scores, F.logsigmoid)
        if origin.ends is None:
            return flipped
        low, high = (None if end is None else 1 - end for end in origin.ends)
        return self._clamp(flipped, high, low)

    def _total(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        """`p + 1e-7`, whose logarithm is known."""
        result: torch.Tensor = _ADD(x, y, *args, **kwargs)
        for each, other in ((x, y), (y, x)):
            origin = self._origin(each)
            if origin is None or args or kwargs:
                continue
            if type(other) in (int, float) and other == 0:
                self._remember(result, origin.scores, origin.logarithm, origin.ends)
            elif origin.ends is not None:
                continue
            elif isinstance(other, float) and 0 < other <= LARGEST_EPSILON:
                logarithm = functools.partial(_log_of_sum, origin.logarithm, other)
                self._remember(result, origin.scores, logarithm, like=origin)
        return result

    def _clamp(self, x: torch.Tensor, min: Any = None, max: Any = None, **kwargs: object) -> torch.Tensor:
        result: torch.Tensor = _CLAMP(x, min, max, **kwargs)
        origin = self._origin(x)
        shares = not kwargs and all(_is_share(end) for end in (min, max))
        if origin is None or origin.ends is not None or origin.signed or not shares:
            return result
        low, high = (None if end is None else float(end) for end in (min, max))
        logarithm = functools.partial(_log_of_clamped, origin.logarithm, low, high)
        ends = (low, high) if origin.logarithm is F.logsigmoid else None
        return self._remember(result, origin.scores, logarithm, ends, origin)

    def _clamp_min(self, x: torch.Tensor, min: object) -> torch.Tensor:
        return self._clamp(x, min)

    def _moved(self, function: Function, x: object, *args: object, **kwargs: object) -> object:
        """A view or a choice of entries, whose logarithm is the same view or choice of the logarithms."""
        return self._carry(x, function(x, *args, **kwargs), lambda tensor: function(tensor, *args, **kwargs))

    def _carry(self, x: object, result: object, move: Function) -> object:
        origin = self._origin(x)
        if origin is None or not isinstance(result, torch.Tensor):
            return result
        logarithm = origin.logarithm
        if logarithm is F.logsigmoid or origin.ends is not None:
            return self._remember(result, move(origin.scores), logarithm, origin.ends)
        return self._remember(result, origin.scores, lambda scores: move(logarithm(scores)), like=origin)

    def _either(self, condition: object, x: object = None, y: object = None, **kwargs: object) -> object:
        """`where(c, p, q)` of probabilities."""
        if x is None or kwargs:
            return _WHERE(condition, *(part for part in (x, y) if part is not None), **kwargs)
        result, first, second = _WHERE(condition, x, y), self._origin(x), self._origin(y)
        if first is None or second is None:
            return result
        if first.written or second.written:
            return result
        others = second.logarithm, second.scores
        return self._remember(
            result,
            first.scores,
            lambda scores: _WHERE(condition, first.logarithm(scores), others[0](others[1])),
        )

    def _negated(self, x: torch.Tensor) -> torch.Tensor:
        """`-p`, for `log1p(-p)`."""
        result = torch.neg(x)
        origin = self._origin(x)
        if origin is not None:
            self._negatives[result] = (x, version(x), version(result))
        return result

    def _log1p(self, x: torch.Tensor, *args: object, **kwargs: object) -> object:
        held = self._negatives.get(x)
        if held is None or args or kwargs or held[1:] != (version(held[0]), version(x)):
            return _LOG1P(x, *args, **kwargs)
        return self._logarithm(self._difference(1, held[0]))

    def _remember(
        self,
        result: torch.Tensor,
        scores: torch.Tensor,
        logarithm: Function,
        ends: tuple[float | None, float | None] | None = None,
        like: _Origin | None = None,
    ) -> torch.Tensor:
        read, written, signed = ((), False, False) if like is None else (like.read, like.written, like.signed)
        self._origins[result] = _Origin(scores, logarithm, version(result), ends, read, written, signed)
        return result

    def _remember_written(
        self,
        result: torch.Tensor,
        logarithm: Callable[[], torch.Tensor],
        *read: torch.Tensor,
        signed: bool = False,
    ) -> None:
        """Remember a logarithm, as long as what it is computed from is not written to."""
        versions = tuple((tensor, version(tensor)) for tensor in read)
        found = _Origin(read[0], lambda _scores: logarithm(), version(result), None, versions, True, signed)
        self._origins[result] = found

    def _origin(self, x: Any) -> _Origin | None:
        origin = self._origins.get(x)
        if origin is None or origin.version != version(x):
            return None
        return origin if all(version(tensor) == number for tensor, number in origin.read) else None


def _of_sigmoid(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The binary cross entropy of `sigmoid(scores)` as PyTorch has it in fp32, by element.

    From _ONE on the sigmoid is 1: a target of 0 costs 100 (PyTorch's bound of logarithms), and there is no gradient.
    Below _FAINT the gradient is divided by 1e-12 in the place of the smaller p (1 - p).
    """
    each = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    fading = -torch.exp((scores - _FAINT).clamp(max=0.0))
    lost = _WHERE(scores < _NONE, _MOST, -scores).detach()
    faint = target * (lost + (fading - fading.detach()))
    return _WHERE(scores > _ONE, (1 - target) * _MOST, _WHERE(scores < _FAINT, faint, each))  # type: ignore[no-any-return]


def _is_share(end: object) -> bool:
    return end is None or (isinstance(end, (int, float)) and 0.0 < float(end) <= 1.0)


def _log_of_sum(logarithm: Function, epsilon: float, scores: torch.Tensor) -> torch.Tensor:
    """logaddexp(log p, log epsilon), whose derivative is one less a sigmoid: no exponential leaves fp16."""
    found: torch.Tensor = logarithm(scores)
    return found + F.softplus(math.log(epsilon) - found)


def _log_of_clamped(
    logarithm: Function, low: float | None, high: float | None, scores: torch.Tensor
) -> torch.Tensor:
    lowest, highest = (None if end is None else math.log(end) for end in (low, high))
    return torch.clamp(logarithm(scores), lowest, highest)


_VIEWS: tuple[Function, ...] = (
    torch.Tensor.squeeze, torch.Tensor.unsqueeze, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten,
    torch.Tensor.contiguous, torch.Tensor.view_as, torch.Tensor.float, torch.squeeze,
    torch.unsqueeze, torch.reshape, torch.flatten,
)  # fmt: skip
#: Choices of entries and other orders of them.
_CHOICES: tuple[Function, ...] = (
    torch.gather, torch.Tensor.gather, torch.index_select, torch.Tensor.index_select, torch.select, torch.Tensor.select,
    torch.Tensor.transpose, torch.Tensor.permute, torch.Tensor.expand, torch.transpose, torch.permute, torch.Tensor.t,
    torch.Tensor.clone, torch.take_along_dim,
)  # fmt: skip
