"""Batches by name for models that return their own loss, as Hugging Face's do: whole, padded, filled up.

A dictionary of input_ids, attention_mask, labels and the like goes to the model by name. A shorter sequence is padded
to the length of the compiled step, behind a mask; a smaller batch is filled up with copies whose labels do not count.
Both leave the loss as it is, which for the second is tried on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer.ane.capture.calibrate import call_aside, module_mode
from ane_trainer.ane.capture.losses import Loss, model_loss
from ane_trainer.ane.errors import DataError
from ane_trainer.training import loop
from ane_trainer.training.intake import Intake, has_smaller_batch
from ane_trainer.training.loop import Batch

LABELS, MASK, TOKENS = "labels", "attention_mask", "input_ids"
#: The label that Hugging Face's and PyTorch's losses leave out.
IGNORED = -100

Named = dict[str, object]


class LossOnly(nn.Module):
    """A model of which only its own loss is wanted, so that its program has no other output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: object) -> torch.Tensor:
        """The loss."""
        return model_loss(self.model(**inputs))


def joined(model: nn.Module, x: object, y: object) -> Named:
    """x and y as the model's arguments by name; DataError DATA105 for several tensors without names."""
    if isinstance(x, torch.Tensor):
        x = {str(getattr(model, "main_input_name", TOKENS)): x}
    if not isinstance(x, Mapping):
        raise DataError(
            f'loss="model": needs batches that are dictionaries, e.g. of {TOKENS} and {LABELS}; got '
            f"{type(x).__name__}. Give the model's arguments by name.",
            code="DATA105",
        )
    named = {name: value for name, value in x.items() if value is not None}
    return {**named, LABELS: y} if isinstance(y, torch.Tensor) else named


def padded(x: Named, length: int) -> Named:
    """The batch with its sequences `length` long: the rest is masked, and has labels that do not count.

    It stays as it is if it is not shorter, or if it has no mask.
    """
    tokens = x.get(MASK)
    now = tokens.shape[1] if isinstance(tokens, torch.Tensor) and tokens.dim() == 2 else length
    if now >= length:
        return x
    return {
        name: F.pad(value, (0, length - now), value=IGNORED if name == LABELS else 0)
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] == now
        else value
        for name, value in x.items()
    }


def filled(x: Named, rows: int) -> Named:
    """The batch with copies of its own examples up to `rows`, whose labels do not count."""
    count = loop.batch_size_of(x)
    source = torch.arange(rows) % count
    whole = {n: v[source] if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    labels = whole.get(LABELS)
    if isinstance(labels, torch.Tensor):
        labels[count:] = IGNORED
    return whole


def labels_that_count(x: Named) -> int:
    """Of how many values the batch's loss is the mean: labels that count, of sequences those with a token before."""
    labels = x.get(LABELS)
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return loop.batch_size_of(x)
    return int((labels[..., 1:] if labels.dim() > 1 else labels).ne(IGNORED).sum())


def ignores_labels(model: nn.Module, x: Named) -> bool:
    """Whether examples whose labels are -100 leave the loss of a batch as it is; tried on the host."""
    labels, rows = x.get(LABELS), loop.batch_size_of(x)
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or rows < 2:
        return False
    small = {n: v[: rows // 2] if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    if not labels_that_count(small):
        return False
    with torch.no_grad(), module_mode(model, training=False):
        losses = [float(model_loss(call_aside(model, {}, part))) for part in (small, filled(small, rows))]
    return abs(losses[0] - losses[1]) <= 1e-3 * abs(losses[0]) + 1e-6


class OwnLossIntake(Intake):
    """Batches in the form of a step with `loss="model"`: x holds all that the model takes by name, y is empty."""

    _fills: bool | None = None

    def begin(self, data: Iterable[object], x: object, y: object) -> Batch:
        """The first batch in the step's form."""
        whole = joined(self._model, x, y)
        self.example = (whole, ())
        self._obstacle = f"labels of {IGNORED} change the model's loss"
        if has_smaller_batch(data) and not self._can_fill():
            self._announce_left_out(loop.batch_size_of(whole))
        return self.example

    def __call__(self, x: object, y: object, where: str) -> Batch | None:
        """The batch in the step's form; None for a smaller one that is left out, with a note."""
        assert self.example is not None
        form = self._form(x, y)
        if loop.fits_step(*form, self.example, where):
            return form
        self._announce_left_out(loop.batch_size_of(self.example[0]))
        return None

    def _form(self, x: object, y: object) -> Batch:
        return self.fitted(joined(self._model, x, y)), ()

    def counts(self, x: object, y: object) -> bool:
        """Whether a label of this batch counts."""
        return not isinstance(x, dict) or labels_that_count(x) > 0

    def fitted(self, x: Named) -> Named:
        """The batch padded and filled up to the shapes of the first one, as far as that changes nothing."""
        assert self.example is not None
        first = self.example[0]
        mask = first.get(MASK)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            x = padded(x, mask.shape[1])
        rows = loop.batch_size_of(first)
        return filled(x, rows) if loop.batch_size_of(x) < rows and self._can_fill() else x

    def _can_fill(self) -> bool:
        if self._fills is None:
            assert self.example is not None
            self._fills = ignores_labels(self._model, self.example[0])
        return self._fills


def make_intake(model: nn.Module, loss: str | Loss) -> Intake:
    """What brings batches into the form of a step with this loss."""
    return OwnLossIntake(model, loss) if loss in ("model", model_loss) else Intake(model, loss)
