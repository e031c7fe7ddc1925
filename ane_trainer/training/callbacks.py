"""What can happen while a trainer trains: `Callback`, with Lightning's names for the moments, and common ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ane_trainer.ane.capture.rewrites.keras_variables import copy_of
from ane_trainer.ane.dispatch.state import CALLBACK, incomplete, part
from ane_trainer.ane.errors import UsageError
from ane_trainer.training.checkpoint import write_tensors
from ane_trainer.training.folder.records import unwritable
from ane_trainer.training.folder.results import Epoch, Metrics

if TYPE_CHECKING:
    from ane_trainer.training.trainer import Trainer


class Callback:
    """Called by `Trainer.fit` at the moments below; this one does nothing. Override what you need.

    `trainer.should_stop = True` (`stop_training` for those who come from Keras) ends training after the epoch.
    A callback with a state of its own has `state_dict` and `load_state_dict`; it goes into checkpoints, by the
    class's name.
    """

    def on_train_start(self, trainer: Trainer) -> None:
        """The step is compiled and, in a resumed training, has its state; nothing was trained yet."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """A pass over the data begins, or goes on."""

    def on_train_batch_start(self, trainer: Trainer) -> None:
        """A step is about to run."""

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        """A step is done; `loss` is that of the batch before the update."""

    def on_validation_end(self, trainer: Trainer, metrics: Metrics) -> None:
        """The epoch's model was evaluated on the validation data."""

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        """An epoch is finished, evaluation included."""

    def on_train_end(self, trainer: Trainer) -> None:
        """All epochs are finished, or a callback ended training."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Training ends by an error or by Ctrl-C."""

    def state_dict(self) -> dict[str, object]:
        """What a resumed training has to know, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict`."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that a resumed training has to have."""
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `tensors`."""


class Callbacks:
    """The callbacks of a training in their order, and what a checkpoint keeps of them.

    The state of one that is not here stays as it was loaded, so that nothing is lost.
    """

    def __init__(self, callbacks: Iterable[object] = ()) -> None:
        self._callbacks = tuple(c if isinstance(c, Callback) else KerasCallback(c) for c in callbacks)
        self._scalars: dict[str, object] = {}
        self._tensors: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    def load(self, scalars: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from a checkpoint. CheckpointError for a state that a callback cannot use."""
        self._scalars, self._tensors = dict(scalars), part(tensors, CALLBACK)
        for callback in self:
            name = type(callback).__name__
            try:
                callback.load_tensors(part(self._tensors, f"{name}/"))
                if name in scalars:
                    callback.load_state_dict(scalars[name])
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise incomplete("checkpoint", [f"{name} cannot go on from its state ({error!r})"]) from None

    def state_dict(self) -> dict[str, object]:
        """JSON by the class's name."""
        return self._scalars | {type(c).__name__: state for c in self if (state := c.state_dict())}

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that they have in a checkpoint."""
        own = {f"{type(c).__name__}/{name}": value for c in self for name, value in c.tensors().items()}
        return {CALLBACK + name: value for name, value in (self._tensors | own).items()}


#: A callback's moments in Keras -> in this module.
KERAS_MOMENTS = {
    "on_train_begin": "on_train_start", "on_epoch_begin": "on_train_epoch_start", "on_epoch_end": "on_train_epoch_end",
    "on_batch_begin": "on_train_batch_start", "on_train_batch_begin": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end", "on_train_batch_end": "on_train_batch_end", "on_train_end": "on_train_end",
}  # fmt: skip


class KerasCallback(Callback):
    """Calls an object by Keras' moments, `on_epoch_end(epoch, logs)` and the like; its `model` is the trainer.

    Epochs and batches count from 0; logs has loss, and after an epoch val_loss, val_accuracy and lr. UsageError for an
    object without any of the moments.
    """

    def __init__(self, callback: object) -> None:
        known = [name for name in KERAS_MOMENTS if callable(getattr(callback, name, None))]
        if not known:
            raise UsageError(
                f"callbacks: needs Callbacks, or objects with methods like on_epoch_end; got {callback!r}. "
                "Derive it from ane_trainer.Callback.",
                code="ANE104",
            )
        self._callback, self._known = callback, known

    def on_train_start(self, trainer: Trainer) -> None:
        setattr(self._callback, "model", trainer)  # noqa: B010  as Keras' set_model does
        self._call("on_train_begin", {})

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self._call("on_epoch_begin", trainer.progress.epoch, {})

    def on_train_batch_start(self, trainer: Trainer) -> None:
        self._each("on_batch_begin", "on_train_batch_begin", trainer.progress.batch - 1, {})

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        self._each("on_batch_end", "on_train_batch_end", trainer.progress.batch - 1, {"loss": loss})

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        known = {"loss": record.train_loss, "val_loss": record.val_loss, "val_accuracy": record.val_accuracy}
        logs = {name: value for name, value in known.items() if value is not None}
        self._call("on_epoch_end", record.epoch - 1, {**logs, "lr": trainer.optimizer.param_groups[0]["lr"]})

    def on_train_end(self, trainer: Trainer) -> None:
        self._call("on_train_end", {})

    def _each(self, one: str, other: str, number: int, logs: dict[str, object]) -> None:
        self._call(one if one in self._known else other, number, logs)

    def _call(self, name: str, *arguments: object) -> None:
        if name in self._known:
            getattr(self._callback, name)(*arguments)


class ModelCheckpoint(Callback):
    """Writes the model's state_dict as safetensors after an epoch: each better one, or each (`save_best_only=False`).

    filepath  may hold {epoch}, {val_loss:.3f}, {val_accuracy:.3f}, {train_loss:.3f}. monitor: see `EarlyStopping`.
    """

    def __init__(self, filepath: str | Path, monitor: str = "auto", save_best_only: bool = True) -> None:
        self.filepath, self.monitor, self.save_best_only = str(filepath), monitor, save_best_only
        self.best = -math.inf
        self.best_model_path = ""

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        score = score_of(record, self.monitor)
        if self.save_best_only and score <= self.best:
            return
        self.best = max(self.best, score)
        self.best_model_path = self.filepath.format(**record.to_json())
        try:
            write_tensors(Path(self.best_model_path), trainer.evaluated_model.state_dict())
        except OSError as error:
            raise unwritable(Path(self.best_model_path), error) from None

    def state_dict(self) -> dict[str, object]:
        return {"best": str(self.best), "path": self.best_model_path}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.best, self.best_model_path = float(str(state["best"])), str(state["path"])


class LearningRateScheduler(Callback):
    """Sets the learning rate of each epoch to `schedule(epoch, rate)`; epochs count from 0, as in Keras."""

    def __init__(self, schedule: Callable[[int, float], float]) -> None:
        self.schedule = schedule
        self._epoch = -1

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        if self._epoch != trainer.progress.epoch:  # of a resumed epoch the rate is set already
            self._epoch = trainer.progress.epoch
            for group in trainer.optimizer.param_groups:
                group["lr"] = float(self.schedule(self._epoch, float(group["lr"])))

    def state_dict(self) -> dict[str, object]:
        return {"epoch": self._epoch}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._epoch = int(str(state["epoch"]))


class LearningRateMonitor(Callback):
    """Keeps the learning rate of each step in `rates`, and reports it after each epoch."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        self.rates.append(float(trainer.optimizer.param_groups[0]["lr"]))

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        trainer.report.note("lr", f"{self.rates[-1]:g} at the end of epoch {record.epoch}")


def score_of(record: Epoch, monitor: str = "auto") -> float:
    """How good an epoch was, more is better: accuracy, or minus a loss. "auto": the best that is known of it."""
    values = {
        "val_accuracy": record.val_accuracy,
        "val_loss": record.val_loss,
        "train_loss": record.train_loss,
    }
    names = values if monitor == "auto" else (monitor,)
    name = next((name for name in names if values[name] is not None), "train_loss")
    value = float(values[name] or 0.0)
    return value if name == "val_accuracy" else -value


class EarlyStopping(Callback):
    """Ends training when `monitor` has not become better by more than `min_delta` for `patience` epochs.

    monitor  val_accuracy, val_loss, train_loss, or "auto": the first of these that is known.
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0, monitor: str = "auto") -> None:
        self.patience, self.min_delta, self.monitor = patience, min_delta, monitor
        self.best, self.waited = -math.inf, 0

    def on_train_start(self, trainer: Trainer) -> None:
        if self.waited >= self.patience:  # resumed after it had stopped
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        score = score_of(record, self.monitor)
        better = score > self.best + self.min_delta
        self.best, self.waited = (score, 0) if better else (self.best, self.waited + 1)
        if self.waited >= self.patience:
            trainer.should_stop = True
            trainer.report.note("stopped", f"early: no better result for {self.waited} epochs")

    def state_dict(self) -> dict[str, object]:
        return {"best": None if math.isinf(self.best) else self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = -math.inf if state["best"] is None else state["best"]
        self.waited = state["waited"]


class TimeLimit(Callback):
    """Ends training, after a step, when it has run for so many seconds in this process."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.monotonic()

    def on_train_start(self, trainer: Trainer) -> None:
        self._began = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        if time.monotonic() - self._began >= self.seconds:
            trainer.stop_now = True
            trainer.report.note("stopped", f"after {self.seconds:g} s, the time limit; --resume goes on")


class BestWeights(Callback):
    """Ends with the weights of the best epoch instead of the last; see `EarlyStopping` for `monitor`."""

    def __init__(self, monitor: str = "auto") -> None:
        self.monitor, self.epoch = monitor, 0
        self._best = -math.inf
        self._weights: dict[str, torch.Tensor] = {}

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        score = score_of(record, self.monitor)
        if score > self._best:
            self._best, self.epoch = score, record.epoch
            self._weights = {k: v.clone() for k, v in trainer.evaluated_model.state_dict().items()}

    def on_train_end(self, trainer: Trainer) -> None:
        if self._weights:
            trainer.finish_with(self._weights, self.epoch)

    def state_dict(self) -> dict[str, object]:
        return {"best": None if math.isinf(self._best) else self._best, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self.epoch = -math.inf if state["best"] is None else state["best"], state["epoch"]

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._weights

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._weights = dict(tensors)


class WeightAveraging(Callback):
    """Evaluates and ends with an exponential moving average of the weights (EMA), kept on the host in fp32.

    After each step: average = decay * average + (1 - decay) * weights, with a smaller decay at first:
    min(decay, (1 + step) / (10 + step)). Buffers, such as a batch norm's statistics, are the model's own. The
    weights cross from the engine after each step.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self._average: torch.nn.Module | None = None
        self._loaded: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: Trainer) -> None:
        if self._average is None:
            self._average = copy_of(trainer.model)
            if self._loaded:
                self._average.load_state_dict(self._loaded)
        trainer.evaluate_with(self._average)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        if self._average is None:
            return
        trainer.sync()
        step = trainer.progress.steps
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, now in zip(self._average.parameters(), trainer.model.parameters(), strict=True):
            average.lerp_(now, weight)
        for mine, its in zip(self._average.buffers(), trainer.model.buffers(), strict=True):
            mine.copy_(its)

    def on_train_end(self, trainer: Trainer) -> None:
        if self._average is not None:
            trainer.finish_with(self._average.state_dict(), trainer.progress.epoch)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._average.state_dict()) if self._average is not None else self._loaded

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._loaded = dict(tensors)
