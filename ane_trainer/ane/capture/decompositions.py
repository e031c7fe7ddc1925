"""Which ATen operations are taken apart during capture, and into what.

Base: torch's core ATen table. Kept whole are the ops that MIL has under one name or that the lowering
writes better; added are the backward ops the core table leaves whole, and forms without gather and
scatter (one-hot), which the engine has no good form for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ane_trainer.ane.capture.normalization import NORMALIZATIONS

aten = torch.ops.aten

#: Lowered under their own name (MIL has the op, or the lowering rule is better than the decomposition).
KEPT = (
    aten.addmm, aten.gelu, aten.silu, aten.elu, aten.leaky_relu, aten.relu, aten.sigmoid, aten.tanh,
    aten.softplus, aten._softmax, aten.hardtanh, aten.clamp, aten.erf, aten.rsqrt,
    aten.avg_pool2d_backward, aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward,
    aten.convolution_backward, aten.upsample_nearest2d, aten.native_dropout,
)  # fmt: skip

#: Beyond the core table.
ADDED = (
    aten.nll_loss_forward, aten.nll_loss_backward, aten.gelu_backward, aten.silu_backward,
    aten._native_batch_norm_legit_no_training, aten.std_mean, aten._log_softmax,
    aten._log_softmax_backward_data, aten._softmax_backward_data, aten.threshold_backward,
    aten.lift_fresh, aten.baddbmm, aten.addcmul, aten.addcdiv, aten.lerp, aten.mse_loss,
    aten.mse_loss_backward, aten.huber_loss, aten.huber_loss_backward, aten.smooth_l1_loss,
    aten.smooth_l1_loss_backward, aten.binary_cross_entropy, aten.binary_cross_entropy_backward,
    aten.elu_backward, aten.leaky_relu_backward, aten.hardtanh_backward, aten.hardswish,
    aten.hardswish_backward, aten.hardsigmoid, aten.hardsigmoid_backward, aten.softplus_backward,
    aten.sigmoid_backward, aten.tanh_backward, aten.select_backward, aten.slice_backward,
    aten.embedding, aten.embedding_dense_backward, aten.log_sigmoid_forward,
    aten.log_sigmoid_backward, aten.glu, aten.glu_backward, aten.mish, aten.mish_backward,
)  # fmt: skip


@functools.cache
def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """The table for `make_fx`: overload -> function in terms of other ops. Do not change the result."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    added = [packet for packet in ADDED if isinstance(packet, torch._ops.OpOverloadPacket)]
    table: dict[Any, Callable[..., Any]] = {**core_aten_decompositions(), **get_decompositions(added)}
    kept = {getattr(packet, name) for packet in KEPT for name in packet.overloads()}  # type: ignore[no-untyped-call]
    table = {op: function for op, function in table.items() if op not in kept}
    return table | OWN


def one_hot(index: torch.Tensor, classes: int, dtype: torch.dtype) -> torch.Tensor:
    """[..., classes] with 1 where the class is `index`, by comparison with the class numbers."""
    numbers = torch.arange(classes, dtype=index.dtype, device=index.device)
    return (index.unsqueeze(-1) == numbers).to(dtype)


def _nll_weights(
    target: torch.Tensor, scores: torch.Tensor, weight: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """One-hot rows times class weights; a row of zeros where the target is ignored. [B,C] or [B,C,...]."""
    hot = one_hot(target, scores.shape[-1 if scores.ndim == 1 else 1], scores.dtype)
    if scores.ndim > 2:
        hot = hot.movedim(-1, 1)
    if weight is not None:
        hot = hot * weight.reshape((-1,) + (1,) * (scores.ndim - 2)) if scores.ndim > 1 else hot * weight
    if 0 <= ignore_index < scores.shape[-1 if scores.ndim == 1 else 1]:
        keep = (target != ignore_index).to(scores.dtype)
        hot = hot * (keep.unsqueeze(1) if scores.ndim > 1 else keep)
    return hot


def nll_loss_forward(
    scores: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihood by one-hot; an ignored target (also outside 0..C-1) has an all-zero row."""
    hot = _nll_weights(target, scores, weight, ignore_index)
    class_dim = -1 if scores.ndim == 1 else 1
    losses = -(scores * hot).sum(class_dim)
    total = _total_weight(hot, target, scores, weight, ignore_index)
    if reduction == 0:
        return losses, total
    if reduction == 2:
        return losses.sum(), total
    if weight is None and ignore_index == -100:
        return (losses * (1.0 / target.numel())).sum(), total
    return losses.sum() / total, total


def _total_weight(
    hot: torch.Tensor, target: torch.Tensor, scores: torch.Tensor, weight: torch.Tensor | None, ignore: int
) -> torch.Tensor:
    """The sum of the targets' weights; a constant where no weight and no ignored class can change it."""
    if weight is None and ignore == -100:
        return torch.full((), float(target.numel()), dtype=scores.dtype)
    return hot.sum()


def nll_loss_backward(
    grad: torch.Tensor,
    scores: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: torch.Tensor,
) -> torch.Tensor:
    """Gradient of `nll_loss_forward`: minus the weighted one-hot rows."""
    hot = _nll_weights(target, scores, weight, ignore_index)
    if reduction == 1:
        if weight is None and ignore_index == -100:
            return hot * (grad * (-1.0 / target.numel()))
        grad = grad / total_weight
    elif reduction == 0 and scores.ndim > 1:
        grad = grad.unsqueeze(1)
    return hot * -grad


def embedding(
    weight: torch.Tensor,
    indices: torch.Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """Rows of `weight` as one-hot times weight: the engine has no gather by a runtime index."""
    hot = one_hot(indices.reshape(-1), weight.shape[0], weight.dtype)
    return torch.mm(hot, weight).reshape((*indices.shape, weight.shape[1]))


def embedding_dense_backward(
    grad: torch.Tensor, indices: torch.Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> torch.Tensor:
    """Transposed one-hot times the gradient; `padding_idx` gets none."""
    hot = one_hot(indices.reshape(-1), num_weights, grad.dtype)
    if padding_idx >= 0:
        hot = hot * (torch.arange(num_weights) != padding_idx).to(grad.dtype)
    return torch.mm(hot.t(), grad.reshape(-1, grad.shape[-1]))


OWN: dict[Any, Callable[..., Any]] = {
    aten.nll_loss_forward.default: nll_loss_forward,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.nll_loss2d_forward.default: nll_loss_forward,
    aten.nll_loss2d_backward.default: nll_loss_backward,
    aten.embedding.default: embedding,
    aten.embedding_dense_backward.default: embedding_dense_backward,
    **NORMALIZATIONS,
}
