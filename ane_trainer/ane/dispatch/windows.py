"""The batches of an update that is compared with fp32: where they accumulate, they are compared as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.capture.trace.torch_private import pytree

Batch = tuple[object, object]


@dataclass
class Window:
    """The batches of the present update, of `count`, and their losses, if it is compared as a whole.

    An update of which a later batch was of another size than those so far has the next one compared.
    """

    count: int
    _parts: list[Batch] = field(default_factory=list)
    _losses: list[float] = field(default_factory=list)
    _draws: torch.Tensor | None = None
    _open: bool = False
    _next: bool = False

    def take(self, batch: Batch, draws: torch.Tensor, compared: bool, pending: int) -> bool:
        """Take a batch that comes after `pending` others, with the state of its draws; whether all are there now."""
        if pending == 0:
            self._open, self._next = self.count > 1 and (compared or self._next), False
            self._draws = draws
            self._parts.clear()
            self._losses.clear()
        self._next |= compared and not self._open
        if self._open:
            self._parts.append(pytree.tree_map_only(torch.Tensor, torch.clone, batch))
        return self._open and len(self._parts) == self.count

    def drop(self) -> None:
        """Compare the next update instead of this one: the model is no longer that of the batches so far."""
        self._next |= self._open
        self._open = False

    def mean_loss(self, loss: float) -> float:
        """The mean of the losses so far, of which this is the next."""
        self._losses.append(loss)
        return sum(self._losses) / len(self._losses)

    def as_one(self, options: GradientOptions) -> tuple[GradientOptions, Sequence[Batch], torch.Generator]:
        """The update as one of a batch in parts: its options, the parts, and what the first and those after it draw."""
        assert self._draws is not None
        draws = torch.Generator().set_state(self._draws)
        return dataclasses.replace(options, accumulate=1), self._parts, draws
