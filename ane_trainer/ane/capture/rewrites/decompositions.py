"""The decomposition table of capture: which ATen operations are replaced, and by what.

Base: `torch.export.default_decompositions()`, torch's core ATen table. Kept whole are the ops that MIL has under
one name or that the lowering writes better (labels and indices as one-hot: the engine has no gather and scatter);
added are backward ops that the core table leaves whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from ane_trainer.ane.capture.rewrites import ragged
from ane_trainer.ane.capture.rewrites.normalization import NORMALIZATIONS
from ane_trainer.ane.capture.rewrites.quantization import FAKE_QUANTIZATION
from ane_trainer.ane.capture.rewrites.sampling import SAMPLING
from ane_trainer.ane.capture.trace.torch_private import (
    Decompositions,
    OperatorBase,
    OpOverload,
    decompositions_of,
)

aten = torch.ops.aten

#: Lowered under their own name (MIL has the op, or the lowering rule is better than the decomposition).
KEPT = (
    aten.addmm, aten.gelu, aten.silu, aten.elu, aten.leaky_relu, aten.relu, aten.sigmoid, aten.tanh,
    aten.softplus, aten._softmax, aten.hardtanh, aten.clamp, aten.erf, aten.rsqrt,
    aten.avg_pool2d_backward, aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward,
    aten.convolution_backward, aten.native_dropout, aten.threshold_backward,
    aten.gelu_backward, aten._log_softmax, aten._log_softmax_backward_data,
    aten.nll_loss_forward, aten.nll_loss_backward, aten.nll_loss2d_forward, aten.nll_loss2d_backward,
    aten.embedding, aten.embedding_dense_backward, aten.pixel_shuffle, aten.pixel_unshuffle, aten.im2col,
    aten.col2im, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
    aten.reflection_pad1d_backward, aten.reflection_pad2d_backward, aten.reflection_pad3d_backward,
    aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d, aten.flip, aten.roll,
    aten.replication_pad1d_backward, aten.replication_pad2d_backward, aten.replication_pad3d_backward,
    aten.max_unpool2d, aten.max_unpool3d, aten.linalg_vector_norm,
)  # fmt: skip

#: Beyond the core table.
ADDED = (
    aten._native_batch_norm_legit_no_training, aten.std_mean, aten._softmax_backward_data, aten.lift_fresh,
    aten.baddbmm, aten.addcmul, aten.addcdiv, aten.lerp, aten.mse_loss,
    aten.mse_loss_backward, aten.huber_loss, aten.huber_loss_backward, aten.smooth_l1_loss,
    aten.smooth_l1_loss_backward, aten.binary_cross_entropy, aten.binary_cross_entropy_backward,
    aten.elu_backward, aten.leaky_relu_backward, aten.hardtanh_backward, aten.hardswish,
    aten.hardswish_backward, aten.hardsigmoid, aten.hardsigmoid_backward, aten.softplus_backward,
    aten.sigmoid_backward, aten.tanh_backward, aten.select_backward, aten.slice_backward,
    aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.glu, aten.glu_backward, aten.mish,
    aten.mish_backward,
)  # fmt: skip


def softplus_backward(gradient: torch.Tensor, x: torch.Tensor, beta: float, threshold: float) -> torch.Tensor:
    """`g * sigmoid(beta x)` instead of `g * exp(beta x) / (exp(beta x) + 1)`; g beyond the threshold."""
    scaled = x * beta
    return torch.where(scaled > threshold, gradient, gradient * torch.sigmoid(scaled))


def silu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`g * s * (1 + x (1 - s))` with `s = sigmoid(x)`, which the forward has, instead of `1 / (1 + exp(-x))`."""
    s = torch.sigmoid(x)
    return gradient * (s * (x * (1 - s) + 1))


def copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """The source in the dtype and shape of what it is written to; that itself is not read."""
    source = source.to(x.dtype)
    return source if source.shape == x.shape else source.expand(x.shape)


def transpose(x: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """Two axes swapped, as a permutation: torch's decomposition without its slow checks."""
    if x.dim() <= 1 or first == second:
        return aten.alias.default(x)  # type: ignore[no-any-return]
    dims = list(range(x.dim()))
    dims[first], dims[second] = dims[second], dims[first]
    return aten.permute.default(x, dims)  # type: ignore[no-any-return]


def t(x: torch.Tensor) -> torch.Tensor:
    """`transpose` of a matrix; a vector as it is."""
    return transpose(x, 0, 1)


def elu_backward(
    gradient: torch.Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: torch.Tensor
) -> torch.Tensor:
    """`g * a s i exp(i min(x, 0))` below 0, `g * s` above: torch's exponentials of all x leave any range."""
    if is_result:
        slope = (x + alpha * scale) * input_scale
    else:
        slope = torch.exp(x.clamp(max=0.0) * input_scale) * (alpha * scale * input_scale)
    return torch.where(x <= 0, gradient * slope, gradient * scale)


def cdist_forward(x: torch.Tensor, y: torch.Tensor, p: float, mode: int | None) -> object:
    """Distances of rows as norms of differences, which the range pass knows (p = 2; others have a lowering rule)."""
    if p != 2.0:
        return NotImplemented
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), 2.0, dim=-1)


def cdist_backward(
    gradient: torch.Tensor, x: torch.Tensor, y: torch.Tensor, p: float, distance: torch.Tensor
) -> object:
    """`sum((x - y) / d * g)` over y's rows; 0 where d = 0."""
    if p != 2.0:
        return NotImplemented
    near = distance == 0.0
    divisor = torch.where(near, 1.0, distance).unsqueeze(-1)
    direction = (x.unsqueeze(-2) - y.unsqueeze(-3)) / divisor
    return (direction * torch.where(near, 0.0, gradient).unsqueeze(-1)).sum(-2)


#: Operations and gradients that torch leaves whole, or whose decomposition there leaves fp16 on its way or takes long.
DERIVATIVES: dict[OperatorBase, Callable[..., object]] = {
    aten.softplus_backward.default: softplus_backward,
    aten.silu_backward.default: silu_backward,
    aten.copy.default: copy,
    aten.elu_backward.default: elu_backward,
    aten.transpose.int: transpose,
    aten.t.default: t,
    aten._cdist_forward.default: cdist_forward,
    aten._cdist_backward.default: cdist_backward,
}
_NEAREST = (aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d)


def _repeating(table: Decompositions) -> dict[OperatorBase, Callable[..., object]]:
    """Nearest-neighbour upsampling by whole factors: each element is repeated, exactly and without a look-up."""

    def own(overload: OpOverload) -> Callable[..., object]:
        def upsample(x: torch.Tensor, size: Sequence[int], *scales: float | None) -> object:
            old = x.shape[-len(size) :]
            factors = [m // n for n, m in zip(old, size, strict=True)]
            given = scales or (None,) * len(size)
            whole = all(n * f == m for n, f, m in zip(old, factors, size, strict=True))
            if not whole or any(s not in (None, f) for s, f in zip(given, factors, strict=True)):
                return table[overload](x, size, *scales)
            for axis, factor in enumerate(factors, x.dim() - len(size)):
                if factor > 1:
                    spread = x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], factor, *x.shape[axis + 1 :])
                    x = spread.flatten(axis, axis + 1)
            return x

        return upsample

    return {packet.default: own(packet.default) for packet in _NEAREST}


def decomposition_table() -> dict[OperatorBase, Callable[..., object]]:
    """The table for capture and AOTAutograd: overload -> function in terms of other ops."""
    return _own_table() | ragged.decompositions()


@functools.cache
def _own_table() -> dict[OperatorBase, Callable[..., object]]:
    from torch.export import default_decompositions  # takes seconds to import

    core: Decompositions = default_decompositions()
    table = {**core, **decompositions_of(ADDED)}
    kept = {getattr(packet, name) for packet in KEPT for name in packet.overloads()}  # type: ignore[no-untyped-call]
    table = {op: function for op, function in table.items() if op not in kept}
    own = NORMALIZATIONS | DERIVATIVES | SAMPLING | FAKE_QUANTIZATION
    return table | own | _repeating(decompositions_of(_NEAREST))
