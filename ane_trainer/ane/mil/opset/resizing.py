"""Type rules of ops that resample images: upsample, resize, crop, affine."""

from __future__ import annotations

import math

from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor
from ane_trainer.ane.mil.program import Literal, TensorType

SAMPLING_MODES = ("DEFAULT", "STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "UNALIGN_CORNERS", "OFFSET_CORNERS")
BOX_MODES = (
    "CORNERS_HEIGHT_FIRST",
    "CORNERS_WIDTH_FIRST",
    "CENTER_SIZE_HEIGHT_FIRST",
    "CENTER_SIZE_WIDTH_FIRST",
)


def _image(call: Call, rank: int | None = None) -> TensorType:
    """x with its last two axes height and width; of exactly `rank` where one is needed."""
    x = call.type("x")
    if x.rank < 3 or (rank is not None and x.rank != rank):
        raise call.refuse(f"x needs rank {rank or '3 or more'}; got {x}")
    return x


def _one_of(call: Call, name: str, allowed: tuple[str, ...]) -> str:
    if call.text(name) not in allowed:
        raise call.refuse(f"{name} needs one of {', '.join(allowed)}; got {call.text(name)!r}")
    return call.text(name)


@rule(
    "upsample_nearest_neighbor",
    tensor("x"),
    const("scale_factor_height", "int32", 1),
    const("scale_factor_width", "int32", 1),
    dtypes="x:F scale_factor_height:S.U scale_factor_width:S.U",
    family="movement",
)
@rule(
    "upsample_bilinear",
    tensor("x"),
    const("scale_factor_height", "int32", 1),
    const("scale_factor_width", "int32", 1),
    const("align_corners", "bool", True),
    const("half_pixel_centers", "bool", False),
    dtypes="x:F scale_factor_height:S.U scale_factor_width:S.U",
)
def upsample(call: Call) -> tuple[TensorType, ...]:
    """Height and width times a whole or fractional factor, rounded down."""
    x = _image(call)
    height = math.floor(call.number("scale_factor_height") * x.shape[-2])
    width = math.floor(call.number("scale_factor_width") * x.shape[-1])
    return (TensorType(x.dtype, (*x.shape[:-2], height, width)),)


@rule(
    "resize_nearest_neighbor",
    tensor("x"),
    const("target_size_height"),
    const("target_size_width"),
    dtypes="x:F",
    family="movement",
)
@rule(
    "resize_bilinear",
    tensor("x"),
    const("target_size_height", "int32", 1),
    const("target_size_width", "int32", 1),
    const("sampling_mode", "string", "DEFAULT"),
    dtypes="x:F",
)
def resize_to(call: Call) -> tuple[TensorType, ...]:
    """Height and width to the given sizes."""
    x = _image(call)
    if call.op.kind == "resize_bilinear":
        _one_of(call, "sampling_mode", SAMPLING_MODES)
    target = call.integer("target_size_height"), call.integer("target_size_width")
    return (TensorType(x.dtype, (*x.shape[:-2], *target)),)


@rule(
    "resize",
    tensor("x"),
    const("shape"),
    const("resized_dims", "uint32"),
    const("interpolation_mode", "string", "LINEAR"),
    const("sampling_mode", "string", "DEFAULT"),
    dtypes="x:FI shape:U",
)
def resize(call: Call) -> tuple[TensorType, ...]:
    """The last `resized_dims` axes get the last numbers of `shape`; 0 keeps an axis."""
    x, shape, count = call.type("x"), call.integers("shape"), call.integer("resized_dims")
    if call.type("shape").rank != 1 or not 0 <= count <= len(shape) <= x.rank:
        raise call.refuse(f"needs resized_dims <= shape's length <= {x.rank}; got {count} and {shape}")
    _one_of(call, "interpolation_mode", ("LINEAR", "NEAREST_NEIGHBOR"))
    _one_of(call, "sampling_mode", SAMPLING_MODES)
    kept, last = x.shape[: x.rank - count], x.shape[x.rank - count :]
    new = tuple(n or old for n, old in zip(shape[len(shape) - count :], last, strict=True))
    return (TensorType(x.dtype, (*kept, *new)),)


@rule("crop", tensor("x"), const("crop_height"), const("crop_width"), dtypes="x:F", family="movement")
def crop(call: Call) -> tuple[TensorType, ...]:
    """Cuts (top, bottom) and (left, right)."""
    x, rows, columns = _image(call), call.integers("crop_height"), call.integers("crop_width")
    if len(rows) != 2 or len(columns) != 2 or min(*rows, *columns) < 0:
        raise call.refuse(
            f"crop_height and crop_width need two numbers of at least 0; got {rows} and {columns}"
        )
    return (TensorType(x.dtype, (*x.shape[:-2], x.shape[-2] - sum(rows), x.shape[-1] - sum(columns))),)


@rule(
    "crop_resize",
    tensor("x"),
    tensor("boxes", required=False),
    tensor("box_indices", required=False),
    tensor("roi", required=False),
    const("target_height", "int32", 1),
    const("target_width", "int32", 1),
    const("normalized_coordinates", "bool", False),
    const("spatial_scale", "fp32", 1.0),
    const("box_coordinate_mode", "string", "CORNERS_HEIGHT_FIRST"),
    const("sampling_mode", "string", "DEFAULT"),
    const("pad_value", "fp16", 0.0),
    dtypes="x:F.T boxes:fp16|fp32|uint16 box_indices:int32|uint16 roi:F.T spatial_scale:fp32 pad_value:F.T",
)
def crop_resize(call: Call) -> tuple[TensorType, ...]:
    """boxes `[N, 4]` and box_indices `[N]` (iOS 17), or roi `[N, 1, 4 or 5, 1, 1]` (iOS 15)."""
    x = _image(call, 4)
    _one_of(call, "sampling_mode", SAMPLING_MODES)
    _one_of(call, "box_coordinate_mode", BOX_MODES)
    target = call.integer("target_height"), call.integer("target_width")
    if call.has("roi") == call.has("boxes"):
        raise call.refuse("needs boxes (iOS 17) or roi (iOS 15), one of them")
    if call.has("roi"):
        if call.type("roi").rank != 5:
            raise call.refuse(f"roi needs rank 5; got {call.type('roi')}")
        return (TensorType(x.dtype, (call.type("roi").shape[0], *x.shape[:2], *target)),)
    boxes = call.type("boxes")
    if boxes.rank != 2 or boxes.shape[1] != 4:
        raise call.refuse(f"boxes needs the shape [N, 4]; got {boxes}")
    if call.has("box_indices"):
        _check_indices(call, boxes.shape[0], x.shape[0])
    elif boxes.shape[0] > x.shape[0]:
        raise call.refuse(f"needs box_indices for {boxes.shape[0]} boxes of {x.shape[0]} images")
    if call.flag("normalized_coordinates") and boxes.dtype == "uint16":
        raise call.refuse("boxes needs fp16 or fp32 for normalized_coordinates; got uint16")
    return (TensorType(x.dtype, (boxes.shape[0], x.shape[1], *target)),)


def _check_indices(call: Call, count: int, images: int) -> None:
    if call.type("box_indices").shape != (count,):
        raise call.refuse(f"box_indices needs the shape [{count}]; got {call.type('box_indices')}")
    if isinstance(call.args["box_indices"], Literal) and max(call.integers("box_indices")) >= images:
        raise call.refuse(f"box_indices needs numbers below {images}; got {call.integers('box_indices')}")


_SAMPLING = (
    const("sampling_mode", "string"),
    const("padding_mode", "string"),
    const("padding_value", "fp16"),
    const("coordinates_mode", "string"),
    const("align_corners", "bool"),
)


@rule(
    "affine",
    tensor("x"),
    tensor("transform_matrix"),
    const("output_height"),
    const("output_width"),
    *_SAMPLING,
    dtypes="x:F.T transform_matrix:F.T padding_value:F.T",
)
def affine(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C, H, W]`, transform_matrix `[N or 1, 6]`; bilinear, 0 outside, coordinates from -1 to 1."""
    x, matrix = _image(call, 4), call.type("transform_matrix")
    if matrix.rank != 2 or matrix.shape[1] != 6 or matrix.shape[0] not in (1, x.shape[0]):
        raise call.refuse(f"transform_matrix needs the shape [{x.shape[0]}, 6]; got {matrix}")
    modes = tuple(call.text(n).lower() for n in ("sampling_mode", "padding_mode", "coordinates_mode"))
    if modes != ("bilinear", "constant", "normalized_minus_one_to_one") or call.number("padding_value"):
        raise call.refuse(f"needs bilinear, constant 0, normalized_minus_one_to_one; got {', '.join(modes)}")
    return (TensorType(x.dtype, (*x.shape[:2], call.integer("output_height"), call.integer("output_width"))),)


@rule(
    "resample",
    tensor("x"),
    tensor("coordinates"),
    *_SAMPLING,
    dtypes="x:F.T coordinates:FN padding_value:F.T",
)
def resample(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C, H, W]` at coordinates `[N, H', W', 2]`."""
    x, at = _image(call, 4), call.type("coordinates")
    if at.rank != 4 or at.shape[0] != x.shape[0] or at.shape[3] != 2:
        raise call.refuse(f"coordinates needs the shape [{x.shape[0]}, H, W, 2]; got {at}")
    return (TensorType(x.dtype, (*x.shape[:2], *at.shape[1:3])),)
