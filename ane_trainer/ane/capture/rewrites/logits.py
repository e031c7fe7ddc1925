"""Losses of probabilities as losses of the scores they came from.

`binary_cross_entropy(sigmoid(x), y)` and `log(softmax(x))` lose everything where fp16 rounds a probability to 1 or
0; the same functions of x do not. A sigmoid's or softmax's result remembers x through views and reshapes, as
long as it is not written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Function = Callable[..., Any]
_ORIGIN = "_ane_origin"


@dataclass(frozen=True)
class _Origin:
    """What a tensor of probabilities was made of: `logarithm(scores)` is its logarithm."""

    scores: torch.Tensor
    logarithm: Function
    version: int


def sigmoid(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`torch.sigmoid`, remembered."""
    return _remember(torch.sigmoid(x, *args, **kwargs), x, F.logsigmoid)


def softmax(x: torch.Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`torch.softmax` and `F.softmax`, remembered; the other arguments are `_stacklevel` and `dtype`."""
    if dim is None:
        return F.softmax(x, dim, *args, **kwargs)
    dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
    result = torch.softmax(x, dim, dtype=dtype)
    return _remember(result, x, lambda scores: F.log_softmax(scores, dim, dtype=dtype))


def logarithm(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`torch.log`: of a sigmoid `logsigmoid`, of a softmax `log_softmax`."""
    origin = _origin(x)
    if origin is None or args or kwargs:
        return torch.log(x, *args, **kwargs)
    result: torch.Tensor = origin.logarithm(origin.scores)
    return result


def binary_cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`F.binary_cross_entropy`; of a sigmoid it is `binary_cross_entropy_with_logits`."""
    origin = _origin(input)
    if origin is None or origin.logarithm is not F.logsigmoid:
        return F.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)
    return F.binary_cross_entropy_with_logits(origin.scores, target, weight, size_average, reduce, reduction)


def moved(function: Function) -> Function:
    """A view or reshape that passes on what a sigmoid's result was made of."""

    def move(x: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(x, *args, **kwargs)
        origin = _origin(x)
        if origin is not None and origin.logarithm is F.logsigmoid and isinstance(result, torch.Tensor):
            _remember(result, function(origin.scores, *args, **kwargs), F.logsigmoid)
        return result

    return move


def _remember(result: torch.Tensor, scores: torch.Tensor, logarithm: Function) -> torch.Tensor:
    setattr(result, _ORIGIN, _Origin(scores, logarithm, result._version))
    return result


def _origin(x: Any) -> _Origin | None:
    origin = getattr(x, _ORIGIN, None)
    return origin if isinstance(origin, _Origin) and origin.version == x._version else None


def _view_functions() -> dict[Function, Function]:
    names = "squeeze unsqueeze view reshape flatten contiguous view_as float"
    methods = [getattr(torch.Tensor, name) for name in names.split()]
    functions = [getattr(torch, name) for name in ("squeeze", "unsqueeze", "reshape", "flatten")]
    return {function: moved(function) for function in (*methods, *functions)}


REWRITES: dict[Function, Function] = {
    torch.sigmoid: sigmoid, torch.Tensor.sigmoid: sigmoid, torch.softmax: softmax, F.softmax: softmax,
    torch.Tensor.softmax: softmax, torch.log: logarithm, torch.Tensor.log: logarithm,
    F.binary_cross_entropy: binary_cross_entropy, **_view_functions(),
}  # fmt: skip
