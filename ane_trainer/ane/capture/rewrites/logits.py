"""Losses of probabilities as losses of the scores they came from.

`binary_cross_entropy(sigmoid(x), y)` and `log(softmax(x))` lose everything where fp16 rounds a probability to 1 or
0; the same functions of x do not. A sigmoid's or softmax's result remembers x through views and reshapes, as
long as it is not written to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ane_trainer.ane.capture.trace.torch_private import SideTable, version

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Origin:
    """What a tensor of probabilities was made of: `logarithm(scores)` is its logarithm."""

    scores: torch.Tensor
    logarithm: Function
    version: int


class Origins:
    """What probabilities were made of, for each tensor of one capture that lives; `rewrites` are its functions."""

    def __init__(self) -> None:
        self._origins: SideTable[_Origin] = SideTable()
        self.rewrites: dict[Function, Function] = {
            torch.sigmoid: self._sigmoid, torch.Tensor.sigmoid: self._sigmoid, torch.softmax: self._softmax,
            F.softmax: self._softmax, torch.Tensor.softmax: self._softmax, torch.log: self._logarithm,
            torch.Tensor.log: self._logarithm, F.binary_cross_entropy: self._binary_cross_entropy,
            **{function: functools.partial(self._moved, function) for function in _VIEWS},
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
        result: torch.Tensor = origin.logarithm(origin.scores)
        return result

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
        if origin is None or origin.logarithm is not F.logsigmoid:
            return F.binary_cross_entropy(input, target, *options)
        return F.binary_cross_entropy_with_logits(origin.scores, target, *options)

    def _moved(self, function: Function, x: object, *args: object, **kwargs: object) -> Any:
        """A view or reshape, which passes on what a sigmoid's result was made of."""
        result = function(x, *args, **kwargs)
        origin = self._origin(x)
        if origin is not None and origin.logarithm is F.logsigmoid and isinstance(result, torch.Tensor):
            self._remember(result, function(origin.scores, *args, **kwargs), F.logsigmoid)
        return result

    def _remember(self, result: torch.Tensor, scores: torch.Tensor, logarithm: Function) -> torch.Tensor:
        self._origins[result] = _Origin(scores, logarithm, version(result))
        return result

    def _origin(self, x: Any) -> _Origin | None:
        origin = self._origins.get(x)
        return origin if origin is not None and origin.version == version(x) else None


_VIEWS: tuple[Function, ...] = (
    torch.Tensor.squeeze, torch.Tensor.unsqueeze, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten,
    torch.Tensor.contiguous, torch.Tensor.view_as, torch.Tensor.float, torch.squeeze,
    torch.unsqueeze, torch.reshape, torch.flatten,
)  # fmt: skip
