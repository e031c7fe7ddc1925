"""What ops compute off the engine: int32 and fp32 work of Core ML programs, in the machine's own arithmetic.

The engine computes in fp16 only. Core ML leaves index arithmetic and fp32 parts to the host; a program
that has them still runs here. An fp32 op without an entry is given its operands rounded to fp16, as the
engine would.

Functions that the engine lacks (acos, asin, atanh, cosh, sinh, tan, mod) are kernels here: one rounding of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import axes
from ane_trainer.ane.mil.program import Op
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.numbers.fp16 import F32, round_half_away
from ane_trainer.ane.simulator.registry import EngineContext, kernel

_UNARY: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs, "ceil": np.ceil, "cos": np.cos, "exp": np.exp, "exp2": np.exp2, "floor": np.floor,
    "round": np.rint, "sign": np.sign, "sin": np.sin, "sqrt": np.sqrt, "square": np.square, "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0), "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}  # fmt: skip

_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "real_div": lambda x, y: np.divide(x, y) if x.dtype.kind == "f" else np.trunc(np.divide(x, y)),
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}

_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_l1_norm": lambda x, **over: np.sum(np.abs(x), **over),
    "reduce_l2_norm": lambda x, **over: np.sqrt(np.sum(np.square(x), **over)),
    "reduce_sum_square": lambda x, **over: np.sum(np.square(x), **over),
    "reduce_log_sum": lambda x, **over: np.log(np.sum(x, **over)),
    "reduce_log_sum_exp": lambda x, **over: np.log(np.sum(np.exp(x), **over)),
}

#: Ops that move or pick elements: their kernels take any dtype.
_MOVES = frozenset(
    [
        "argsort",
        "band_part",
        "batch_to_space",
        "cast",
        "concat",
        "const",
        "constexpr_cast",
        "crop",
        "cumsum",
        "depth_to_space",
        "expand_dims",
        "fill",
        "fill_like",
        "flatten2d",
        "gather",
        "gather_along_axis",
        "gather_nd",
        "identity",
        "max_pool",
        "non_zero",
        "one_hot",
        "pixel_shuffle",
        "pixel_unshuffle",
        "range_1d",
        "reduce_argmax",
        "reduce_argmin",
        "reshape",
        "reshape_like",
        "resize_nearest_neighbor",
        "reverse",
        "reverse_sequence",
        "select",
        "shape",
        "slice_by_index",
        "slice_by_size",
        "slice_update",
        "sliding_windows",
        "space_to_batch",
        "space_to_depth",
        "split",
        "squeeze",
        "stack",
        "tile",
        "topk",
        "transpose",
        "upsample_nearest_neighbor",
        "dequantize",
        "constexpr_affine_dequantize",
        "constexpr_blockwise_shift_scale",
        "constexpr_lut_to_dense",
        "constexpr_lut_to_sparse",
        "constexpr_sparse_blockwise_shift_scale",
        "constexpr_sparse_to_dense",
    ]
)


def runs_on_host(op: Op) -> bool:
    """True when an op's operands or results include fp32 or integers, so that it is not the engine's."""
    types = [v.type.dtype for v in op.operands()] + [v.type.dtype for v in op.results]
    return any(t not in ("fp16", "bool") for t in types) and op.kind not in _MOVES


def host_function(call: Call) -> Callable[..., Array] | None:
    """The op on the host's arithmetic, taking its tensor operands; None when there is no entry."""
    kind = call.op.kind
    if kind in _UNARY:
        return _UNARY[kind]
    if kind in _BINARY:
        return _quiet(_BINARY[kind])
    if kind in _REDUCTIONS:
        over = {"axis": axes(call, "axes", call.type().rank), "keepdims": call.flag("keep_dims")}
        return lambda x: _REDUCTIONS[kind](x, **over)
    if kind == "matmul":
        return lambda x, y: np.matmul(
            np.swapaxes(x, -1, -2) if call.flag("transpose_x") else x,
            np.swapaxes(y, -1, -2) if call.flag("transpose_y") else y,
        )
    return None


def _quiet(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def run(x: Array, y: Array) -> Array:
        with np.errstate(all="ignore"):
            return function(x, y)

    return run


F64 = NDArray[np.float64]

_HOST = (
    "refused on the e5rt path (ANEForge sweep, M5), on the host in Core ML: exact function, one rounding,"
    " NaN as 0"
)

_FUNCTIONS: dict[str, Callable[[F64], F64]] = {
    "acos": np.arccos,
    "asin": np.arcsin,
    "atanh": np.arctanh,
    "cosh": np.cosh,
    "sinh": np.sinh,
    "tan": np.tan,
}


def _rounded(values: NDArray[Any]) -> F32:
    return round_half_away(np.nan_to_num(values, nan=0.0, posinf=65536.0, neginf=-65536.0))


def _register(kind: str, function: Callable[[F64], F64]) -> None:
    def run(ctx: EngineContext, call: Call, x: F32) -> F32:
        with np.errstate(all="ignore"):
            return _rounded(function(x.astype(np.float64)))

    kernel(kind, "assumed", _HOST)(run)


for _kind, _function in _FUNCTIONS.items():
    _register(_kind, _function)


@kernel("mod", "assumed", _HOST)
def mod(ctx: EngineContext, call: Call, x: F32, y: F32) -> F32:
    """The remainder with the sign of the divisor."""
    with np.errstate(all="ignore"):
        return _rounded(np.mod(x.astype(np.float64), y.astype(np.float64)))
