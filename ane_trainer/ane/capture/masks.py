"""Dropout by masks that the host feeds: 0 or 1/(1-p) per element, drawn from the run's seed.

The engine's random ops are not reproducible, so each dropout in training mode becomes a multiplication
with a batch port. The port's `target` is `dropout/<p>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: function -> does it drop whole channels
_DROPOUTS: dict[Callable[..., Any], bool] = {
    F.dropout: False, torch.dropout: False, F.dropout1d: True, F.dropout2d: True, F.dropout3d: True,
}  # fmt: skip
PREFIX = "dropout/"


@dataclass(frozen=True)
class Mask:
    """One dropout of the model, in order of execution."""

    shape: tuple[int, ...]
    p: float

    @property
    def target(self) -> str:
        return f"{PREFIX}{self.p!r}"


class MaskMode(TorchFunctionMode):
    """Replaces dropout by `x * mask`. With `masks` given they are used in order, else ones are noted."""

    def __init__(self, masks: Sequence[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.noted: list[Mask] = []
        self._given: Iterator[torch.Tensor] | None = None if masks is None else iter(masks)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DROPOUTS:
            return func(*args, **kwargs)
        x, p, training, inplace = _arguments(*args, **kwargs)
        if not training or p == 0.0:
            return x
        shape = tuple(x.shape)
        if _DROPOUTS[func]:
            shape = (*shape[:2], *(1,) * (len(shape) - 2))
        self.noted.append(Mask(shape, p))
        mask = torch.ones(shape) if self._given is None else next(self._given)
        return x.mul_(mask) if inplace else x * mask


def draw(target: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A mask for a port with this target: 0 with probability p, else 1 / (1 - p)."""
    p = float(target.removeprefix(PREFIX))
    if p >= 1.0:
        return torch.zeros(shape)
    return torch.empty(shape).bernoulli_(1.0 - p, generator=generator) / (1.0 - p)


def _arguments(
    input: torch.Tensor,
    p: float = 0.5,
    train: bool = True,
    inplace: bool = False,
    *,
    training: bool | None = None,
) -> tuple[torch.Tensor, float, bool, bool]:
    return input, float(p), train if training is None else training, inplace
