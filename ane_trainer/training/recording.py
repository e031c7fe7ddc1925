"""Keeps a run's folder up to date while it trains: checkpoints, metrics, the best weights."""

from __future__ import annotations

import time

from ane_trainer.training.callbacks import Callback
from ane_trainer.training.config import TrainConfig
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.results import Epoch
from ane_trainer.training.runs import BEST, RunFolder
from ane_trainer.training.trainer import Trainer


class Recorder(Callback):
    """Writes to `run` from the moment that the step is ready: at step 0, each `save_every`, after each epoch."""

    def __init__(self, run: RunFolder, config: TrainConfig, description: DataDescription) -> None:
        self._run, self._config, self._description = run, config, description
        self._best: float | None = None
        self._saved_steps, self._saved_at = 0, time.monotonic()

    def on_train_start(self, trainer: Trainer) -> None:
        self._run.begin(self._config, trainer.progress.epoch)
        self._run.write_description(self._description)
        self.save(trainer)

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        interval = self._config.save_interval
        steps = trainer.progress.steps - self._saved_steps
        if (interval.steps and steps >= interval.steps) or (
            interval.seconds and time.monotonic() - self._saved_at >= interval.seconds
        ):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        self._run.append_metrics(record.to_json())
        score = record.val_accuracy if record.val_accuracy is not None else record.val_loss
        if score is not None:
            score = score if record.val_accuracy is not None else -score
            if self._best is None or score > self._best:
                self._best = score
                self._run.write_weights(trainer.model.state_dict(), BEST)
        every = self._config.keep_every
        kept = every is not None and record.epoch % every == 0
        self.save(trainer, keep_as=f"epoch-{record.epoch:04d}" if kept else None)

    def save(self, trainer: Trainer, keep_as: str | None = None) -> None:
        """Write a checkpoint. Diverged, and the last one stays, if a parameter is not finite."""
        checkpoint = trainer.checkpoint()
        trainer.check_finite()
        self._run.write_checkpoint(checkpoint, keep_as=keep_as)
        self._saved_steps, self._saved_at = trainer.progress.steps, time.monotonic()

    def state_dict(self) -> dict[str, float]:
        return {} if self._best is None else {"best": self._best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._best = state.get("best")
