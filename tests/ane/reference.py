"""MIL's meaning in plain numpy float64: an independent oracle for programs, without the engine's rounding.

Written from MIL's documentation, not from the simulator or the lowering. Literals keep their stored
precision (fp32 when a program was lowered with `dtype="fp32"`), everything computed is float64. As on the
engine, 0 times infinity is 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ane_trainer.ane.mil import Function, Literal, Op, Value

_DTYPES = {
    "fp16": "<f2",
    "fp32": "<f4",
    "fp64": "<f8",
    "bool": "?",
    "int32": "<i4",
    "int8": "i1",
    "uint8": "u1",
}

OPS: dict[str, Callable[..., Any]] = {}


def meaning(kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for kind in kinds.split():
            OPS[kind] = function
        return function

    return register


def evaluate(function: Function, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name, float64 (bool stays bool). Every result's shape is checked against its
    declared type.
    """
    env: dict[Value, Any] = {}
    for value in function.inputs:
        array = np.asarray(feeds[value.name], dtype=np.float64)
        assert array.shape == value.type.shape, (value, array.shape)
        env[value] = array
    with np.errstate(all="ignore"):
        for op in function.ops:
            results = run(op, env)
            for value, array in zip(op.results, results, strict=True):
                assert array.shape == value.type.shape, (op.kind, value, array.shape)
                assert (array.dtype == np.bool_) == (value.type.dtype == "bool"), (
                    op.kind,
                    value,
                    array.dtype,
                )
                env[value] = array
    return {v.name: env[v] for v in function.outputs}


def run(op: Op, env: Mapping[Value, Any]) -> tuple[np.ndarray, ...]:
    """One op's results."""
    result = OPS[op.kind](op.kind, **{k: _argument(a, env) for k, a in op.args})
    results = result if isinstance(result, tuple) else (result,)
    return tuple(r if r.dtype == np.bool_ else r.astype(np.float64) for r in map(np.asarray, results))


def _argument(argument: Any, env: Mapping[Value, Any]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_argument(a, env) for a in argument)
    if isinstance(argument, Value):
        return env[argument]
    assert isinstance(argument, Literal)
    if isinstance(argument.data, (str, tuple)):
        return argument.data
    array = np.frombuffer(argument.data, _DTYPES[argument.type.dtype]).reshape(argument.type.shape)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "floor": np.floor,
    "cos": np.cos,
    "sin": np.sin,
    "exp": np.exp,
    "exp2": np.exp2,
    "erf": _erf,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "sqrt": np.sqrt,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sign": np.sign,
    "square": np.square,
    "tanh": np.tanh,
    "atan": np.arctan,
    "softplus": lambda x: np.logaddexp(0, x),
    "logical_not": np.logical_not,
    "const": lambda x: x,
}


@meaning(
    "abs ceil floor cos sin exp exp2 erf relu relu6 sqrt sigmoid silu sign square tanh atan softplus"
    " logical_not"
)
def unary(kind: str, x: np.ndarray) -> np.ndarray:
    return _UNARY[kind](x)


@meaning("const")
def const(kind: str, val: np.ndarray) -> np.ndarray:
    return val


@meaning("rsqrt inverse log")
def unary_epsilon(kind: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    shifted = x + epsilon
    return {
        "rsqrt": lambda: 1 / np.sqrt(shifted),
        "inverse": lambda: 1 / shifted,
        "log": lambda: np.log(shifted),
    }[kind]()


@meaning("gelu")
def gelu(kind: str, x: np.ndarray, mode: str) -> np.ndarray:
    if mode == "EXACT":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@meaning("leaky_relu")
def leaky_relu(kind: str, x: np.ndarray, alpha: float) -> np.ndarray:
    return np.where(x >= 0, x, alpha * x)


@meaning("elu")
def elu(kind: str, x: np.ndarray, alpha: float) -> np.ndarray:
    return np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0)))


@meaning("sigmoid_hard")
def sigmoid_hard(kind: str, x: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return np.clip(alpha * x + beta, 0, 1)


def _mul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where((x == 0) | (y == 0), 0.0, x * y)


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": _mul,
    "real_div": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "pow": np.power,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}


@meaning("add sub mul real_div maximum minimum pow equal not_equal greater greater_equal less less_equal")
def binary(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    assert x.dtype != np.bool_, f"{kind} on bool"
    assert y.dtype != np.bool_, f"{kind} on bool"
    return _BINARY[kind](x, y)


@meaning("select")
def select(kind: str, cond: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Stricter than MIL: cond has the full shape, a and b too or are numbers, one of them not."""
    assert cond.shape in (a.shape, b.shape)
    assert {a.shape, b.shape} <= {cond.shape, ()}
    return np.where(cond, a, b)


@meaning("matmul")
def matmul(
    kind: str, x: np.ndarray, y: np.ndarray, transpose_x: Any = False, transpose_y: Any = False
) -> np.ndarray:
    x = np.swapaxes(x, -1, -2) if transpose_x else x
    y = np.swapaxes(y, -1, -2) if transpose_y else y
    return x @ y


@meaning("conv")
def conv(
    kind: str,
    x: np.ndarray,
    weight: np.ndarray,
    strides: Any,
    pad_type: str,
    pad: Any,
    dilations: Any,
    groups: Any,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    assert pad_type == "custom"
    spatial = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *((int(pad[2 * i]), int(pad[2 * i + 1])) for i in range(spatial))])
    kernel = weight.shape[2:]
    outs = [(x.shape[2 + i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 for i in range(spatial)]
    groups = int(groups)
    each_in, each_out = x.shape[1] // groups, weight.shape[0] // groups
    y = np.zeros((x.shape[0], weight.shape[0], *outs))
    for taps in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, d, o, s in zip(taps, dilations, outs, strides, strict=True)
        )
        for g in range(groups):
            part = x[(slice(None), slice(g * each_in, (g + 1) * each_in), *window)]
            w = weight[(slice(g * each_out, (g + 1) * each_out), slice(None), *taps)]
            y[:, g * each_out : (g + 1) * each_out] += np.einsum("nc...,oc->no...", part, w)
    return y if bias is None else y + bias.reshape(-1, *(1,) * spatial)


@meaning("max_pool avg_pool")
def pool(
    kind: str,
    x: np.ndarray,
    kernel_sizes: Any,
    strides: Any,
    pad_type: str,
    pad: Any,
    ceil_mode: Any = False,
    exclude_padding_from_average: Any = False,
) -> np.ndarray:
    assert pad_type == "custom"
    assert not ceil_mode
    spatial = x.ndim - 2
    pads = [(0, 0), (0, 0), *((int(pad[2 * i]), int(pad[2 * i + 1])) for i in range(spatial))]
    inside = np.pad(np.ones_like(x), pads)
    x = np.pad(x, pads, constant_values=-np.inf if kind == "max_pool" else 0.0)
    outs = [(x.shape[2 + i] - kernel_sizes[i]) // strides[i] + 1 for i in range(spatial)]
    parts, counts = [], []
    for taps in itertools.product(*map(range, kernel_sizes)):
        window = (
            slice(None),
            slice(None),
            *(slice(t, t + (o - 1) * s + 1, s) for t, o, s in zip(taps, outs, strides, strict=True)),
        )
        parts.append(x[window])
        counts.append(inside[window])
    if kind == "max_pool":
        return np.max(parts, axis=0)
    return np.sum(parts, axis=0) / (np.sum(counts, axis=0) if exclude_padding_from_average else len(parts))


@meaning("reshape")
def reshape(kind: str, x: np.ndarray, shape: Any) -> np.ndarray:
    return x.reshape(tuple(shape))


@meaning("transpose")
def transpose(kind: str, x: np.ndarray, perm: Any) -> np.ndarray:
    return x.transpose(tuple(perm))


@meaning("slice_by_size")
def slice_by_size(kind: str, x: np.ndarray, begin: Any, size: Any) -> np.ndarray:
    return x[tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))]


@meaning("slice_by_index")
def slice_by_index(kind: str, x: np.ndarray, begin: Any, end: Any, stride: Any) -> np.ndarray:
    return x[tuple(slice(b, e, s) for b, e, s in zip(begin, end, stride, strict=True))]


@meaning("concat")
def concat(kind: str, values: Any, axis: Any) -> np.ndarray:
    return np.concatenate(values, axis=int(axis))


@meaning("tile")
def tile(kind: str, x: np.ndarray, reps: Any) -> np.ndarray:
    assert x.dtype != np.bool_
    return np.tile(x, tuple(reps))


@meaning("pad")
def pad(kind: str, x: np.ndarray, pad: Any, mode: str, constant_val: Any) -> np.ndarray:
    assert mode == "constant"
    pairs = [(int(pad[2 * i]), int(pad[2 * i + 1])) for i in range(len(pad) // 2)]
    return np.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs, constant_values=float(constant_val))


_REDUCE: dict[str, Callable[..., np.ndarray]] = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_l1_norm": lambda x, **k: np.sum(np.abs(x), **k),
    "reduce_l2_norm": lambda x, **k: np.sqrt(np.sum(x * x, **k)),
}


@meaning(" ".join(_REDUCE))
def reduce(kind: str, x: np.ndarray, axes: Any, keep_dims: Any) -> np.ndarray:
    return _REDUCE[kind](x, axis=tuple(int(a) for a in axes), keepdims=bool(keep_dims))


@meaning("softmax")
def softmax(kind: str, x: np.ndarray, axis: Any) -> np.ndarray:
    exponential = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return exponential / exponential.sum(axis=int(axis), keepdims=True)
