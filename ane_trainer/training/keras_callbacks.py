"""Callbacks of Keras in a training of ours: what they see, and when they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ane_trainer.training.callbacks import Callback
from ane_trainer.training.folder.results import Epoch

if TYPE_CHECKING:
    from ane_trainer.training.trainer import Trainer


class KerasCallbacks(Callback):
    """Callbacks of Keras (its own, and those written for it) in a training of ours.

    They see as `model` what they commonly use of one: `stop_training`, `optimizer.learning_rate`, `get_weights`,
    `set_weights`, and for Keras models `save` and `save_weights`; anything else raises AttributeError. `logs` holds
    `loss`, and after an epoch `val_loss`, `val_accuracy` and the trainer's metrics. Their own state is not in
    checkpoints. `optimizer`: one of Keras that they are to see, whose learning rate someone else hands on.
    """

    def __init__(self, *callbacks: Any, optimizer: object = None) -> None:
        self._callbacks, self._optimizer = callbacks, optimizer

    def on_train_start(self, trainer: Trainer) -> None:
        """Tell them the model, and that training begins."""
        for callback in self._callbacks:
            callback.set_params(
                {"epochs": trainer.max_epochs, "steps": trainer.steps_per_epoch, "verbose": 0}
            )
            callback.set_model(_KerasView(trainer, self._optimizer))
            callback.on_train_begin({})

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """`on_epoch_begin`, epochs from 0."""
        for callback in self._callbacks:
            callback.on_epoch_begin(trainer.progress.epoch, {})

    def on_train_batch_start(self, trainer: Trainer) -> None:
        """`on_train_batch_begin`, batches from 0."""
        for callback in self._callbacks:
            callback.on_train_batch_begin(trainer.progress.batch - 1, {})

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        """`on_train_batch_end` with the loss."""
        for callback in self._callbacks:
            callback.on_train_batch_end(trainer.progress.batch - 1, {"loss": loss})

    def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
        """`on_epoch_end` with the epoch's results."""
        known = {"loss": record.train_loss, "val_loss": record.val_loss, "val_accuracy": record.val_accuracy}
        known |= {f"val_{name}": value for name, value in record.scores}
        logs = {k: v for k, v in known.items() if v is not None}
        for callback in self._callbacks:  # what one adds, as ReduceLROnPlateau does, those behind it see
            callback.on_epoch_end(record.epoch - 1, logs)

    def on_train_end(self, trainer: Trainer) -> None:
        """`on_train_end`."""
        for callback in self._callbacks:
            callback.on_train_end({})


class _KerasView:
    """What Keras callbacks use of a model, of a trainer's."""

    def __init__(self, trainer: Trainer, optimizer: object = None) -> None:
        self._trainer, self._optimizer = trainer, optimizer
        self.metrics: list[object] = list(getattr(trainer.model, "metrics", ()))

    @property
    def optimizer(self) -> object:
        """Where `learning_rate` is."""
        return self if self._optimizer is None else self._optimizer

    @property
    def learning_rate(self) -> float:
        """That of the first parameter group; setting it sets all."""
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self._trainer.optimizer.param_groups:
            group["lr"] = float(value)

    @property
    def stop_training(self) -> bool:
        """Whether training is to end after the epoch."""
        return self._trainer.stop_training

    @stop_training.setter
    def stop_training(self, value: bool) -> None:
        self._trainer.stop_training = value

    def get_weights(self) -> list[object]:
        """Parameters and buffers as arrays, in the order of the state_dict."""
        self._trainer.sync()
        return [value.detach().cpu().numpy().copy() for value in self._trainer.model.state_dict().values()]

    def set_weights(self, weights: list[object]) -> None:
        """Put back what `get_weights` returned."""
        names = self._trainer.model.state_dict()
        tensors = {name: torch.as_tensor(value) for name, value in zip(names, weights, strict=True)}
        self._trainer.model.load_state_dict(tensors)

    def __getattr__(self, name: str) -> object:
        if name in ("save", "save_weights"):
            self._trainer.sync()
            return getattr(self._trainer.model, name)
        raise AttributeError(
            f"a trainer's model has no {name!r} for Keras callbacks; they see {dir(type(self))}"
        )
