"""The callbacks of a configured run: those that its options ask for, and the one that keeps its folder up to date."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.training.callbacks import (
    BestWeights,
    Callback,
    EarlyStopping,
    TimeLimit,
    WeightAveraging,
    score_of,
)
from ane_trainer.training.checkpoint import Checkpoint, has_step
from ane_trainer.training.config import RESUMABLE, TrainConfig
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.results import Epoch
from ane_trainer.training.runs import BEST, RunFolder
from ane_trainer.training.schedules import LearningRateSchedule, Schedule
from ane_trainer.training.trainer import Trainer


def make_callbacks(config: TrainConfig) -> list[Callback]:
    """What the options ask for, in the order in which it has to act."""
    found: list[Callback] = []
    schedule = Schedule(
        config.schedule, config.warmup, config.lr_floor, config.lr_decay, config.lr_every, config.lr_patience
    )
    if schedule.name != "constant" or schedule.warmup:
        found.append(LearningRateSchedule(schedule))
    if config.ema is not None:
        found.append(WeightAveraging(config.ema))
    if config.patience is not None:
        found.append(EarlyStopping(config.patience, config.min_delta, config.monitor))
    if config.best:
        found.append(BestWeights(config.monitor))
    if config.time_limit is not None:
        found.append(TimeLimit(config.seconds_allowed))
    return found


class Recorder(Callback):
    """Writes to `run` from the moment that the step is ready: at step 0, each `save_every`, after each epoch."""

    def __init__(self, run: RunFolder, config: TrainConfig, description: DataDescription) -> None:
        self._run, self._config, self._description = run, config, description
        self._best: float | None = None
        self._saved_steps, self._saved_at, self._ended = 0, time.monotonic(), False

    def on_train_start(self, trainer: Trainer) -> None:
        self._run.begin(self._config, trainer.progress.epoch)
        self._run.write_description(self._description)
        self.save(trainer)

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        interval = self._config.save_interval
        steps = trainer.progress.steps - self._saved_steps
        due = interval.steps and steps >= interval.steps
        late = interval.seconds and time.monotonic() - self._saved_at >= interval.seconds
        if trainer.stop_now or due or late:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        self._run.append_metrics(record.to_json())
        score = score_of(record, self._config.monitor)
        if self._best is None or score > self._best:
            self._best = score
            self._run.write_weights(trainer.evaluated_model.state_dict(), BEST)
        every = self._config.keep_every
        kept = every is not None and record.epoch % every == 0
        self.save(trainer, keep_as=f"epoch-{record.epoch:04d}" if kept else None)

    def on_train_end(self, trainer: Trainer) -> None:
        self._ended = True

    def save(self, trainer: Trainer, keep_as: str | None = None) -> None:
        """Write a checkpoint. Diverged, and the last one stays, if a parameter is not finite.

        After the end nothing is written: the model may have other weights than the step by then.
        """
        if self._ended:
            return
        checkpoint = trainer.checkpoint()
        trainer.check_finite()
        self._run.write_checkpoint(checkpoint, keep_as=keep_as)
        self._saved_steps, self._saved_at = trainer.progress.steps, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "config": self._config.model_dump(mode="json")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best = state.get("best")


def changed_options(config: TrainConfig, checkpoint: Checkpoint) -> list[str]:
    """The options that differ from those that the checkpoint was trained with, but for those that may."""
    before = checkpoint.scalars.get("callbacks", {}).get(Recorder.__name__, {}).get("config", {})
    now = config.model_dump(mode="json")
    return sorted(name for name in before.keys() & now.keys() - RESUMABLE if before[name] != now[name])


def restore_run(trainer: Trainer, run: RunFolder, config: TrainConfig) -> None:
    """Go on from the run's last checkpoint. UsageError where device, options or epochs do not allow it."""
    checkpoint, damage = run.read_checkpoint()
    if damage:
        trainer.report.note("warning", f"the last checkpoint is left out, the one before is used: {damage}")
    was_cpu = checkpoint.scalars.get("options", {}).get("device") == "cpu"
    if was_cpu != (not trainer.target.runs_programs) and has_step(checkpoint):
        raise UsageError(
            f"{run.path}: needs {'device cpu' if was_cpu else 'a device that runs programs'}, as it was begun; "
            f"got {trainer.target.device}. Leave --device out.",
            code="ANE107",
        )
    if changed := changed_options(config, checkpoint):
        raise UsageError(
            f"{run.path}: needs the options that it was begun with; {', '.join(changed)} of its config.toml differ "
            "now. Put them back, or start a new run.",
            code="ANE107",
        )
    trainer.restore(checkpoint)
    done = trainer.progress.epoch
    if done > config.epochs or (done == config.epochs and run.has_result()):
        raise UsageError(
            f"{run.path}: needs epochs left to train; all {done} are done. "
            f"Add more: --resume {run.path} --epochs {done + 5}",
            code="ANE107",
        )


def check_same_data(run: RunFolder, description: DataDescription) -> None:
    """DataError DATA103 if the data is read in another way now than when the run began."""
    stored = run.read_description()
    names = ("kind", "task", "in_shape", "class_names", "mean", "std", "columns", "target_mean", "vocabulary")
    changed = [
        name for name in names if stored is not None and getattr(stored, name) != getattr(description, name)
    ]
    if changed:
        raise DataError(
            f"{run.path}: needs the data that it was trained on; {', '.join(changed)} of {description.name} "
            "differ now. Put the data back, or train a new run.",
            code="DATA103",
        )


def begun_before(out: str | Path | None) -> str | Path | None:
    """The run in `out` if torchrun started these processes again after one was lost, to be gone on with.

    UsageError where it may do so and there is no `out` to find the run by.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    if out is None:
        raise UsageError(
            "train: needs a folder for the run, where a restart by torchrun finds it; got --max-restarts without. "
            "Add --out DIR.",
            code="ANE104",
        )
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return out if again and RunFolder(Path(out)).holds_training() else None
