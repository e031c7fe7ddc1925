"""matmul, linear and scaled dot product attention (two products around a softmax) on the multiply-accumulate unit.

Exact: every product rounded half away to 2^-16 and summed in Q15.16 (`mac/`). Fast: the machine's fp32
matrix product, with the same overflow at 32768 and the same output rounding.
Evidence: M6 notes/numerics.md (H11, H12) for the law; ANEForge's published GEMM errors on M1, M1 Max, M2
Pro, M4, M5, M5 Pro reproduce to 12 digits (tests/docs/test_fidelity.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.kernels.reduction import softmax_steps
from ane_trainer.ane.simulator.loops.compiled import Pass, Step, in_turn, round_in_place
from ane_trainer.ane.simulator.mac.product import mac_bind
from ane_trainer.ane.simulator.numbers.fp16 import INF, empty, round_half_away
from ane_trainer.ane.simulator.registry import EngineContext, kernel, writes

EVIDENCE = "M6 notes/numerics.md (M4, M6); ANEForge GEMM errors on six chips"


@kernel("matmul", "exact", EVIDENCE)
def matmul(ctx: EngineContext, call: Call, x: Array, y: Array) -> Array:
    """x @ y after the transpose flags; leading axes broadcast."""
    (type_,) = call.op.infer(call)
    out = np.empty(type_.shape, np.float32)
    matmul_into(ctx, call, [out], x, y)()
    return out


@writes("matmul")
def matmul_into(
    ctx: EngineContext, call: Call, outputs: list[Array], x: Array, y: Array
) -> Callable[[], None]:
    """x `[..., M, K]`, y `[..., K, N]` after the transpose flags."""
    a = np.swapaxes(x, -1, -2) if call.flag("transpose_x") else x
    b = np.swapaxes(y, -1, -2) if call.flag("transpose_y") else y
    return product_into(ctx, a, b, None, outputs[0])


@kernel("linear", "exact", EVIDENCE)
def linear(ctx: EngineContext, call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """x @ weight.T + bias."""
    (type_,) = call.op.infer(call)
    out = np.empty(type_.shape, np.float32)
    linear_into(ctx, call, [out], x, weight, bias)()
    return out


@writes("linear")
def linear_into(
    ctx: EngineContext, call: Call, outputs: list[Array], x: Array, weight: Array, bias: Array | None
) -> Callable[[], None]:
    """x `[..., K]`, weight `[N, K]`; the bias is the accumulator's start value."""
    if x.ndim == 1:
        return product_into(ctx, x[None], weight.T, bias, outputs[0][None])
    return product_into(ctx, x, weight.T, bias, outputs[0])


@kernel(
    "einsum", "exact", EVIDENCE + "; lowered to matmul (ANEForge vocabulary sweep: relative error 2e-4 on M5)"
)
def einsum(ctx: EngineContext, call: Call, values: tuple[Array, ...]) -> Array:
    """`nchw,nwhu->nchu` and `chw,whu->chu`: for each h a product `[c, w]` @ `[w, u]`."""
    x, y = (np.moveaxis(values[0], -2, -3), np.moveaxis(values[1], -2, -3))
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    out = np.empty((*batch, x.shape[-2], y.shape[-1]), np.float32)
    product_into(ctx, x, y, None, out)()
    return np.moveaxis(out, -3, -2)


def product_into(
    ctx: EngineContext, a: Array, b: Array, bias: Array | None, out: Array
) -> Callable[[], None]:
    """`out = a @ b + bias` on the multiply-accumulate unit; leading axes broadcast."""
    if b.ndim == 2 < a.ndim and a.flags.c_contiguous and out.flags.c_contiguous:
        a, out = a.reshape(-1, a.shape[-1]), out.reshape(-1, out.shape[-1])
    step = _dense(ctx, a, b, bias, out)
    if bias is None and a.ndim == b.ndim == 2 and out.size * a.shape[1] >= _LARGE and out.shape[1] >= _WIDE:
        return partial(_without_zeros, ctx, a, b, out, step)
    return step


def _dense(ctx: EngineContext, a: Array, b: Array, bias: Array | None, out: Array) -> Callable[[], None]:
    return _fast(ctx, a, b, bias, out) if ctx.fast else mac_bind(a, b, bias, threads=ctx.threads, out=out)


#: Multiply-accumulates from which it is worth while to look for zeros, and the share of rows or columns (and of the
#: first one's entries) that may hold others; columns of the result, below which a look at `a` takes longer than the
#: product.
_LARGE, _SPARSE, _WIDE = 1 << 22, 0.25, 64


def _without_zeros(ctx: EngineContext, a: Array, b: Array, out: Array, dense: Step) -> None:
    """`out = a @ b` where most columns or rows of `a` are zero: an embedding's one-hot numbers, and its gradient's.

    A product with 0 is 0 and adds nothing, for numbers here are finite.
    """
    if np.count_nonzero(a[0]) <= _SPARSE * a.shape[1] and len(used := _used(a, 0)) <= _SPARSE * a.shape[1]:
        out[...] = 0
        if len(used):
            _dense(ctx, a[:, used], b[used], None, out)()
    elif np.count_nonzero(a[:, 0]) <= _SPARSE * len(a) and len(used := _used(a, 1)) <= _SPARSE * len(a):
        out[...] = 0
        if len(used):
            part = np.empty((len(used), out.shape[1]), np.float32)
            _dense(ctx, a[used], b, None, part)()
            out[used] = part
    else:
        dense()


def _used(a: Array, axis: int) -> NDArray[np.intp]:
    """The columns (axis 0) or rows (axis 1) that are not all zero."""
    return np.flatnonzero(a.any(axis))


def _fast(ctx: EngineContext, a: Array, b: Array, bias: Array | None, out: Array) -> Callable[[], None]:
    ta, tb, to = as_tensor(a), as_tensor(b), torch.from_numpy(out)
    finish = round_in_place(out, ctx.threads, bias)

    def step() -> None:
        torch.matmul(ta, tb, out=to)
        finish()

    return step


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor over the array's memory. NumPy marks broadcast views read-only; we never write through this
    one.
    """
    return torch.from_numpy(
        np.lib.stride_tricks.as_strided(array, array.shape, array.strides, writeable=True)
    )


@kernel(
    "scaled_dot_product_attention", "assumed",
    "ANEForge vocabulary sweep: relative error 2.7e-4 on M5; composed: product, scale, mask, softmax,"
    " product."
    " On the direct path the mask is ignored (Orion, maderix/ANE)",
)  # fmt: skip
def attention(
    ctx: EngineContext, call: Call, query: Array, key: Array, value: Array, mask: Array | None
) -> Array:
    """See `attention_into`."""
    out = np.empty((*query.shape[:-1], value.shape[-1]), np.float32)
    attention_into(ctx, call, [out], query, key, value, mask)()
    return out


@writes("scaled_dot_product_attention")
def attention_into(
    ctx: EngineContext,
    call: Call,
    outputs: list[Array],
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
) -> Step:
    """query `[*B, L, E]`, key `[*B, S, E]`, value `[*B, S, V]`; a bool mask keeps, a float mask is added."""
    scores = empty((*query.shape[:-1], key.shape[-2]), np.float32)
    work = Pass(ctx)
    scale = work.add("const", value=float(round_half_away(1 / math.sqrt(query.shape[-1]))))
    score = work.add("mul", work.load(scores), scale)
    if mask is not None and ctx.path != "direct":
        added = work.load(mask.reshape((1,) * (scores.ndim - mask.ndim) + mask.shape))
        if mask.dtype == np.bool_:
            score = work.add("select", added, score, work.add("const", value=-float(INF)))
        else:
            score = work.add("add", score, added)
    return in_turn(
        product_into(ctx, query, key.swapaxes(-1, -2), None, scores),
        softmax_steps(ctx, work, score, scores.ndim - 1, scores),
        product_into(ctx, scores, value, None, outputs[0]),
    )
