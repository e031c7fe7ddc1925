# ruff: noqa: E501  (a table)
"""One table of well-formed and ill-formed calls for every op: what both type systems must agree on.

`T(2, 3)` is a runtime fp16 tensor of that shape, `C(2, 3)` a constant one; other values are constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ane_trainer.ane.mil.program import Literal, TensorType, Value, literal
from ane_trainer.ane.mil.weights import from_array


@dataclass(frozen=True)
class Case:
    """One call; the args are what `Builder.op` takes."""

    kind: str
    args: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{k}={_short(v)}' for k, v in self.args)})"


def _short(value: object) -> str:
    if isinstance(value, Value):
        return str(value.type)
    if isinstance(value, Literal):
        return f"const {value.type}" if value.type.rank else str(value.to_python())
    return repr(value)


def case(kind: str, **args: object) -> Case:
    return Case(kind, tuple(args.items()))


def T(*shape: int, dtype: str = "fp16", state: bool = False) -> Value:
    return Value("v", TensorType(dtype, shape, state))


def C(*shape: int, dtype: str = "fp16") -> Literal:
    return from_array((np.arange(math.prod(shape)) % 2 + 1).reshape(shape), dtype=dtype)


def pairs(*rows: tuple[int, int]) -> Literal:
    return from_array(np.array(rows, np.int32))


X4 = T(2, 4, 6, 8)
UNARY = [
    "abs",
    "acos",
    "asin",
    "atan",
    "atanh",
    "ceil",
    "cos",
    "cosh",
    "erf",
    "exp",
    "exp2",
    "floor",
    "relu",
    "relu6",
    "round",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "sinh",
    "softsign",
    "softplus",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "identity",
    "rsqrt",
    "inverse",
    "log",
    "gelu",
]
BINARY = [
    "add",
    "sub",
    "mul",
    "real_div",
    "floor_div",
    "maximum",
    "minimum",
    "mod",
    "pow",
    "equal",
    "not_equal",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
]
REDUCE = [
    "reduce_sum",
    "reduce_mean",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_l1_norm",
    "reduce_l2_norm",
    "reduce_log_sum",
    "reduce_log_sum_exp",
    "reduce_sum_square",
]
ALPHA_BETA = ["clamped_relu", "linear_activation", "scaled_tanh", "sigmoid_hard", "clip"]

CASES: list[Case] = [
    *(case(k, x=T(2, 3)) for k in UNARY),
    *(case(k, x=T(2, 3, dtype="int32")) for k in UNARY if k != "identity"),
    *(case(k, x=T(2, 3, dtype="bool")) for k in ("abs", "relu", "sign", "square", "exp2")),
    *(case(k, x=X4, epsilon=1e-3) for k in ("rsqrt", "inverse", "log", "l2_norm")),
    *(case("gelu", x=X4, mode=m) for m in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION", "exact")),
    *(case(k, x=X4, alpha=0.5) for k in ("leaky_relu", "elu", "thresholded_relu", "threshold")),
    *(case(k, x=X4) for k in ("leaky_relu", "elu", "thresholded_relu", "threshold", "clip")),
    *(case(k, x=X4, alpha=0.25, beta=b) for k in ALPHA_BETA for b in (0.5, 0.25)), case("clip", x=X4, alpha=0.5, beta=0.25),
    case("clip", x=X4, alpha=literal(0.0, "fp32"), beta=literal(1.0, "fp32")),
    *(case("prelu", x=x, alpha=a) for x in (X4, T(2, 4), T(2, 3, 4)) for a in (C(4), C(1, 4))), case("prelu", x=X4, alpha=C(3)),
    *(case("prelu", x=T(2, 4, 3), alpha=a) for a in (C(3), C(1, 4))),
    case("prelu", x=T(2, 4, 3), alpha=from_array(np.ones(4, np.float16))),
    case("softplus_parametric", x=X4, alpha=C(4), beta=C(4)),
    case("softplus_parametric", x=X4, alpha=C(4), beta=C(3)),
    case("softplus_parametric", x=T(2, 4), alpha=C(4), beta=C(4)),
    *(case(k, x=T(2, 1, 3), y=T(4, 1)) for k in BINARY),
    *(case(k, x=T(2, 3), y=T(2, 4)) for k in BINARY),
    *(case(k, x=T(2, 3, dtype="int32"), y=2) for k in BINARY),
    *(case(k, x=T(2, 3), y=literal(2, "int32")) for k in BINARY),
    *(case(k, x=T(2, 3, dtype="bool"), y=T(2, 3, dtype="bool")) for k in (*BINARY, "logical_and", "logical_xor")),
    *(case(k, x=T(2, 3), y=T(2, 3)) for k in ("logical_and", "logical_or", "logical_xor")),
    case("logical_or", x=T(2, 1, dtype="bool"), y=T(3, dtype="bool")),
    case("logical_not", x=T(2, 3, dtype="bool")), case("logical_not", x=T(2, 3)),
    case("select", cond=T(2, 3, dtype="bool"), a=T(2, 3), b=T(2, 3)),
    case("select", cond=T(2, 3, dtype="bool"), a=T(2, 3), b=0.0),
    case("select", cond=T(2, 3), a=T(2, 3), b=T(2, 3)),
    case("select", cond=T(2, 3, dtype="bool"), a=T(2, 3), b=T(2, 4)),
    case("select", cond=T(2, 3, dtype="bool"), a=T(2, 3), b=T(2, 3, dtype="int32")),
    *(case("cast", x=X4, dtype=d) for d in ("fp32", "int32", "bool", "uint8", "fp16", "int16", "string", "fp64")),
    *(case("cast", x=T(2, dtype=d), dtype="fp16") for d in ("uint8", "int32", "bool", "int8", "fp32")),
    *(case(k, x=X4, axes=[1, -1], keep_dims=keep) for k in REDUCE for keep in (True, False)),
    *(case(k, x=X4) for k in REDUCE),
    *(case("reduce_sum", x=X4, axes=a) for a in ([0, 1, 2, 3], [4], [1], [-1, -2])),
    *(case(k, x=X4, axis=a) for k in ("reduce_argmax", "reduce_argmin") for a in (0, -1, 3, 4)),
    case("reduce_argmax", x=X4, axis=1, keep_dims=True, output_dtype="uint16"),
    case("reduce_argmax", x=X4, output_dtype="int8"),
    case("softmax", x=X4, axis=1), case("softmax", x=X4), case("softmax", x=T(2, dtype="int32")),
    *(case("matmul", x=x, y=y, transpose_x=a, transpose_y=b) for a in (True, False) for b in (True, False)
      for x, y in ((T(2, 3), T(3, 4)), (T(2, 2), T(2, 2)), (T(5, 1, 2, 2), C(3, 2, 2)), (T(3, 2, 2), T(2, 2, 2)))),
    case("matmul", x=T(2, 3), y=T(3, 2, dtype="fp32")), case("matmul", x=T(2, 3), y=T(3)),
    case("linear", x=T(5, 2, 3), weight=C(4, 3)), case("linear", x=T(2, 3), weight=C(4, 3), bias=C(4)),
    case("linear", x=T(2, 3), weight=C(4, 2)), case("linear", x=T(2, 3), weight=C(4, 3), bias=C(3)),
    case("linear", x=T(2, 3), weight=C(4, 3, 1)), case("linear", x=T(2, 3), weight=C(4, 3), bias=C(1, 4)),
    *(case("conv", x=T(1, 4, *s), weight=C(6, 4, *k)) for s, k in (((9,), (3,)), ((9, 8), (3, 2)), ((5, 6, 7), (3, 3, 3)))),
    case("conv", x=X4, weight=C(6, 2, 3, 3), groups=2, strides=[2, 1], pad_type="custom", pad=[1, 0, 2, 1]),
    case("conv", x=X4, weight=C(6, 4, 3, 3), dilations=[2, 3], pad_type="same", bias=C(6)),
    case("conv", x=X4, weight=C(6, 4, 3, 3), pad_type="same_lower", strides=[2, 3]),
    case("conv", x=X4, weight=T(6, 4, 3, 3), bias=T(6)), case("conv", x=X4, weight=C(6, 3, 3, 3)),
    case("conv", x=X4, weight=C(6, 4, 3, 3), bias=C(4)), case("conv", x=X4, weight=C(6, 4, 7, 1)),
    case("conv", x=X4, weight=C(6, 4, 3, 3), strides=[1]), case("conv", x=X4, weight=C(6, 4, 3)),
    case("conv", x=X4, weight=C(6, 4, 3, 3), pad_type="custom", pad=[1, 1]),
    case("conv", x=X4, weight=C(6, 4, 3, 3), dilations=[1, 1, 1]), case("conv", x=X4, weight=C(6, 4, 3, 3), groups=3),
    *(case("conv_transpose", x=X4, weight=C(4, 3, 3, 2), **o) for o in (
        {}, {"strides": [2, 3]}, {"dilations": [2, 1], "strides": [2, 2]}, {"groups": 2, "bias": C(6)},
        {"pad_type": "custom", "pad": [1, 0, 0, 1]}, {"pad_type": "same", "strides": [2, 2]},
        {"output_shape": [2, 3, 8, 9]}, {"bias": C(4)}, {"output_shape": [2, 4, 8, 9]}, {"output_shape": [1, 3, 8, 9]},
        {"pad_type": "custom", "pad": [1, 1]})),
    case("conv_transpose", x=T(2, 4, 5), weight=C(4, 3, 3)), case("conv_transpose", x=T(1, 4, 2, 3, 4), weight=C(4, 3, 1, 2, 3)),
    *(case("einsum", values=(T(*a), T(*b)), equation=e) for a, b, e in (
        ((2, 3, 4, 5), (2, 5, 4, 6), "nchw,nwhu->nchu"), ((2, 3, 4, 5), (2, 5, 4, 6), "abcd,adce->abce"),
        ((3, 4, 5), (5, 4, 6), "chw,whr->chr"), ((2, 3, 1, 5), (1, 5, 4, 6), "nchw,nwhu->nchu"),
        ((2, 3, 4, 5), (2, 4, 4, 6), "nchw,nwhu->nchu"), ((2, 3), (3, 4), "ij,jk->ik"),
        ((2, 3, 4, 5), (2, 5, 4, 6), "nchw,nwhu->nhcu"))),
    *(case("scaled_dot_product_attention", query=T(*q), key=T(*k), value=T(*v)) for q, k, v in (
        ((2, 5, 8), (2, 7, 8), (2, 7, 6)), ((1, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)), ((5, 8), (7, 8), (7, 8)),
        ((2, 5, 8), (3, 7, 8), (3, 7, 8)), ((2, 5, 8), (2, 7, 9), (2, 7, 8)), ((2, 5, 8), (2, 7, 8), (2, 6, 8)))),
    *(case("scaled_dot_product_attention", query=T(2, 5, 8), key=T(2, 7, 8), value=T(2, 7, 8), attn_mask=m)
      for m in (T(5, 7), T(2, 5, 7, dtype="bool"), T(1, 7), T(5, 6), T(4, 7))),
    *(case(k, x=X4, kernel_sizes=[2, 3], pad_type="valid") for k in ("max_pool", "avg_pool", "l2_pool")),
    *(case("max_pool", x=T(1, 2, 7, 9), kernel_sizes=[3, 2], **o) for o in (
        {}, {"pad_type": "same"}, {"pad_type": "same_lower", "strides": [2, 3]}, {"pad_type": "custom", "pad": [1, 1, 0, 1]},
        {"pad_type": "valid", "strides": [2, 2], "ceil_mode": True}, {"pad_type": "same", "ceil_mode": True},
        {"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [3, 3], "ceil_mode": True},
        {"pad_type": "custom", "pad": [1, 0, 1, 1], "ceil_mode": True}, {"pad_type": "other"},
        {"pad_type": "valid", "strides": [1]})),
    case("avg_pool", x=T(1, 2, 7), kernel_sizes=[3], pad_type="custom", pad=[1, 1], exclude_padding_from_average=True),
    case("max_pool", x=T(1, 2, 5, 5, 5), kernel_sizes=[2, 2, 2], pad_type="valid", strides=[2, 2, 2]),
    case("max_pool", x=T(1, 2, 5, 5), kernel_sizes=[6, 2], pad_type="valid"),
    case("max_pool", x=T(1, 2, 5, 5), kernel_sizes=[2], pad_type="valid"),
    *(case("reshape", x=T(2, 3, 4), shape=s) for s in ([6, 4], [-1], [2, -1, 2], [0, 12], [0, 0, -1], [5, 5], [-1, -1], [24])),
    *(case("transpose", x=T(2, 3, 4), perm=p) for p in ([2, 0, 1], [-1, 0, 1], [0, 1], [0, 1, 3])),
    *(case("expand_dims", x=T(2, 3), axes=a) for a in ([0], [-1], [0, 2], [1, -1], [3], [-4])),
    *(case("squeeze", x=T(1, 2, 1), axes=a) for a in ([0], [-1], [0, 2], [3])), case("squeeze", x=T(1, 2, 1)),
    *(case("slice_by_size", x=T(4, 5), begin=b, size=s) for b, s in (([1, 0], [2, 5]), ([1, 2], [-1, 3]), ([0], [1]))),
    *(case("slice_by_index", x=T(4, 5), begin=b, end=e, **o) for b, e, o in (
        ([1, 0], [3, 5], {}), ([0, 0], [4, 5], {"stride": [2, 3]}), ([0, 0], [0, 0], {"end_mask": [True, True]}),
        ([-3, 1], [-1, 4], {}), ([0, 2], [1, 5], {"squeeze_mask": [True, False]}), ([3, 4], [0, 0], {"stride": [-1, -2]}),
        ([1, 1], [9, 9], {"begin_mask": [True, False], "end_mask": [False, True]}), ([0], [1], {}),
        ([0, 0], [0, 0], {"begin_mask": [True, True], "end_mask": [True, True], "stride": [-1, 2]}))),
    case("slice_update", x=T(4, 5), update=T(2, 5), begin=[1, 0], end=[3, 5]),
    case("slice_update", x=T(4, 5), update=T(2, 4), begin=[1, 0], end=[3, 5]),
    case("slice_update", x=T(4, 5), update=T(5), begin=[1, 0], end=[2, 5], squeeze_mask=[True, False]),
    *(case("concat", values=v, axis=a) for a in (0, 1, -1, 2) for v in ((T(2, 3), T(2, 3)), (T(2, 3), T(4, 3)), (T(2, 3),))),
    case("concat", values=(T(2, 3), T(2, 3)), axis=1, interleave=True),
    case("concat", values=(T(2, 3), T(2, 4)), axis=1, interleave=True),
    case("concat", values=(T(2, 3), T(2, 3, dtype="fp32")), axis=0), case("concat", values=(T(2, 3), T(2,)), axis=0),
    *(case("tile", x=T(2, 3), reps=r) for r in ([1, 2], [3, 1], [2], [0, 1], [-1, 1])),
    *(case("pad", x=X4, pad=p, mode=m) for m in ("constant", "reflect", "replicate", "wrap") for p in ([1, 2], [0, 1, 2, 0])),
    case("pad", x=X4, pad=[1]), case("pad", x=X4, pad=[1] * 10), case("pad", x=X4, pad=[-1, 0]),
    case("pad", x=X4, pad=[1, 1], constant_val=literal(1.0, "fp32")),
    *(case("split", x=T(6, 4), **o) for o in ({"num_splits": 3, "axis": 0}, {"split_sizes": [1, 5], "axis": 0},
        {"num_splits": 2, "split_sizes": [3, 1], "axis": -1}, {"num_splits": 4, "axis": 0}, {"axis": 0})),
    *(case("stack", values=v, axis=a) for a in (0, 2, -1, 3) for v in ((T(2, 3), T(2, 3)), (T(2, 3), T(3, 2)))),
    case("stack", values=(T(2), T(2, dtype="int32")), axis=0),
    case("reverse", x=X4, axes=[0, -1]), case("reverse", x=X4),
    case("reverse_sequence", x=T(4, 5), lengths=T(5, dtype="int32"), seq_axis=0, batch_axis=1),
    *(case("depth_to_space", x=T(1, 8, 2, 3), block_size=b) for b in (1, 2)), case("depth_to_space", x=T(8, 2, 3), block_size=2),
    case("pixel_shuffle", x=T(1, 9, 2, 3), upscale_factor=3), case("pixel_shuffle", x=T(9, 2, 3), upscale_factor=3),
    case("space_to_depth", x=T(1, 2, 4, 6), block_size=2), case("pixel_unshuffle", x=T(1, 2, 4, 6), downscale_factor=2),
    case("pixel_unshuffle", x=T(1, 2, 4, 6), downscale_factor=literal(2, "int8")),
    case("space_to_batch", x=T(1, 2, 4, 5), block_shape=[2, 3], paddings=pairs((1, 1), (0, 1))),
    case("space_to_batch", x=T(1, 2, 4), block_shape=[2, 3], paddings=pairs((1, 1), (0, 1))),
    case("space_to_batch", x=T(1, 2, 4, 5), block_shape=[2, 3], paddings=[1, 1]),
    case("batch_to_space", x=T(12, 2, 4, 5), block_shape=[2, 3], crops=pairs((1, 1), (0, 1))),
    case("batch_to_space", x=T(5, 2, 4, 5), block_shape=[2, 3], crops=pairs((1, 1), (0, 1))),
    *(case("flatten2d", x=X4, axis=a) for a in (0, 1, 2, -1, 4)), case("flatten2d", x=X4),
    *(case("sliding_windows", x=T(2, 9), axis=1, size=s, stride=st) for s, st in ((3, 1), (4, 2), (9, 5))),
    case("sliding_windows", x=T(2, 9), axis=-2, size=2),
    case("band_part", x=T(4, 4), lower=1, upper=0), case("band_part", x=T(4, 4, dtype="uint8")),
    *(case("cumsum", x=T(3, 4), axis=a) for a in (0, 1, -1, 2, -2)), case("cumsum", x=T(3, 4), exclusive=True, reverse=True),
    case("reshape_like", x=T(6, 4), ref_tensors=(T(2, 3), T(9, 4)), begins=(literal(0, "int32"), literal(1, "int32")),
         ends=(literal(2, "int32"), literal(0, "int32")), end_masks=(literal(False, "bool"), literal(True, "bool"))),
    case("reshape_like", x=T(6, 4), ref_tensors=(T(2, 2),), begins=(literal(0, "int32"),), ends=(literal(2, "int32"),),
         end_masks=(literal(False, "bool"),)),
    *(case("batch_norm", x=x, mean=C(4), variance=C(4), **o) for x in (X4, T(2, 4, 3), T(1, 4, 2, 3, 4))
      for o in ({}, {"gamma": C(4), "beta": C(4), "epsilon": 1e-3})),
    case("instance_norm", x=X4), case("instance_norm", x=X4, gamma=C(4), beta=C(4), epsilon=1e-3),
    case("layer_norm", x=X4, axes=[0, 1, 2, 3]), case("layer_norm", x=X4, axes=[-1], gamma=C(8), beta=C(8)),
    case("layer_norm", x=X4, axes=[2, 3], gamma=C(6, 8)), case("layer_norm", x=X4, axes=[-1], gamma=C(6)),
    case("layer_norm", x=X4, axes=[4]),
    case("l2_norm", x=T(2, 3)), case("l2_norm", x=T(2, 3, 4)),
    case("local_response_norm", x=X4, size=3), case("local_response_norm", x=X4, size=5, alpha=0.1, beta=0.5, k=2.0),
    *(case(k, x=X4, scale_factor_height=h, scale_factor_width=w) for h, w in ((2, 3), (1, 2), (literal(1.5, "fp32"), literal(2.25, "fp32")))
      for k in ("upsample_nearest_neighbor", "upsample_bilinear")),
    case("upsample_bilinear", x=X4, scale_factor_height=2, align_corners=False, half_pixel_centers=True),
    case("upsample_nearest_neighbor", x=T(2, 3)), case("upsample_nearest_neighbor", x=T(2, 3, 4), scale_factor_width=2),
    case("upsample_bilinear", x=X4, scale_factor_height=2, scale_factor_width=literal(2.0, "fp32")),
    case("resize_nearest_neighbor", x=X4, target_size_height=3, target_size_width=9),
    case("resize_nearest_neighbor", x=T(4, 4), target_size_height=3, target_size_width=9),
    *(case("resize_bilinear", x=X4, target_size_height=3, target_size_width=9, sampling_mode=m)
      for m in ("DEFAULT", "ALIGN_CORNERS", "STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS", "OFFSET_CORNERS", "NEAREST")),
    *(case("resize", x=X4, shape=s, resized_dims=n) for s, n in (([3, 5], 2), ([0, 5], 2), ([9, 3, 5], 2), ([3], 2), ([1] * 5, 1), ([7], 1))),
    case("resize", x=X4, shape=[3, 5], resized_dims=2, interpolation_mode="CUBIC"),
    case("resize", x=X4, shape=[3, 5], resized_dims=2, interpolation_mode="NEAREST_NEIGHBOR", sampling_mode="ALIGN_CORNERS"),
    case("crop", x=X4, crop_height=[1, 2], crop_width=[0, 3]), case("crop", x=X4, crop_height=[1], crop_width=[0, 3]),
    case("crop", x=T(4, 5), crop_height=[1, 0], crop_width=[0, 3]),
    case("crop_resize", x=X4, boxes=T(3, 4), box_indices=T(3, dtype="int32"), target_height=2, target_width=3),
    case("crop_resize", x=X4, boxes=T(2, 4)), case("crop_resize", x=X4, boxes=T(3, 4)), case("crop_resize", x=X4, boxes=T(2, 5)),
    case("crop_resize", x=X4, boxes=T(1, 4), box_indices=[1]), case("crop_resize", x=X4, boxes=T(1, 4), box_indices=[2]),
    case("crop_resize", x=X4, boxes=T(2, 4, dtype="uint16"), normalized_coordinates=True),
    *(case("affine", x=X4, transform_matrix=T(*m), output_height=3, output_width=5, sampling_mode="bilinear", padding_mode=p,
           padding_value=0.0, coordinates_mode="normalized_minus_one_to_one", align_corners=True)
      for m, p in (((2, 6), "constant"), ((2, 5), "constant"), ((6,), "constant"), ((2, 6), "border"))),
    *(case("resample", x=X4, coordinates=T(*c), sampling_mode="bilinear", padding_mode="constant", padding_value=0.0,
           coordinates_mode="unnormalized", align_corners=False) for c in ((2, 3, 5, 2), (1, 3, 5, 2), (2, 3, 5, 3), (2, 3, 2))),
    *(case("gather", x=T(4, 5, 6), indices=T(*i, dtype="int32"), axis=a) for i in ((3,), (2, 3), ()) for a in (0, 1, -1, 3)),
    case("gather", x=T(2, 5, 6), indices=T(2, 3, dtype="int32"), axis=1, batch_dims=1),
    case("gather", x=T(2), indices=T(2, dtype="int32"), batch_dims=1), case("gather", x=T(2, 3), indices=T(2)),
    case("gather", x=T(4, 5), indices=[0, 4], axis=0, validate_indices=True), case("gather", x=T(4, 5), indices=[0, 4], axis=1, validate_indices=True),
    *(case("gather_along_axis", x=T(4, 5), indices=T(*i, dtype="int32"), axis=1) for i in ((4, 2), (3, 2), (4,))),
    *(case("gather_nd", x=T(4, 5, 6), indices=T(*i, dtype="int32")) for i in ((3, 2), (3, 3), (7, 3, 1), (3, 4))),
    case("gather_nd", x=T(4, 5, 6), indices=T(4, 2, dtype="int32"), batch_dims=1),
    *(case("scatter", data=T(4, 5), indices=T(3, dtype="int32"), updates=T(*u), axis=a) for u, a in (((3, 5), 0), ((4, 3), 1), ((3, 4), 0), ((4, 3), -1), ((3, 5), 2))),
    *(case("scatter_along_axis", data=T(4, 5), indices=T(*i, dtype="int32"), updates=T(*u), axis=0) for i, u in (((2, 5), (2, 5)), ((2, 5), (2, 4)), ((2, 4), (2, 4)))),
    *(case("scatter_nd", data=T(4, 5), indices=T(*i, dtype="int32"), updates=T(*u)) for i, u in (((3, 1), (3, 5)), ((3, 2), (3,)), ((3, 2), (3, 5)), ((3, 3), (3,)))),
    case("scatter", data=T(4, 5), indices=T(3, dtype="int32"), updates=T(3, 5), mode="update"),
    *(case("one_hot", indices=T(2, 3, dtype="int32"), one_hot_vector_size=5, axis=a) for a in (0, 1, -1, -3, 3)),
    case("one_hot", indices=T(2, dtype="int32"), one_hot_vector_size=5, on_value=literal(1.0, "fp16"), off_value=literal(0.0, "fp16")),
    case("one_hot", indices=T(2, dtype="int32"), one_hot_vector_size=5, on_value=literal(1.0, "fp16"), off_value=literal(0, "int32")),
    case("one_hot", indices=T(2), one_hot_vector_size=5),
    case("non_zero", x=C(3, 2)), case("argsort", x=X4, axis=1), case("argsort", x=X4, ascending=True),
    *(case("topk", x=T(3, 7), k=k, axis=a) for k in (1, 3, 4) for a in (0, 1, -1)), case("topk", x=T(3, 7)),
    case("topk", x=T(3, 7), k=2, return_indices=False), case("topk", x=T(3, 7), k=2, output_indices_dtype="uint16", sort=False),
    case("topk", x=T(3, 7), k=2, return_indices=False, output_indices_dtype="uint16"),
    case("topk", x=T(3, 7), k=2, output_indices_dtype="int8"),
    case("non_maximum_suppression", boxes=T(1, 4, 9), scores=T(1, 3, 9), iou_threshold=0.5, max_boxes=5),
    *(case("fill", shape=[2, 3], **o) for o in ({}, {"value": literal(1.0, "fp16")}, {"value": literal(3, "int32")})),
    case("fill_like", ref_tensor=X4), case("fill_like", ref_tensor=X4, value=literal(1, "int32")),
    *(case("range_1d", start=literal(a, d), end=literal(b, d), step=literal(s, d)) for a, b, s in ((0, 5, 1), (1, 8, 3), (5, 0, -2)) for d in ("int32", "fp16")),
    case("range_1d", start=0.5, end=literal(2.0, "fp16"), step=literal(1, "int32")),
    case("shape", x=X4),
    case("random_uniform", shape=[2, 3]), case("random_uniform", shape=[2], low=literal(0.0, "fp16"), high=literal(1.0, "fp16")),
    case("random_normal", shape=[2, 3], mean=literal(0.0, "fp16"), stddev=literal(1.0, "fp16"), seed=3),
    case("random_bernoulli", shape=[2], prob=literal(0.5, "fp16")), case("random_bernoulli", shape=[2, 2]),
    case("random_categorical", x=T(2, 3), size=4, mode="probs"), case("random_categorical", x=T(2, 3)),
    case("read_state", input=T(2, 32, state=True)), case("read_state", input=T(2, 32)), case("relu", x=T(2, 32, state=True)),
    case("coreml_update_state", state=T(2, 32, state=True), value=T(2, 32)),
    case("coreml_update_state", state=T(2, 32, state=True), value=T(2, 31)),
    *(case("quantize", input=X4, output_dtype="int8", **o) for o in (
        {"scale": 0.5}, {"scale": C(4), "axis": 1}, {"scale": C(4)}, {"scale": 0.5, "axis": 1}, {"scale": C(3), "axis": 1},
        {"scale": 0.5, "zero_point": literal(1, "int8")}, {"scale": 0.5, "zero_point": literal(1, "uint8")},
        {"scale": C(4), "axis": 1, "zero_point": C(4, dtype="int8")}, {"scale": 0.0}, {"scale": C(4), "axis": 4})),
    case("quantize", input=X4, output_dtype="int16", scale=0.5),
    *(case("dequantize", input=T(2, 4, dtype="uint8"), **o) for o in (
        {"scale": 0.5}, {"scale": C(4), "axis": 1}, {"scale": C(4)}, {"scale": 0.5, "zero_point": literal(1, "uint8")},
        {"scale": 0.5, "zero_point": literal(1, "int8")})),
    *(case("constexpr_affine_dequantize", quantized_data=C(4, 3, dtype="int8"), axis=a, scale=s, zero_point=z) for a, s, z in (
        (0, C(4), literal(0, "int8")), (1, C(3), C(3, dtype="int8")), (0, literal(0.5, "fp16"), literal(0, "int8")), (0, C(3), literal(0, "int8")), (2, C(4), literal(0, "int8")))),
    case("constexpr_cast", source_val=C(2, 3), output_dtype="fp32"),
    *(case("constexpr_lut_to_dense", indices=C(4, 6, dtype=d), lut=C(*s), **o) for d, s, o in (
        ("uint4", (1, 1, 16, 1), {}), ("uint4", (2, 3, 16, 1), {}), ("uint4", (1, 1, 8, 1), {}), ("uint3", (1, 1, 8, 1), {}), ("uint4", (16, 1), {}),
        ("uint4", (1, 1, 16, 2), {"vector_axis": 0}), ("uint4", (1, 1, 16, 2), {}), ("uint4", (3, 1, 16, 1), {}), ("uint8", (1, 1, 256, 1), {}), ("uint2", (1, 1, 4, 1), {"vector_axis": 2}))),

    case("constexpr_sparse_to_dense", nonzero_data=C(8), mask=from_array(np.ones((2, 4), np.uint8), dtype="uint1")),
    case("constexpr_sparse_to_dense", nonzero_data=C(7), mask=from_array(np.ones((2, 4), np.uint8), dtype="uint1")),
    case("constexpr_sparse_to_dense", nonzero_data=C(2, 4), mask=from_array(np.ones((2, 4), np.uint8), dtype="uint1")),
    case("constexpr_lut_to_sparse", indices_mask=from_array(np.ones((2, 4), np.uint8), dtype="uint1"), indices_nonzero_data=C(8, dtype="uint2"), lut=C(1, 1, 4, 1)),
    *(case("constexpr_blockwise_shift_scale", data=C(4, 6, dtype="int8"), scale=C(*s), **o) for s, o in (
        ((4, 1), {}), ((4, 3), {}), ((2, 6), {"offset": C(2, 6, dtype="int8")}), ((4, 4), {}), ((4,), {}), ((2, 6), {"offset": C(2, 6, dtype="uint8")}),
        ((2, 6), {"offset": C(2, 6)}), ((2, 6), {"offset": C(6, 2, dtype="int8")}))),
    case("constexpr_sparse_blockwise_shift_scale", data_mask=from_array(np.ones((2, 4), np.uint8), dtype="uint1"), nonzero_data=C(8, dtype="int4"), scale=C(2, 1)),
]  # fmt: skip
