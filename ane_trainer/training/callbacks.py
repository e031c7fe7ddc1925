"""What can happen while a trainer trains: `Callback`, with Lightning's names for the moments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training has to know, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
