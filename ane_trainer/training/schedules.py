"""Learning-rate schedules: the factor of a step as a function of its number, and the callback that applies it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ane_trainer.ane.errors import UsageError
from ane_trainer.training.callbacks import Callback, score_of
from ane_trainer.training.folder.results import Epoch
from ane_trainer.utils import did_you_mean

if TYPE_CHECKING:
    from ane_trainer.training.trainer import Trainer

#: Of one-cycle, as in torch.optim.lr_scheduler.OneCycleLR: where it starts and ends, and how long it rises.
_START, _END, _RISE = 1 / 25, 1 / 25e4, 0.3

NAMES = ("constant", "cosine", "linear", "one-cycle", "step", "plateau")

#: name -> factor at `progress` (0: first step, towards 1: last), of those that have no more to them.
_SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
}


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes: constant, cosine, linear, one-cycle, step or plateau.

    warmup    steps over which it rises linearly from 0 at first (one-cycle has its own).
    lowest    the share of the learning rate below which it does not fall.
    decay     step, plateau: what it is multiplied by.
    every     step: epochs between two decays.
    patience  plateau: epochs without a better result before a decay.
    """

    name: str = "constant"
    warmup: int = 0
    lowest: float = 0.0
    decay: float = 0.1
    every: int = 10
    patience: int = 3

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UsageError(
                f"schedule: needs a known name; got {self.name!r}. {did_you_mean(self.name, NAMES)}",
                code="ANE104",
            )

    def factor(self, step: int, total: int, epoch: int) -> float:
        """Of the learning rate at step number `step` (from 0) of `total`; plateau's decays come on top."""
        if self.name == "one-cycle":
            return _one_cycle(step, total)
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "step":
            return max(self.decay ** (epoch // self.every), self.lowest)
        shape = _SHAPES.get(self.name, _SHAPES["constant"])
        progress = (step - self.warmup) / max(total - self.warmup, 1)
        return self.lowest + (1 - self.lowest) * shape(min(progress, 1.0))


def _one_cycle(step: int, total: int) -> float:
    top = max(_RISE * total - 1, 1e-9)
    if step <= top:
        return _between(_START, 1.0, step / top)
    return _between(1.0, _END, min((step - top) / max(total - 1 - top, 1e-9), 1.0))


def _between(start: float, end: float, share: float) -> float:
    """Along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


class LearningRateSchedule(Callback):
    """Sets the learning rate of every parameter group before each step; what the groups have is its top."""

    def __init__(self, schedule: Schedule | str = "cosine") -> None:
        self._schedule = Schedule(schedule) if isinstance(schedule, str) else schedule
        self._tops: list[float] = []
        self._plateau, self._best, self._waited = 1.0, -math.inf, 0

    def on_train_start(self, trainer: Trainer) -> None:
        self._tops = self._tops or [float(group["lr"]) for group in trainer.optimizer.param_groups]
        if trainer.steps_per_epoch is None and self._schedule.name in ("cosine", "linear", "one-cycle"):
            raise UsageError(
                f"schedule: {self._schedule.name} needs data that knows its number of batches; got data "
                "without len(). Use constant, step or plateau.",
                code="ANE104",
            )

    def on_train_batch_start(self, trainer: Trainer) -> None:
        total = trainer.max_epochs * (trainer.steps_per_epoch or 0)
        factor = self._schedule.factor(trainer.progress.steps, total, trainer.progress.epoch) * self._plateau
        for group, top in zip(trainer.optimizer.param_groups, self._tops, strict=True):
            group["lr"] = top * factor

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        if self._schedule.name != "plateau":
            return
        score = score_of(record)
        self._waited = 0 if score > self._best else self._waited + 1
        self._best = max(score, self._best)
        if self._waited > self._schedule.patience:
            self._waited = 0
            self._plateau = max(self._plateau * self._schedule.decay, self._schedule.lowest)

    def state_dict(self) -> dict[str, object]:
        best = None if math.isinf(self._best) else self._best
        return {"tops": self._tops, "plateau": self._plateau, "best": best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tops, self._plateau = list(state["tops"]), state["plateau"]
        self._best, self._waited = -math.inf if state["best"] is None else state["best"], state["waited"]
