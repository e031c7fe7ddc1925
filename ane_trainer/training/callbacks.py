"""What can happen while a trainer trains: `Callback`, with Lightning's names for the moments, and common ones."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ane_trainer.ane.dispatch.state import CALLBACK, incomplete, part
from ane_trainer.training.results import Epoch, Metrics

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

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)
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
            self._average = copy.deepcopy(trainer.model)
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
