"""Normalization layers and their gradients as means and elementwise ops.

torch's own decompositions sum first and divide by the count afterwards, which leaves fp16's range for
images; here every statistic is a mean. Forward and backward use the same expressions, so that the normalized
input is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ane_trainer.ane.capture.trace.torch_private import OperatorBase

aten = torch.ops.aten


def _normalized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, rstd, (x - mean) * rstd), statistics over `dims` with those dims kept as 1."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return mean, rstd, centred * rstd


def _input_gradient(g: Tensor, normal: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    """The gradient through (x - mean) * rstd: what is left of g besides its mean and its part along x."""
    along = (g * normal).mean(dims, keepdim=True)
    return (g - g.mean(dims, keepdim=True) - normal * along) * rstd


def _per_channel(v: Tensor, ndim: int) -> Tensor:
    """[C] -> [1, C, 1, ...] with `ndim` dims."""
    return v.reshape((1, -1) + (1,) * (ndim - 2))


def _batch_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, save_mean [C], save_rstd [C], new running mean, new running variance)."""
    if training:
        mean, rstd, normal = _normalized(x, _batch_dims(x), eps)
        new_mean, new_var = running_mean, running_var
        if running_mean is not None and running_var is not None:
            count = x.numel() // x.shape[1]
            centred = x - mean
            var = (centred * centred).mean(_batch_dims(x), keepdim=True).reshape(-1)
            var = var * (count / max(count - 1, 1))
            new_mean = running_mean + (mean.reshape(-1) - running_mean) * momentum
            new_var = running_var + (var - running_var) * momentum
    else:
        assert running_mean is not None
        assert running_var is not None
        new_mean, new_var = running_mean, running_var
        mean = _per_channel(running_mean, x.ndim)
        rstd = _per_channel(torch.rsqrt(running_var + eps), x.ndim)
        normal = (x - mean) * rstd
    y = normal if weight is None else normal * _per_channel(weight, x.ndim)
    y = y if bias is None else y + _per_channel(bias, x.ndim)
    return y, mean.reshape(-1), rstd.reshape(-1), new_mean, new_var


def native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `batch_norm`; the running statistics are updated in place, which functionalization resolves."""
    y, mean, rstd, new_mean, new_var = batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    if training and running_mean is not None and running_var is not None:
        assert new_mean is not None
        assert new_var is not None
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return y, mean, rstd


def native_batch_norm_without_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `batch_norm`, of the batch's own statistics only (instance norm under torch.compile)."""
    return batch_norm(x, weight, bias, None, None, training, momentum, eps)[:3]


def native_batch_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_rstd: Tensor | None,
    train: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), None where the mask says so."""
    dims = _batch_dims(x)
    if train:
        assert save_mean is not None
        assert save_rstd is not None
        mean, rstd = _per_channel(save_mean, x.ndim), _per_channel(save_rstd, x.ndim)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean = _per_channel(running_mean, x.ndim)
        rstd = _per_channel(torch.rsqrt(running_var + eps), x.ndim)
    normal = (x - mean) * rstd
    inner = g if weight is None else g * _per_channel(weight, x.ndim)
    dx = _input_gradient(inner, normal, rstd, dims) if train else inner * rstd
    return (
        dx if output_mask[0] else None,
        (g * normal).sum(dims) if output_mask[1] else None,
        g.sum(dims) if output_mask[2] else None,
    )


def native_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize over the last `len(shape)` dims."""
    mean, rstd, y = _normalized(x, list(range(x.ndim - len(shape), x.ndim)), eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y, mean, rstd


def native_layer_norm_backward(
    g: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), None where the mask says so."""
    outer = list(range(x.ndim - len(shape)))
    inner_dims = list(range(x.ndim - len(shape), x.ndim))
    normal = (x - mean) * rstd
    inner = g if weight is None else g * weight
    return (
        _input_gradient(inner, normal, rstd, inner_dims) if output_mask[0] else None,
        _sum(g * normal, outer) if output_mask[1] else None,
        _sum(g, outer) if output_mask[2] else None,
    )


def native_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    channels: int,
    area: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each of `groups` groups of channels over its channels and area."""
    mean, rstd, normal = _normalized(x.reshape(n, groups, channels // groups * area), [2], eps)
    y = normal.reshape(x.shape)
    y = y if weight is None else y * _per_channel(weight, x.ndim)
    y = y if bias is None else y + _per_channel(bias, x.ndim)
    return y, mean.reshape(n, groups), rstd.reshape(n, groups)


def native_group_norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    channels: int,
    area: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), None where the mask says so."""
    grouped = (n, groups, channels // groups * area)
    rstd_3 = rstd.reshape(n, groups, 1)
    normal = (x.reshape(grouped) - mean.reshape(n, groups, 1)) * rstd_3
    inner = g if weight is None else g * _per_channel(weight, x.ndim)
    dx = _input_gradient(inner.reshape(grouped), normal, rstd_3, [2]).reshape(x.shape)
    dims = _batch_dims(x)
    return (
        dx if output_mask[0] else None,
        (g * normal.reshape(x.shape)).sum(dims) if output_mask[1] else None,
        g.sum(dims) if output_mask[2] else None,
    )


def var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Variance and mean over `dim` (all dims if None) by two means."""
    dims = list(range(x.ndim)) if not dim else [d % x.ndim for d in dim]
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    count = math.prod(x.shape[d] for d in dims)
    free = count - (1.0 if correction is None else float(correction))
    var = (centred * centred).mean(dims, keepdim=keepdim) * (count / free if free else math.inf)
    return var, mean if keepdim else mean.reshape(var.shape)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """(`v * g / norm(v)`, the norms), norms over all axes but `dim`."""
    norms = torch.sqrt(v.square().sum(_others(v, dim), keepdim=True))
    return v * (g / norms), norms


def weight_norm_backward(
    gradient: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Gradients of v and g; the projection on v is taken of the direction `v / norm`, which fp16 holds."""
    direction = v / norms
    along = (gradient * direction).sum(_others(v, dim), keepdim=True)
    return (gradient - direction * along) * (g / norms), along


def _others(x: Tensor, dim: int) -> list[int]:
    return [d for d in range(x.ndim) if dim == -1 or d != dim % x.ndim]


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims) if dims else x


NORMALIZATIONS: dict[OperatorBase, Callable[..., object]] = {
    aten.native_batch_norm.default: native_batch_norm,
    aten._native_batch_norm_legit.default: native_batch_norm,
    aten._native_batch_norm_legit_functional.default: batch_norm,
    aten._native_batch_norm_legit.no_stats: native_batch_norm_without_statistics,
    aten.native_batch_norm_backward.default: native_batch_norm_backward,
    aten.native_layer_norm.default: native_layer_norm,
    aten.native_layer_norm_backward.default: native_layer_norm_backward,
    aten.native_group_norm.default: native_group_norm,
    aten.native_group_norm_backward.default: native_group_norm_backward,
    aten._weight_norm_interface.default: weight_norm,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
    aten.var_mean.correction: var_mean,
    aten.var.correction: lambda x, dim=None, **options: var_mean(x, dim, **options)[0],
}
