"""Which dtypes each parameter of each op takes: a table, as coremltools 9 defines the ops of iOS 15 to 18.

An entry is `parameter:dtypes` or `parameter:dtypes.letter`; parameters of one op with the same letter
need the same dtype (the letters are the type variables of coremltools' definitions). Where coremltools
took a dtype only in a later version of an op, the later version is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_SETS = {
    "F": "fp16 fp32",
    "FI": "fp16 fp32 int32",
    "FIB": "fp16 fp32 int32 bool",
    "ALL": "fp16 fp32 int8 int16 int32 uint8 uint16 bool",
    "I": "int8 int16 int32",
    "N": "int8 int16 int32 uint8 uint16",
    "FN": "fp16 fp32 int8 int16 int32 uint8 uint16",
    "Q": "int8 uint8",
    "W": "fp16 fp32 int4 int8 uint4 uint8",
    "P": "uint1 uint2 uint3 uint4 uint6 uint8",
    "L": "fp16 fp32 int8 uint8",
    "S": "fp32 int32",
    "U": "int16 int32 uint16 uint32",
}

_TABLE = {
    "abs exp2 sign square": "x:FI",
    "acos asin atan atanh ceil cos cosh erf exp floor relu relu6 round sigmoid silu sin sinh softplus"
    " softsign sqrt tan tanh": "x:F",
    "add equal floor_div greater greater_equal less less_equal maximum minimum mod mul not_equal pow real_div"
    " sub": "x:FI.T y:FI.T",
    "affine": "x:F.T transform_matrix:F.T output_height:int32 output_width:int32 sampling_mode:string"
    " padding_mode:string padding_value:F.T coordinates_mode:string align_corners:bool",
    "argsort": "x:FI axis:int32 ascending:bool",
    "avg_pool": "x:F kernel_sizes:int32 strides:int32 pad_type:string pad:int32 ceil_mode:bool"
    " exclude_padding_from_average:bool",
    "band_part": "x:FIB lower:int32 upper:int32",
    "batch_norm": "x:F mean:F.U variance:F.U gamma:F.U beta:F.U epsilon:F.U",
    "batch_to_space": "x:F block_shape:int32 crops:int32",
    "cast": "x:ALL dtype:string",
    "clamped_relu linear_activation scaled_tanh sigmoid_hard softplus_parametric": "x:F alpha:F.U beta:F.U",
    "clip": "x:F.T alpha:F.T beta:F.T",
    "concat": "axis:int32 interleave:bool",
    "constexpr_affine_dequantize": "quantized_data:Q zero_point:fp32|int8|uint8 scale:F axis:int32",
    "constexpr_blockwise_shift_scale": "data:W scale:F offset:W",
    "constexpr_cast": "source_val:fp16 output_dtype:string",
    "constexpr_lut_to_dense": "indices:P lut:L vector_axis:int32 shape:uint32",
    "constexpr_lut_to_sparse": "indices_mask:uint1 indices_nonzero_data:P lut:L vector_axis:int32",
    "constexpr_sparse_blockwise_shift_scale": "data_mask:uint1 nonzero_data:W scale:F offset:W",
    "constexpr_sparse_to_dense": "nonzero_data:W mask:uint1|uint8 shape:uint32",
    "conv": "x:F weight:F.U bias:F.U strides:int32 pad_type:string pad:int32 dilations:int32 groups:int32",
    "conv_transpose": "x:F weight:F.U bias:F.U pad:int32 output_shape:int32 pad_type:string strides:int32"
    " dilations:int32 groups:int32",
    "coreml_update_state": "value:ALL",
    "crop": "x:F crop_height:int32 crop_width:int32",
    "crop_resize": "x:F.T roi:F.T boxes:fp16|fp32|uint16 box_indices:int32|uint16 target_height:int32"
    " target_width:int32 normalized_coordinates:bool spatial_scale:fp32 box_coordinate_mode:string"
    " sampling_mode:string pad_value:F.T",
    "cumsum": "x:FI axis:int32 exclusive:bool reverse:bool",
    "depth_to_space space_to_depth": "x:F block_size:int32",
    "dequantize": "input:Q.S zero_point:Q.S scale:F axis:int32",
    "einsum": "equation:string",
    "elu leaky_relu prelu thresholded_relu": "x:F alpha:F",
    "expand_dims reverse squeeze": "x:ALL axes:int32",
    "fill": "shape:int32 value:FIB",
    "fill_like": "ref_tensor:FIB value:FIB",
    "flatten2d": "x:FIB axis:int32",
    "gather": "x:FN indices:N axis:int32 batch_dims:int32 validate_indices:bool",
    "gather_along_axis": "x:FN indices:N axis:int32 validate_indices:bool",
    "gather_nd": "x:FN indices:N batch_dims:int32 validate_indices:bool",
    "gelu": "x:F mode:string",
    "instance_norm": "x:F gamma:F.U beta:F.U epsilon:F.U",
    "inverse l2_norm log rsqrt": "x:F epsilon:F",
    "l2_pool max_pool": "x:F kernel_sizes:int32 strides:int32 pad_type:string pad:int32 ceil_mode:bool",
    "layer_norm": "x:F axes:int32 gamma:F.U beta:F.U epsilon:F.U",
    "linear": "x:FI weight:FI.U bias:FI.U",
    "local_response_norm": "x:F size:int32 alpha:F.U beta:F.U k:F.U",
    "logical_and logical_or logical_xor": "x:bool y:bool",
    "logical_not": "x:bool",
    "matmul": "x:FI y:FI transpose_x:bool transpose_y:bool",
    "non_maximum_suppression": "boxes:F.T scores:F.T iou_threshold:F.T score_threshold:F.T max_boxes:int32"
    " per_class_suppression:bool",
    "non_zero shape": "x:FIB",
    "one_hot": "indices:int32 one_hot_vector_size:int32 axis:int32 on_value:FIB.T off_value:FIB.T",
    "pad": "x:F.T pad:int32 mode:string constant_val:F.T",
    "pixel_shuffle": "x:F upscale_factor:int32",
    "pixel_unshuffle": "x:F downscale_factor:uint32",
    "quantize": "input:F.S zero_point:Q scale:F.S axis:int32 output_dtype:string",
    "random_bernoulli": "shape:int32 prob:F seed:int32",
    "random_categorical": "x:F mode:string size:int32 seed:int32",
    "random_normal": "shape:int32 mean:F.T stddev:F.T seed:int32",
    "random_uniform": "shape:int32 low:F.T high:F.T seed:int32",
    "range_1d": "end:FI.T start:FI.T step:FI.T",
    "reduce_argmax reduce_argmin": "x:FI axis:int32 keep_dims:bool output_dtype:string",
    "reduce_l1_norm reduce_l2_norm reduce_log_sum reduce_log_sum_exp reduce_max reduce_mean reduce_min"
    " reduce_prod reduce_sum reduce_sum_square": "x:FI axes:int32 keep_dims:bool",
    "resample": "x:F.T coordinates:FN sampling_mode:string padding_mode:string padding_value:F.T"
    " coordinates_mode:string align_corners:bool",
    "reshape": "x:ALL shape:I",
    "reshape_like": "x:ALL",
    "resize": "x:FI shape:U resized_dims:uint32 interpolation_mode:string sampling_mode:string",
    "resize_bilinear": "x:F target_size_height:int32 target_size_width:int32 sampling_mode:string",
    "resize_nearest_neighbor": "x:F target_size_height:int32 target_size_width:int32",
    "reverse_sequence": "x:ALL lengths:I seq_axis:int32 batch_axis:int32",
    "scaled_dot_product_attention": "query:F.T key:F.T value:F.T attn_mask:bool|fp16|fp32",
    "scatter scatter_along_axis": "data:FI.T indices:int32 updates:FI.T axis:int32 mode:string"
    " validate_indices:bool",
    "scatter_nd": "data:FI.T indices:int32 updates:FI.T mode:string validate_indices:bool",
    "select": "cond:bool a:FIB.T b:FIB.T",
    "slice_by_index": "x:ALL begin:I.U end:I.U stride:I.U begin_mask:bool end_mask:bool squeeze_mask:bool",
    "slice_by_size": "x:ALL begin:I.U size:I.U",
    "slice_update": "x:ALL.T update:ALL.T begin:I.U end:I.U stride:I.U begin_mask:bool end_mask:bool"
    " squeeze_mask:bool",
    "sliding_windows": "x:ALL axis:int32 size:int32 stride:int32",
    "softmax": "x:F axis:int32",
    "space_to_batch": "x:F block_shape:int32 paddings:int32",
    "split": "x:FIB num_splits:int32 split_sizes:int32 axis:int32",
    "stack": "axis:int32",
    "threshold": "x:FI.T alpha:FI.T",
    "tile": "x:FIB reps:int32",
    "topk": "x:FN k:I axis:int32 ascending:bool sort:bool return_indices:bool output_indices_dtype:string",
    "transpose": "x:ALL perm:int32",
    "upsample_bilinear": "x:F scale_factor_height:S.U scale_factor_width:S.U align_corners:bool"
    " half_pixel_centers:bool",
    "upsample_nearest_neighbor": "x:F scale_factor_height:S.U scale_factor_width:S.U",
    "write_state": "data:ALL",
}


@dataclass(frozen=True)
class Domain:
    """The dtypes a parameter takes; parameters of one op with the same `letter` need one dtype."""

    dtypes: tuple[str, ...]
    letter: str | None


def _parse(entry: str) -> tuple[str, Domain]:
    name, rest = entry.split(":")
    dtypes, _, letter = rest.partition(".")
    return name, Domain(tuple(_SETS.get(dtypes, dtypes.replace("|", " ")).split()), letter or None)


#: Op kind -> parameter -> domain. An op or parameter that is not here takes any dtype.
DOMAINS: Mapping[str, Mapping[str, Domain]] = {
    kind: dict(_parse(entry) for entry in spec.split())
    for kinds, spec in _TABLE.items()
    for kind in kinds.split()
}
