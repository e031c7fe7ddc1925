"""What each layer of a netplist computes: as MIL ops (`LAYERS`), or on arrays where no MIL op fits (`DIRECT`).

Arrays are batch, channels, height, width. Names and parameters are those of ANEForge 0.4.0 `_bridges/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Value
from ane_trainer.ane.mil.weights import Array, from_array
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away

Half = NDArray[np.float16]

_AXES = {"Batch": 0, "Channel": 1, "Height": 2, "Width": 3}


@dataclass(frozen=True)
class Unit:
    """One layer: its type, the names it reads, its parameters (fp16 numbers among them as bit patterns)."""

    name: str
    type: str
    inputs: tuple[str, ...]
    params: Mapping[str, Any]

    def bits(self, name: str, default: float) -> float:
        """A parameter that is stored as an fp16 bit pattern."""
        value = self.params.get(name)
        return default if value is None else float(np.uint16(value).view(np.float16))

    def axis(self, name: str = "Dimension") -> int:
        """The axis that a parameter names."""
        return axis_of(self, self.params.get(name, "Width"))


def axis_of(unit: Unit, dimension: object) -> int:
    """The place of a named dimension."""
    if dimension not in _AXES:
        raise ProgramError(
            f"netplist unit {unit.name}: needs {', '.join(_AXES)}; got {dimension}.", code="MIL101"
        )
    return _AXES[str(dimension)]


# -- layer -> MIL ------------------------------------------------------------------------------------------

Operands = list[Value]
_Layer = Callable[[Builder, Unit, Operands], Value]

#: Activations: the layer's name -> MIL op.
_NEURONS = {
    "ReLU": "relu", "SigmoidHighPrecision": "sigmoid", "Sigmoid": "sigmoid", "GELU": "gelu", "Tanh": "tanh",
    "Sqrt": "sqrt", "Rsqrt": "rsqrt", "Exp2": "exp2", "Inv": "inverse", "Sin": "sin", "Cos": "cos", "Ceil": "ceil",
    "Floor": "floor", "RoundNearest": "round", "Abs": "abs", "Sign": "sign", "Erf": "erf",
}  # fmt: skip

_ELEMENTWISE = {
    "Add": "add", "Mult": "mul", "Sub": "sub", "Min": "minimum", "Max": "maximum", "GreaterThan": "greater",
    "LessThan": "less", "Equal": "equal", "NotEqual": "not_equal",
}  # fmt: skip

_REDUCTIONS = {"Sum": "reduce_sum", "Avg": "reduce_mean", "Max": "reduce_max", "Min": "reduce_min"}


def _neuron(b: Builder, unit: Unit, x: Operands) -> Value:
    kind = unit.params["Type"]
    if kind == "ELU":
        return b.op("elu", x=x[0], alpha=unit.bits("EluAlpha", 1.0))
    if kind == "LeakyReLU":
        return b.op("leaky_relu", x=x[0], alpha=unit.bits("ReluSlope", 0.0))
    if kind == "ClampedReLU":
        return b.op("clip", x=x[0], alpha=unit.bits("ReluMin", 0.0), beta=unit.bits("ReluMax", np.inf))
    if kind == "Log2":
        return b.op("mul", x=b.op("log", x=x[0], epsilon=0.0), y=float(np.float16(1 / np.log(2))))
    made = partial(b.op, _NEURONS[kind], x=x[0])
    return made(mode="EXACT") if kind == "GELU" else made(epsilon=0.0) if kind in ("Inv", "Rsqrt") else made()


def _elementwise(b: Builder, unit: Unit, x: Operands) -> Value:
    kind = unit.params["Type"]
    if len(x) == 1:
        return b.op(_NEURONS[kind], x=x[0])
    y = b.op(_ELEMENTWISE[kind], x=x[0], y=x[1])
    if y.type.dtype != "bool":
        return y
    one, zero = (from_array(np.full(y.type.shape, number, np.float16)) for number in (1, 0))
    return b.op("select", cond=y, a=one, b=zero)


def _scaled_elementwise(b: Builder, unit: Unit, x: Operands) -> Value:
    y = _elementwise(b, unit, x)
    return y if unit.params["Type"] == "Mult" else b.op("mul", x=y, y=unit.bits("Scale", 1.0))


def _goc(b: Builder, unit: Unit, x: Operands) -> Value:
    """Gain, offset: `scale * (x + bias)`; from parameters (GOC) or inputs (DynamicGOC: x, [scale], bias)."""
    scale = x[1] if len(x) == 3 else unit.bits("ScaleScalar", 1.0)
    bias = x[-1] if len(x) > 1 else unit.bits("BiasScalar", 0.0)
    y = x[0] if bias == 0.0 else b.op("add", x=x[0], y=bias)
    return y if scale == 1.0 else b.op("mul", x=y, y=scale)


def _sdpa(b: Builder, unit: Unit, x: Operands) -> Value:
    """Query, key, value `[1, seq, heads, dim]`, scale, and a mask `[1, Sq, 1, Skv]` that is added."""
    q, k, v = (b.op("transpose", x=value, perm=(0, 2, 1, 3)) for value in x[:3])
    scores = b.op("matmul", x=q, y=k, transpose_x=False, transpose_y=True)
    scores = b.op("mul", x=scores, y=x[3])
    if len(x) > 4:
        scores = b.op("add", x=scores, y=b.op("transpose", x=x[4], perm=(0, 2, 1, 3)))
    weights = b.op("softmax", x=scores, axis=-1)
    if unit.params.get("SubtractMax") is False:
        weights = b.op("exp", x=scores)
        weights = b.op("real_div", x=weights, y=b.op("reduce_sum", x=weights, axes=(-1,), keep_dims=True))
    y = b.op("matmul", x=weights, y=v, transpose_x=False, transpose_y=False)
    return b.op("transpose", x=y, perm=(0, 2, 1, 3))


def _global_arg(b: Builder, unit: Unit, x: Operands) -> Value:
    kind = "reduce_argmax" if unit.params["Type"] == "Max" else "reduce_argmin"
    return b.op(kind, x=x[0], axis=unit.axis(), keep_dims=True)


def _arg(b: Builder, unit: Unit, x: Operands) -> Value:
    """Place of the extreme among height and width (Spatial) or channels (Channel), over the whole extent."""
    mode = unit.params["Mode"]
    kind = "reduce_argmax" if mode.endswith("ArgMax") else "reduce_argmin"
    if mode.startswith("Channel"):
        return b.op(kind, x=x[0], axis=1, keep_dims=True)
    n, c, h, w = x[0].type.shape
    return b.op(kind, x=b.op("reshape", x=x[0], shape=(n, c, 1, h * w)), axis=3, keep_dims=True)


def _key_lane(b: Builder, unit: Unit, x: Value) -> Value:
    return b.op(
        "slice_by_size", x=x, begin=(0, unit.params.get("SortIndices", [0])[0], 0, 0),
        size=(1, 1, 1, x.type.shape[3]),
    )  # fmt: skip


def _sort(b: Builder, unit: Unit, x: Operands) -> Value:
    """All channels along the width in the order of one of them; or the order itself."""
    key = _key_lane(b, unit, x[0])
    order = b.op("argsort", x=key, axis=3, ascending=unit.params["Direction"] == "Ascending")
    return _picked(b, unit, x[0], order)


def _topk(b: Builder, unit: Unit, x: Operands) -> Value:
    key = _key_lane(b, unit, x[0])
    largest = unit.params["Type"] == "Max"
    _, order = b.multi("topk", x=key, k=int(unit.params["K"]), axis=3, ascending=not largest)
    return _picked(b, unit, x[0], order)


def _picked(b: Builder, unit: Unit, x: Value, order: Value) -> Value:
    if unit.params.get("Indices"):
        return order
    return b.op("gather", x=x, indices=b.op("reshape", x=order, shape=(order.type.size,)), axis=3)


def _minmax(b: Builder, unit: Unit, x: Operands) -> Value:
    axes = (unit.axis(),)
    low = b.op("reduce_min", x=x[0], axes=axes, keep_dims=True)
    high = b.op("reduce_max", x=x[0], axes=axes, keep_dims=True)
    span = b.op("add", x=b.op("sub", x=high, y=low), y=unit.bits("Epsilon", 1e-3))
    return b.op("real_div", x=b.op("sub", x=x[0], y=low), y=span)


def _lrn(b: Builder, unit: Unit, x: Operands) -> Value:
    p = unit.params
    sizes = {"size": p["KernelChannel"], "beta": float(p["Beta"]), "k": float(p["K"])}
    return b.op("local_response_norm", x=x[0], alpha=unit.bits("Alpha", 1e-4), **sizes)


def _reduction(b: Builder, unit: Unit, x: Operands) -> Value:
    axes = tuple(axis_of(unit, name) for name in unit.params["Dimension"])
    return b.op(_REDUCTIONS[unit.params["Type"]], x=x[0], axes=axes, keep_dims=True)


def _pooling(b: Builder, unit: Unit, x: Operands) -> Value:
    p = unit.params
    size, step = (p["KernelHeight"], p["KernelWidth"]), (p["Step"][1], p["Step"][0])
    pad = (p["PadTop"], p["PadBot"], p["PadLeft"], p["PadRight"])
    pool = partial(b.op, x=x[0], kernel_sizes=size, strides=step, pad_type="custom", pad=pad, ceil_mode=False)
    if p["Type"] == "Max":
        return pool("max_pool")
    excluded = bool(p.get("AverageCountExcludePadding"))
    return pool("avg_pool", exclude_padding_from_average=excluded)


def _conv(b: Builder, unit: Unit, x: Operands) -> Value:
    p = unit.params
    step = p["Step"]
    if p.get("KernelMode") == "Unity":  # a transposed convolution with ones repeats each value
        return b.op(
            "upsample_nearest_neighbor", x=x[0], scale_factor_height=step[1], scale_factor_width=step[0]
        )
    return b.op(
        "conv", x=x[0], weight=x[1], strides=(step[1], step[0]), dilations=(1, 1), groups=p["NumGroups"],
        pad_type="custom", pad=(p["PadTop"], p["PadBot"], p["PadLeft"], p["PadRight"]),
    )  # fmt: skip


def _cross_correlation(b: Builder, unit: Unit, x: Operands) -> Value:
    p = unit.params
    channels = x[0].type.shape[1] // p["NumGroups"]
    kernel = b.op(
        "reshape", x=x[1], shape=(p["OutputChannels"], channels, p["TemplateHeight"], p["TemplateWidth"])
    )
    return b.op(
        "conv", x=x[0], weight=kernel, strides=(1, 1), dilations=(1, 1), groups=p["NumGroups"], pad_type="custom",
        pad=(p["PadTop"], p["PadBot"], p["PadLeft"], p["PadRight"]),
    )  # fmt: skip


def _cost_volume(b: Builder, unit: Unit, x: Operands) -> Value:
    """`|aux - ref moved by d|`, summed over channels, for each disparity d from 0 to the range."""
    aux, ref = x
    costs = []
    for d in range(unit.params["DisparityRange"] + 1):
        window = b.op("slice_by_size", x=ref, begin=(0, 0, 0, d), size=aux.type.shape)
        cost = b.op("abs", x=b.op("sub", x=aux, y=window))
        several = aux.type.shape[1] > 1
        costs.append(b.op("reduce_sum", x=cost, axes=(1,), keep_dims=True) if several else cost)
    return costs[0] if len(costs) == 1 else b.op("concat", values=tuple(costs), axis=1, interleave=False)


def _view(b: Builder, unit: Unit, x: Operands) -> Value:
    return _window(b, x[0], unit.axis(), unit.params["Offset"], unit.params["Size"])


def _window(b: Builder, x: Value, axis: int, start: int, size: int) -> Value:
    begin, sizes = [0] * 4, list(x.type.shape)
    begin[axis], sizes[axis] = start, size
    return b.op("slice_by_size", x=x, begin=tuple(begin), size=tuple(sizes))


def _concat(b: Builder, unit: Unit, x: Operands) -> Value:
    return b.op("concat", values=tuple(x), axis=unit.axis(), interleave=False)


def _reshape(b: Builder, unit: Unit, x: Operands) -> Value:
    return b.op("reshape", x=x[0], shape=tuple(unit.params[f"Reshaped{name}"] for name in _AXES))


def _flatten(b: Builder, unit: Unit, x: Operands) -> Value:
    return b.op("reshape", x=x[0], shape=(x[0].type.shape[0], 1, 1, x[0].type.size // x[0].type.shape[0]))


def _broadcast(b: Builder, unit: Unit, x: Operands) -> Value:
    return _tiled(b, x[0], {entry["Dimension"]: entry["Size"] for entry in unit.params["BroadcastInfo"]})


def _tile(b: Builder, unit: Unit, x: Operands) -> Value:
    return _tiled(b, x[0], {name: unit.params[name] for name in _AXES if name in unit.params})


def _tiled(b: Builder, x: Value, times: Mapping[str, int]) -> Value:
    return b.op("tile", x=x, reps=tuple(times.get(name, 1) for name in _AXES))


def _transpose(b: Builder, unit: Unit, x: Operands) -> Value:
    perm = list(range(4))
    for move in unit.params["TransposeDimensions"]:
        source, place = (axis_of(unit, move[f"Transpose{end}Dimension"]) for end in ("Source", "Destination"))
        perm[place] = source
    return b.op("transpose", x=x[0], perm=tuple(perm))


def _matmul(b: Builder, unit: Unit, x: Operands) -> Value:
    """Channels are rows and the width columns: `[C, K] @ [K, W]`."""
    rows, columns = (b.op("transpose", x=value, perm=(0, 2, 1, 3)) for value in x)
    y = b.op("matmul", x=rows, y=columns, transpose_x=False, transpose_y=False)
    return b.op("transpose", x=y, perm=(0, 2, 1, 3))


def _softmax(b: Builder, unit: Unit, x: Operands) -> Value:
    return b.op("softmax", x=x[0], axis=unit.axis())


def _identity(b: Builder, unit: Unit, x: Operands) -> Value:
    if unit.type == "KernelRasterizer" and x[0].type.shape[1] != 1:  # ANEForge: only the identity compiles
        raise ProgramError(f"netplist unit {unit.name}: needs one channel; got {x[0].type}.", code="MIL101")
    return b.op("reshape", x=x[0], shape=x[0].type.shape)


LAYERS: dict[str, _Layer] = {
    "Neuron": _neuron, "ElementWise": _elementwise, "ScaledElementWise": _scaled_elementwise, "GOC": _goc,
    "DynamicGOC": _goc, "SDPA": _sdpa, "GlobalArgMinMax": _global_arg, "ArgMinMax": _arg, "Sort": _sort,
    "TopK": _topk, "MinMaxNormalization": _minmax, "LocalResponseNormalization": _lrn, "Reduction": _reduction,
    "Pooling": _pooling, "Conv": _conv, "CrossCorrelation": _cross_correlation, "CostVolume": _cost_volume,
    "InputView": _view, "Concat": _concat, "Reshape": _reshape, "Flatten": _flatten, "Broadcast": _broadcast,
    "Tile": _tile, "Transpose": _transpose, "MatrixMultiplication": _matmul, "Dropout": _identity,
    "Softmax": _softmax, "KernelRasterizer": _identity,
}  # fmt: skip


# -- layers without a MIL op ---------------------------------------------------------------------------------

_Direct = Callable[[Unit, list[Array]], Half]


def _rounded(wide: Array) -> Half:
    return np.asarray(round_half_away(wide), np.float16)


def _dynamic_slice(unit: Unit, x: list[Array]) -> Half:
    """A window whose start is read from the first index; what lies outside is the background."""
    (info,) = unit.params["DynamicSliceInfo"]
    axis, size = axis_of(unit, info["Coordinate"]), int(info["SliceSize"])
    start = int(x[1].reshape(-1)[0])
    shape = [*x[0].shape[:axis], size, *x[0].shape[axis + 1 :]]
    out = np.full(shape, unit.params["BackgroundValue"], np.float16)
    low, high = max(start, 0), min(start + size, x[0].shape[axis])
    if low < high:
        place = [slice(None)] * 4
        place[axis] = slice(low - start, high - start)
        out[tuple(place)] = np.take(x[0], range(low, high), axis)
    return out


def _gather(unit: Unit, x: list[Array]) -> Half:
    (axis,) = (axis_of(unit, name) for name in unit.params["GatherNDAxes"])
    return np.asarray(np.take(x[0], x[1].reshape(-1).astype(np.int64), axis), np.float16)


def _cross_product(unit: Unit, x: list[Array]) -> Half:
    """Of the three channels, rounded once (assumed)."""
    product = np.cross(x[0].astype(np.float64), x[1].astype(np.float64), axis=1)
    return _rounded(np.asarray(product))


def _distances(points: Array, to: Array) -> Array:
    apart = points.astype(np.float32) - to.astype(np.float32)
    return np.asarray(np.sqrt((apart**2).sum(axis=-1)))


def _furthest_points(unit: Unit, x: list[Array]) -> Half:
    """Greedy from point 0 by Euclidean distance, whatever metric is named (ANEForge: exact on M5 for integers)."""
    points = x[0][0, :, 0, :].T
    chosen, nearest = [0], np.full(len(points), np.inf)
    for _ in range(1, int(unit.params["CentroidCount"])):
        nearest = np.minimum(nearest, _distances(points, points[chosen[-1]]))
        chosen.append(int(np.argmax(nearest)))
    return np.ascontiguousarray(points[chosen].T)[None, :, None, :]


def _radius_search(unit: Unit, x: list[Array]) -> Half:
    """A row a point: one byte a centroid, 1 within the radius, in the first half of the row's fp16 cells."""
    centroids, points = (array[0, :, 0, :].T for array in x)
    near = _distances(points[:, None], centroids[None]) <= unit.params["Radius"] + 1e-3
    cells = np.zeros((len(points), 2 * len(centroids)), np.uint8)
    cells[:, : len(centroids)] = near
    return cells.view(np.float16)[None, None]


def _blocks(unit: Unit, x: list[Array]) -> Half:
    """Blocks of height and width to channels or the batch, or back (`_ORDER`: places of n, c, h, i, w, j)."""
    i, j = int(unit.params["FactorY"]), int(unit.params["FactorX"])
    n, c, h, w = x[0].shape
    if unit.type in ("PixelUnshuffle", "SpaceToChannel", "SpaceToBatch"):
        cells = x[0].reshape(n, c, h // i, i, w // j, j).transpose(_ORDER[unit.type])
        out = (n * i * j, c) if unit.type == "SpaceToBatch" else (n, c * i * j)
        return np.ascontiguousarray(cells.reshape(*out, h // i, w // j))
    back = {
        "PixelShuffle": "PixelUnshuffle",
        "ChannelToSpace": "SpaceToChannel",
        "BatchToSpace": "SpaceToBatch",
    }
    order = _ORDER[back[unit.type]]
    n, c = (n // (i * j), c) if unit.type == "BatchToSpace" else (n, c // (i * j))
    extents = (n, c, h, i, w, j)
    cells = x[0].reshape([extents[k] for k in order]).transpose(np.argsort(order))
    return np.ascontiguousarray(cells.reshape(n, c, h * i, w * j))


_ORDER = {
    "PixelUnshuffle": (0, 1, 3, 5, 2, 4),
    "SpaceToChannel": (0, 3, 5, 1, 2, 4),
    "SpaceToBatch": (0, 3, 5, 1, 2, 4),
}

DIRECT: dict[str, _Direct] = {
    "DynamicSlice": _dynamic_slice, "Gather": _gather, "CrossProduct": _cross_product,
    "FurthestPointSampling": _furthest_points, "RadiusSearch": _radius_search, "PixelShuffle": _blocks,
    "PixelUnshuffle": _blocks, "ChannelToSpace": _blocks, "SpaceToChannel": _blocks, "SpaceToBatch": _blocks,
    "BatchToSpace": _blocks,
}  # fmt: skip
