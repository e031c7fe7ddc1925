"""Losses by name, any callable `(output, target) -> scalar`, and the loss that a model returns itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.utils import did_you_mean

Loss = Callable[[Any, Any], torch.Tensor]


def model_loss(output: object, target: object = None) -> torch.Tensor:
    """The loss that the model's own output holds, as that of Hugging Face's models does where they are given labels.

    Raises: DataError DATA105 for an output without one.
    """
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, torch.Tensor):
        raise DataError(
            f'loss="model": needs a model whose output holds a loss; got {type(output).__name__} without one. '
            'Let the batches hold "labels", or choose another loss.',
            code="DATA105",
        )
    return found


def next_token_loss(output_BTV: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the scores of each place."""
    return F.cross_entropy(output_BTV.flatten(0, 1), target_BT.flatten())


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "nll": F.nll_loss,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "smooth_l1": F.smooth_l1_loss,
    "bce": F.binary_cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "model": model_loss,
}


def get_loss(loss: str | Loss) -> Loss:
    """The loss function called `loss` (mean over the batch), or the callable itself.

    Raises: UsageError for an unknown name.
    """
    given: object = loss
    if isinstance(given, type) and issubclass(given, torch.nn.Module):
        raise UsageError(
            f"loss: needs an object of the class; got the class {given.__name__}. Write {given.__name__}()."
        )
    if callable(loss):
        return loss
    if loss in LOSSES:
        return LOSSES[loss]
    raise UsageError(
        f"loss: needs a known one or a callable(output, target); got {loss!r}. {did_you_mean(str(loss), LOSSES)}"
    )


def loss_name(loss: str | Loss) -> str:
    """How messages call the loss."""
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


#: Losses whose target may be class numbers.
CLASS_LOSSES = (F.cross_entropy, F.nll_loss)

#: The class number that PyTorch's losses leave out.
_IGNORED = -100


def check_classes(loss: Loss, output: Any, target: Any) -> None:
    """Raises: DataError for class numbers of another shape than the output's, or that are none of its classes."""
    tensors = isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)
    if loss not in CLASS_LOSSES or not tensors or target.is_floating_point() or not target.ndim:
        return
    if output.ndim != target.ndim + 1:
        wanted = ", ".join(map(str, [len(target), "classes", *target.shape[1:]]))
        raise DataError(
            f"the model's output needs the shape [{wanted}] for these class numbers; "
            f"got {list(output.shape)}. End the model with nn.Flatten() and nn.Linear(..., classes).",
            code="DATA105",
        )
    check_class_numbers(target[target != _IGNORED], int(output.shape[1]))


def check_class_numbers(y: torch.Tensor, classes: int) -> None:
    """Raises: DataError DATA107 for numbers that are none of the model's classes."""
    if not y.numel():
        return
    lowest, highest = (int(end) for end in torch.aminmax(y))
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"y needs class numbers 0 to {classes - 1}, the model's outputs; got {lowest} to {highest}. "
            "Check the labels, or give the model more outputs.",
            code="DATA107",
        )
