"""Capture: a PyTorch training step or forward pass -> `Captured`, a functional FX graph of ATen ops."""

from __future__ import annotations

import torch

from ane_trainer.ane.capture.forward import capture_inference
from ane_trainer.ane.capture.losses import LOSSES, Loss, get_loss
from ane_trainer.ane.capture.step import CaptureOptions, StepCapture, capture_training
from ane_trainer.ane.stages import Captured

__all__ = [
    "LOSSES", "CaptureOptions", "Loss", "StepCapture", "capture_forward", "capture_step", "capture_training",
    "get_loss",
]  # fmt: skip


def capture_step(
    model: torch.nn.Module,
    loss: str | Loss,
    optimizer: torch.optim.Optimizer,
    example: tuple[object, object],
    *,
    loss_scale: float | str = "auto",
) -> Captured:
    """Capture one whole training step: forward, loss, backward and the optimizer's update.

    `example` is `(x, y)` as the training loop yields them; it fixes the shapes. `x` may be a tensor, a tuple
    of arguments or a dict of keyword arguments. `loss` is a name or a callable `(output, target) -> scalar`.
    The model is captured in the mode it is in (call `model.train()` first) and is not changed.

    Raises: UnsupportedModel (optimizer without a rule), UsageError (unknown loss).
    """
    return capture_training(model, loss, optimizer, example, CaptureOptions(loss_scale=loss_scale)).captured


def capture_forward(model: torch.nn.Module, example: object, *, calibrate: bool = False) -> Captured:
    """Capture `model(example)` in evaluation mode: parameters and buffers are state, `output*` results.

    `calibrate`: powers of two beside values that the example shows to leave fp16's range.
    """
    return capture_inference(model, example, calibrate=calibrate)
