"""The callbacks of a configured run: those that its options ask for, and the one that keeps its folder up to date."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ane_trainer.__version__ import __version__
from ane_trainer.ane.errors import CheckpointError, DataError, UsageError
from ane_trainer.training.callbacks import (
    BestWeights,
    Callback,
    EarlyStopping,
    TimeLimit,
    WeightAveraging,
    score_of,
)
from ane_trainer.training.checkpoint import Checkpoint, has_step
from ane_trainer.training.config import MODEL_DEFAULTS, RESUMABLE, TrainConfig
from ane_trainer.training.datasets.description import Column, DataDescription
from ane_trainer.training.datasets.known import find as find_known
from ane_trainer.training.datasets.splits import Splits
from ane_trainer.training.folder.results import Epoch, Result
from ane_trainer.training.folder.runs import BEST, DATA, RunFolder
from ane_trainer.training.language.lora import own_state
from ane_trainer.training.schedules import LearningRateSchedule, Schedule
from ane_trainer.training.trainer import Trainer
from ane_trainer.utils import format_count


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
        self._run.begin(self._config, (record.to_json() for record in trainer.history))
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
            self._run.write_weights(own_state(trainer.evaluated_model), self.origin, BEST)
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

    @property
    def origin(self) -> dict[str, object]:
        """What the weights come from: the options and the data's description."""
        return {"config": self._config.model_dump(mode="json"), "data": self._description.to_json()}

    def state_dict(self) -> dict[str, object]:
        return {"best": self._best, **self.origin}

    def load_state_dict(self, state: dict[str, object]) -> None:
        best = state.get("best")
        self._best = best if isinstance(best, float | None) else None


def check_origin(
    run: RunFolder, config: TrainConfig, description: DataDescription | None, origin: Mapping[str, object]
) -> None:
    """Refuse to use weights with other options or another reading of the data than they were trained with.

    Options that a run may change are left out, and where own data lies, of which `check_same_data` knows more.
    UsageError ANE107: config.toml; CheckpointError CKPT103: data.json.
    """
    before, now = origin.get("config"), config.model_dump(mode="json")
    before = before if isinstance(before, Mapping) else {}
    own = find_known(str(before.get("dataset"))) is None and find_known(config.dataset) is None
    free = RESUMABLE | ({"dataset"} if own else set())
    changed = sorted(name for name in before.keys() & now.keys() - free if before[name] != now[name])
    if changed:
        raise UsageError(
            f"{run.path}: needs the options that it was begun with; {', '.join(changed)} of its config.toml differ "
            "now. Put them back, or start a new run.",
            code="ANE107",
        )
    stored = origin.get("data")
    if stored is not None and description is not None and not _same(description.to_json(), stored):
        raise CheckpointError(
            f"{run.path / DATA}: needs the description of the data that `train` wrote; it was changed since. "
            "Put it back, or train again.",
            code="CKPT103",
        )


def _same(now: Mapping[str, object], stored: object) -> bool:
    """Whether a description is the stored one, but for what only one of the versions that wrote them knows."""
    plain = json.loads(json.dumps(now))  # lists for tuples
    if not isinstance(stored, Mapping):
        return False
    known = {
        name for name in plain.keys() & stored.keys() if name != "content" or (plain[name] and stored[name])
    }
    return all(plain[name] == stored[name] for name in known)


def restore_run(
    trainer: Trainer, run: RunFolder, config: TrainConfig, checkpoint: Checkpoint, damage: str
) -> None:
    """Go on from a checkpoint of the run. UsageError where device or epochs do not allow it.

    damage  what is wrong with a later checkpoint, if anything is.
    """
    if damage:
        trainer.report.note("warning", f"the last checkpoint is left out, the one before is used: {damage}")
    was_cpu = checkpoint.scalars.get("options", {}).get("device") == "cpu"
    if was_cpu != (not trainer.target.runs_programs) and has_step(checkpoint):
        raise UsageError(
            f"{run.path}: needs {'device cpu' if was_cpu else 'a device that runs programs'}, as it was begun; "
            f"got {trainer.target.device}. Leave --device out.",
            code="ANE107",
        )
    trainer.restore(checkpoint)
    done, begun = trainer.progress.epoch, trainer.progress.batch > 0
    if done + begun > config.epochs or (done == config.epochs and run.has_result()):
        state = f"all {done} are done" if not begun else f"it is in epoch {done + 1}"
        raise UsageError(
            f"{run.path}: needs epochs left to train; {state}. "
            f"Add more: --resume {run.path} --epochs {done + 5}",
            code="ANE107",
        )


def check_same_data(run: RunFolder, description: DataDescription) -> None:
    """DataError DATA103 if the data is read in another way now than when the run began."""
    stored = run.read_description()
    names = ["kind", "task", "in_shape", "class_names", "mean", "std", "columns", "target_mean", "vocabulary"]
    if stored is not None and stored.content.startswith("2:"):  # older versions looked at less
        names.append("content")
    changed = [
        name
        for name in names
        if stored is not None and not _alike(getattr(stored, name), getattr(description, name))
    ]
    if changed:
        raise DataError(
            f"{run.path}: needs the data that it was trained on; {', '.join(changed)} of {description.name} "
            "differ now. Put the data back, or train a new run.",
            code="DATA103",
        )


def overridden(run: RunFolder, config: TrainConfig, options: Mapping[str, object]) -> TrainConfig:
    """The run's options with those that were given. UsageError ANE107 for data that cannot be the run's own."""
    changed = config.model_copy(update={k: v for k, v in options.items() if v is not None})
    if changed.dataset != config.dataset and (find_known(config.dataset) or find_known(changed.dataset)):
        raise UsageError(
            f"{run.path}: needs its own data, {config.dataset}; got {changed.dataset}. --data says where the same data "
            "is now; train another run on other data.",
            code="ANE107",
        )
    return changed


@contextlib.contextmanager
def data_of(run: RunFolder, config: TrainConfig, fix: str) -> Iterator[None]:
    """Within the block, DATA101 (no such data) says that it is the run's, and what tells where it is now."""
    try:
        yield
    except DataError as error:
        if error.code != "DATA101":
            raise
        text = f"{run.path}: needs the data that it was trained on; {config.dataset} does not exist any more. {fix}"
        raise DataError(text, code="DATA101") from None


def _alike(one: object, other: object) -> bool:
    """Whether two values are equal, numbers but for what another machine's order of adding makes of a mean."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-12)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Column) and isinstance(other, Column):
        return _alike(dataclasses.astuple(one), dataclasses.astuple(other))
    return one == other


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


def introduce(trainer: Trainer, config: TrainConfig, splits: Splits) -> None:
    """Report what is trained on what."""
    note, progress = trainer.report.note, trainer.progress
    _check_steps(trainer, config, len(splits.train))
    note("data", splits.description.summary())
    for text in splits.description.notes:
        note("data", text)
    parameters = format_count(sum(parameter.numel() for parameter in trainer.model.parameters()))
    note(
        "model",
        f"{config.model}  {parameters} parameters   {config.optimizer} lr {config.learning_rate:g}   "
        f"batch {config.batch_size}   seed {config.seed}",
    )
    if (exchange := trainer.options.exchange) is not None:
        count, world = exchange.shards.count, exchange.shards.world
        size = config.examples_a_step // count
        note("shards", f"{count} of {size} examples each in {world} process{'es' if world > 1 else ''}")
    if progress.steps:
        note("resume", f"at epoch {progress.epoch + 1}, batch {progress.batch + 1}")


def _check_steps(trainer: Trainer, config: TrainConfig, batches: int) -> None:
    """UsageError ANE104 where no weight would ever change; a warning where the learning rate would only rise."""
    steps = batches * config.epochs
    if config.accumulate > steps:
        raise UsageError(
            f"train: accumulate needs at most the {steps:,} batches of this training; got {config.accumulate:,}: "
            "no weight would change. Change --accumulate or --epochs.",
            code="ANE104",
        )
    for text in unused_options(config):
        trainer.report.note("warning", text)
    if config.warmup >= steps:
        trainer.report.note(
            "warning",
            f"--warmup of {config.warmup:,} steps is as long as the training ({steps:,}): the learning rate only rises",
        )


#: Option -> the option and its values that it is of.
_OF = {
    "momentum": ("optimizer", ("sgd",)), "lr_decay": ("schedule", ("step", "plateau")),
    "lr_every": ("schedule", ("step",)), "lr_patience": ("schedule", ("plateau",)),
    "lr_floor": ("schedule", ("cosine", "linear", "one-cycle", "step", "plateau")),
}  # fmt: skip


def unused_options(config: TrainConfig) -> list[str]:
    """A sentence for each option that was given and does nothing beside the others."""
    found = []
    for name, (other, values) in _OF.items():
        if (
            getattr(config, name) != TrainConfig.model_fields[name].default
            and getattr(config, other) not in values
        ):
            dashed, wanted = name.replace("_", "-"), " or ".join(values)
            found.append(
                f"--{dashed} does nothing: it is of --{other} {wanted}, and this is {getattr(config, other)}"
            )
    if config.min_delta and config.patience is None:
        found.append("--min-delta does nothing without --patience")
    return found


def check_loss(config: TrainConfig, description: DataDescription) -> None:
    """UsageError ANE104 for a loss that cannot be of this task, or not of the outputs of a ready model."""
    ready = description.default_model if config.model == "auto" else config.model
    unfit, task = {"auto"}, description.task
    if task == "regress":
        unfit |= {"cross_entropy", "nll"}
    elif task == "next-token":
        unfit |= {"mse", "l1", "huber", "smooth_l1", "bce", "bce_with_logits"}
    if ready in MODEL_DEFAULTS:  # they end in logits
        unfit |= {"nll", "bce"}
    if config.loss in unfit - {"auto"}:
        what = (
            f"{task} data"
            if config.loss not in ("nll", "bce")
            else f"the outputs of {ready}, which are logits"
        )
        raise UsageError(
            f"loss: needs one for {what}; got {config.loss!r}. Do: --loss {description.default_loss}.",
            code="ANE104",
        )
    made_of = {"cnn": "images", "transformer": "images", "gpt": "text"}.get(ready)
    kind = {"image": "images", "text": "text", "table": "a table"}.get(description.kind, "numbers")
    if (made_of and made_of != kind) or (ready == "mlp" and kind == "text"):
        raise UsageError(
            f"model: needs one for {kind}; got {ready!r}, which is for {made_of or 'numbers and images'}. "
            f"Do: --model {description.default_model}.",
            code="ANE104",
        )
    if config.monitor == "val_accuracy" and task in ("regress",):
        raise UsageError(
            "monitor: needs a number that this training has; got 'val_accuracy', and numbers are predicted. "
            "Do: --monitor val_loss.",
            code="ANE104",
        )


def provenance(config: TrainConfig, run: RunFolder, reference: Result | None) -> dict[str, object]:
    """What of a run its result.json tells beside the outcome."""
    return {
        "run": str(run.path),
        "optimizer": config.optimizer,
        "lr": config.learning_rate,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "fp32_seconds_per_step": reference.seconds_per_step if reference else None,
        "version": __version__,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
