"""Products with int8 operands: both behind a dequantization (W8A8), or the weight alone.

Both: dequantize(q int8, scale) -> x; constexpr_blockwise_shift_scale(data int8, scale) -> w; conv(x, w) -> y
y = (q conv data, in int32) * scale_x * scale_w + bias                      (`quantized.py` has the law)

The weight alone: the engine encodes the other operand as 16 times its value in fp16.

constexpr_affine_dequantize(data int8, scale) -> w; matmul(x, w) -> y

An element of x beyond 65504 / 16 = 4094 becomes infinite, and with it every sum that it enters with a weight other
than 0: 4094 is the largest value kept, 4096 is not, on M1 Max, M2 Pro and M5 Pro alike, whatever the size or the
weights (ANEForge issues 115 and 153, `_targets.Q4_X16_SAT`). Which sign a sum of infinities of both signs has is
not published: here the one that more of them have, plus in a tie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import bind
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.arrays import literal_array
from ane_trainer.ane.simulator.kernels.convolution import ConvGeometry, geometry, windows
from ane_trainer.ane.simulator.kernels.quantized import INT32_LIMIT, integer_product
from ane_trainer.ane.simulator.loops.convert import rounded
from ane_trainer.ane.simulator.numbers.fp16 import INF

F64 = NDArray[np.float64]

#: First engine generation that multiplies int8 (A16 = M4: maderix/ANE; M3 Pro shows no gain: ANE-Training).
FIRST_GENERATION = 16

_EXACT_FP32 = 2**24


@dataclass(frozen=True)
class IntegerOperands:
    """A W8A8 op's integers: activation `q` (minus its zero point) times `scale`; weight likewise, a scale
    a row.
    """

    q: Value
    zero_point: float
    scale: float
    weight: F64
    weight_scale: F64


def integer_operands(function: Function, generation: int) -> dict[str, IntegerOperands]:
    """The W8A8 ops of a function by result name; none before the generation that has the path."""
    if generation < FIRST_GENERATION:
        return {}
    made_by = {value.name: op for op in function.ops for value in op.results}
    found = {}
    for op in function.ops:
        if op.kind in ("conv", "linear"):
            operands = _operands(_maker(op.arg("x"), made_by), _maker(op.arg("weight"), made_by))
            if operands is not None:
                found[op.name] = operands
    return found


def _maker(arg: Arg | None, made_by: dict[str, Op]) -> Op | None:
    return made_by.get(arg.name) if isinstance(arg, Value) else None


def _operands(x: Op | None, weight: Op | None) -> IntegerOperands | None:
    if x is None or weight is None or x.kind != "dequantize" or not isinstance(x.arg("input"), Value):
        return None
    q, scale, zero = x.arg("input"), _array(x, "scale"), _array(x, "zero_point")
    integers = _weight(weight)
    if integers is None or scale is None or scale.size != 1 or not isinstance(q, Value):
        return None
    return IntegerOperands(
        q, 0.0 if zero is None else float(zero.reshape(())), float(scale.reshape(())), *integers
    )


def _weight(op: Op) -> tuple[F64, F64] | None:
    """An int8 weight's integers less their zero point, and a scale for each of its rows; None if not such."""
    names = {
        "constexpr_blockwise_shift_scale": ("data", "offset"),
        "constexpr_affine_dequantize": ("quantized_data", "zero_point"),
        "dequantize": ("input", "zero_point"),
    }.get(op.kind)  # fmt: skip
    if names is None:
        return None
    data, scale, zero = _array(op, names[0]), _array(op, "scale"), _array(op, names[1])
    if (
        data is None
        or scale is None
        or data.dtype.kind not in "iu"
        or (zero is not None and zero.dtype.kind not in "iu")
    ):
        return None
    rows = len(data)
    per_row = scale.size in (1, rows) and scale.shape[:1] in ((), (1,), (rows,))
    along = op.arg("axis")
    if not per_row or (
        isinstance(along, Literal) and scale.size > 1 and along.to_python() not in (0, -data.ndim)
    ):
        return None
    column = (-1, *(1,) * (data.ndim - 1))
    integers = data.astype(np.float64) - (0.0 if zero is None else zero.astype(np.float64).reshape(column))
    return integers, np.broadcast_to(scale.astype(np.float64).reshape(-1), (rows,))


def _array(op: Op, name: str) -> Array | None:
    argument = op.arg(name)
    return literal_array(argument) if isinstance(argument, Literal) else None


def bind_integer(op: Op, o: IntegerOperands, q: Array, bias: Array | None, out: Array) -> Callable[[], None]:
    """A step that multiplies the integers q then holds into `out`, decoded fp16."""
    scale = o.weight_scale * o.scale
    if op.kind == "linear":
        rows, results = q.reshape(-1, q.shape[-1]), out.reshape(-1, out.shape[-1])

        def product() -> None:
            results[...] = integer_product(rows.astype(np.float64) - o.zero_point, o.weight.T, scale, bias)

        return product
    return _bind_conv(op, o, q, scale, bias, out)


def _bind_conv(
    op: Op, o: IntegerOperands, q: Array, scale: F64, bias: Array | None, out: Array
) -> Callable[[], None]:
    shape = geometry(bind(op.kind, dict(op.args)), q, o.weight)
    most = 255.0 * np.abs(o.weight).reshape(len(o.weight), -1).sum(axis=1).max(initial=0)
    start = np.zeros(len(scale)) if bias is None else bias.astype(np.float64).reshape(-1)

    def step() -> None:
        x = q.astype(np.float64) - o.zero_point
        if most < INT32_LIMIT:
            total = _sums(shape, x, o.weight, exact_in_fp32=most < _EXACT_FP32)
            column = (-1, *(1,) * (q.ndim - 2))
            out[...] = rounded(total * scale.reshape(column) + start.reshape(column))
        else:
            _ordered(shape, x, o.weight, scale, start, out)

    return step


def _sums(shape: ConvGeometry, x: F64, weight: F64, *, exact_in_fp32: bool) -> F64:
    """Integer convolution in floating point wide enough that every partial sum is exact."""
    dtype = torch.float32 if exact_in_fp32 else torch.float64
    padded = np.pad(x, ((0, 0), (0, 0), *shape.padding))
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[x.ndim - 3]
    image, filters = torch.from_numpy(padded).to(dtype), torch.from_numpy(weight).to(dtype)
    result = function(image, filters, None, shape.strides, 0, shape.dilations, shape.groups)
    return np.asarray(result.numpy(), np.float64)


def _ordered(shape: ConvGeometry, x: F64, weight: F64, scale: F64, start: F64, out: Array) -> None:
    """The same where int32 may overflow: group by group as a product whose partial sums are looked at."""
    spatial = x.ndim - 2
    taps = windows(
        np.pad(x, ((0, 0), (0, 0), *shape.padding)), weight.shape[2:], shape.strides, shape.dilations
    )
    rows_per_group = len(weight) // shape.groups
    for group in range(shape.groups):
        outputs = slice(group * rows_per_group, (group + 1) * rows_per_group)
        inputs = taps[:, group * weight.shape[1] : (group + 1) * weight.shape[1]]
        columns = np.moveaxis(inputs, range(2, 2 + spatial), range(-spatial, 0)).reshape(
            len(x), -1, out[0, 0].size
        )
        filters = weight[outputs].reshape(rows_per_group, -1)
        product = integer_product(filters, columns, scale[outputs, None], start[outputs, None])
        out[:, outputs] = product.reshape(len(x), rows_per_group, *out.shape[2:])


Step = Callable[[], None]

LARGEST = 65504 / 16
"""The largest magnitude that the encoding keeps."""


def encoded_products(function: Function) -> frozenset[str]:
    """The matrix products of a function whose right operand is stored as affine int8, by name."""
    stored = {
        op.result.name for op in function.ops if op.kind == "constexpr_affine_dequantize"
    }  # fmt: skip
    return frozenset(
        op.name
        for op in function.ops
        if op.kind == "matmul" and isinstance(y := op.arg("y"), Value) and y.name in stored
    )


def with_encoding(op: Op, step: Step, x: Array, y: Array, out: Array) -> Step:
    """The product `step`, then infinity where an element of x beyond the encoding entered a sum."""
    call = bind(op.kind, dict(op.args))
    left = np.swapaxes(x, -1, -2) if call.flag("transpose_x") else x
    right = np.swapaxes(y, -1, -2) if call.flag("transpose_y") else y

    def product() -> None:
        step()
        if np.abs(left).max(initial=0) > LARGEST:
            lost = np.where(np.abs(left) > LARGEST, np.sign(left), np.float32(0))
            signs = np.sign(right)
            entered = np.abs(lost) @ np.abs(signs)
            out[...] = np.where(entered > 0, np.where(lost @ signs < 0, -INF, INF), out)

    return product
