"""Python state whose changes have no effect on a program: optimizers, and names that had none a few times."""

from __future__ import annotations

from collections.abc import Iterable

import torch

#: Optimizers and schedules, and where Keras has its own.
_TRAINING = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_KERAS = "keras.src.optimizers"
#: So many changes without an effect make a name harmless.
_ENOUGH = 3


def trains(value: object) -> bool:
    """Whether it is an optimizer, which a model may hold, or its schedule: each step changes them.

    Of what they hold a forward may read the settings alone (a rate).
    """
    return isinstance(value, _TRAINING) or any(b.__module__.startswith(_KERAS) for b in type(value).__mro__)


class Harmless:
    """Counts, by name, the changes that gave the same program; what a forward stores for others to look at is such."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def note(self, differences: Iterable[str]) -> bool:
        """Count these (`Guards.differences`), which had no effect; whether a name became harmless by it."""
        before = self.names
        for name in (text.partition(": ")[0] for text in differences):
            self._counts[name] = self._counts.get(name, 0) + 1
        return self.names != before

    @property
    def names(self) -> frozenset[str]:
        """Those that do not count any more."""
        return frozenset(name for name, count in self._counts.items() if count >= _ENOUGH)
