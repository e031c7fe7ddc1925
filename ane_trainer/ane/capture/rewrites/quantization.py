"""Fake quantization (quantization-aware training) as rounding and clamp: `torch.fake_quantize_*`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ane_trainer.ane.capture.trace.torch_private import OperatorBase

aten = torch.ops.aten


def per_tensor(
    x: torch.Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(clamp(round(x / scale) + zero, min, max) - zero) * scale`, and where the clamp leaves x alone."""
    level = torch.round(x * (1.0 / scale))
    low, high = float(quant_min - zero_point), float(quant_max - zero_point)
    return level.clamp(low, high) * scale, (level >= low) & (level <= high)


def per_channel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, quant_min: int, quant_max: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with a scale and a zero for each entry of an axis."""
    shape = [-1 if dim == axis else 1 for dim in range(x.dim())]
    steps, zeros = scale.reshape(shape), zero_point.to(x.dtype).reshape(shape)
    level = torch.round(x / steps)
    low, high = quant_min - zeros, quant_max - zeros
    return torch.maximum(torch.minimum(level, high), low) * steps, (level >= low) & (level <= high)


def backward(gradient: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Straight through where x is within the levels, 0 elsewhere."""
    return torch.where(mask, gradient, 0.0)


#: Overload -> the function that takes its place.
FAKE_QUANTIZATION: dict[OperatorBase, Callable[..., object]] = {
    aten.fake_quantize_per_tensor_affine_cachemask.default: per_tensor,
    aten.fake_quantize_per_channel_affine_cachemask.default: per_channel,
    aten.fake_quantize_per_tensor_affine_cachemask_backward.default: backward,
    aten.fake_quantize_per_channel_affine_cachemask_backward.default: backward,
}
