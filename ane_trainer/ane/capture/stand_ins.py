"""Substitute a model's parameters and buffers where code holds the tensors themselves, not its modules.

A call of a model on other tensors puts these where its modules keep them. A loss that adds
`model.fc.weight.square().sum()`, or a forward that goes through a list of parameters, holds the tensors themselves:
without this a program would take them for constants, and their gradient for none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ane_trainer.ane.capture.trace.torch_private import pytree

#: Arguments that hold no others: most, and to look into them as trees takes longer than the operations themselves.
_LEAVES = (torch.Tensor, int, float, str, torch.dtype, torch.device, type(None))


class StandIns(TorchFunctionMode):
    """Within the block each torch call gets, for a parameter or buffer of `model`, what `tensors` has by its name."""

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, object]) -> None:
        super().__init__()
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        pairs = [(own, tensors[name]) for name, own in named if name in tensors]
        self._known = {id(own): other for own, other in pairs if own is not other}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Any = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        return func(
            *map(self._shown, args), **{key: self._shown(value) for key, value in (kwargs or {}).items()}
        )

    def _shown(self, argument: object) -> object:
        return (
            self._other(argument) if isinstance(argument, _LEAVES) else pytree.tree_map(self._other, argument)
        )

    def _other(self, value: object) -> object:
        return self._known.get(id(value), value)
