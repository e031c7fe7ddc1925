"""Refuse tensors that a forward or a loss holds from call to call beside the model's buffers: no program updates them.

A loss with a running centre, a list with the last batch's features, `self.average = 0.9 * self.average + ...` of a
plain attribute: a program has the value of the capture for good. Refused by name where the loss depends on it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from ane_trainer.ane.capture import Loss, get_loss
from ane_trainer.ane.capture.calibrate import loss_of
from ane_trainer.ane.capture.outside import numbers_kept
from ane_trainer.ane.capture.trace.torch_private import pytree
from ane_trainer.ane.dispatch.guards import Guards
from ane_trainer.ane.errors import Finding, UnsupportedModel

#: How guards call tensors that were written in place, put in another's place, and such buffers.
_CHANGED = (": written to", ": another Tensor", ": another Parameter", ": another object")


@contextlib.contextmanager
def none_kept(model: torch.nn.Module, loss: str | Loss, example: tuple[object, object]) -> Iterator[None]:
    """The block runs forward and loss. Raises UnsupportedModel where they keep tensors that a later loss depends on."""
    before = Guards(model, loss)
    yield
    texts = [text for text in before.differences() if text.endswith(_CHANGED)]
    names = [text.rpartition(": ")[0] for text in texts]
    if names and _matter(model, loss, example):
        raise UnsupportedModel(
            "The step keeps tensors of its own from call to call, and a program has the model's buffers alone:",
            [
                Finding(
                    name, "tensor", "is written by the forward or the loss, which read it again.",
                    "Make it a buffer of the model (register_buffer) that forward writes; a forward that returns "
                    '{"loss": ...} trains with loss="model".',
                )
                for name in names
            ],
        )  # fmt: skip


def _matter(model: torch.nn.Module, loss: str | Loss, example: tuple[object, object]) -> bool:
    """Whether the loss of a batch is another one after it, and another batch, were seen."""
    other = pytree.tree_map_only(torch.Tensor, _moved, example)
    with warnings.catch_warnings(), numbers_kept(model, loss):
        warnings.simplefilter("ignore")
        first = loss_of(model, get_loss(loss), example)
        loss_of(model, get_loss(loss), other)
        return loss_of(model, get_loss(loss), example) != first


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    """A batch of the same kind: rows in another order, and numbers larger by half."""
    turned = tensor.flip(0) if tensor.ndim else tensor
    return turned * 1.5 if tensor.is_floating_point() else turned
