"""The value and the gradient of a function of [6, 5] numbers, as it is written and as capture rewrites it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ane_trainer.ane.capture.rewrites.substitutes import rewriting
from tests.ane.compiler.lower.harness import normal


def value_and_gradient(
    op: Callable[[Tensor], Tensor], rewritten: bool, then: Callable[[Tensor], Tensor] = lambda value: value
) -> tuple[Tensor, Tensor]:
    """In float64; each entry of the value counts differently. `then`: what PyTorch does with the value."""
    x = normal(6, 5).double().requires_grad_()
    with rewriting() if rewritten else contextlib.nullcontext():
        value = op(x)
    value = then(value)
    (value * torch.arange(value.numel()).view_as(value)).sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad
