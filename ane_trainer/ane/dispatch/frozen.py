"""Frozen weights in 8 or 4 bits (QLoRA): constants of the step's program, which the engine decodes to fp16.

    int8   constexpr_affine_dequantize: integers from -127 to 127, one fp16 scale for each row
    int4   constexpr_lut_to_dense: for each row a palette of 16 fp16 numbers, and 4 bits for each entry

`quantize_frozen` gives a model's weights the values that these stand for, so that PyTorch computes with the same ones;
a step that is compiled afterwards has them as constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.capture.ports import Parameter
from ane_trainer.ane.capture.trace.torch_private import SideTable
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Literal, Op, TensorType, Value, literal
from ane_trainer.ane.mil.quantization import MIN_ELEMENTS, quantize
from ane_trainer.ane.mil.weights import from_array

KINDS = ("fp16", "int8", "int4")
#: Entries of a palette, and rounds of Lloyd's algorithm that place them.
COLORS, _ROUNDS = 16, 5
#: Entries that are made into palettes at a time: k-means needs some times their memory.
_AT_ONCE = 1 << 22

_KIND_OF: SideTable[str] = SideTable()


@torch.no_grad()
def quantize_frozen(model: torch.nn.Module, kind: str) -> int:
    """Round the frozen weights (two axes or more) to `kind`, in place; returns how many there are.

    The scale or palette of each row is of its largest entry or by k-means. Doing it again changes nothing.

    Raises: UsageError ANE104 for an unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(
            f"frozen: needs {', '.join(KINDS)}; got {kind!r}. Choose one of them.", code="ANE104"
        )
    if kind == "fp16":
        return 0
    found = [p for p in model.parameters() if _fits(p) and quantized_kind(p) != kind]
    for parameter in found:
        rows = parameter.detach().float().reshape(parameter.shape[0], -1)
        if kind == "int8":
            data, scale = quantize(rows.numpy(), kind, (1,))
            rounded = torch.from_numpy(data * scale.astype(np.float32))
        else:
            step = max(1, _AT_ONCE // rows.shape[1])
            rounded = torch.cat([palettize(rows[i : i + step]) for i in range(0, len(rows), step)])
        parameter.copy_(rounded.reshape(parameter.shape))
        _KIND_OF[parameter] = kind
    return len(found)


def quantized_kind(tensor: torch.Tensor) -> str | None:
    """What `quantize_frozen` made of a weight; None for others."""
    return _KIND_OF.get(tensor)


def quantized_names(model: torch.nn.Module) -> frozenset[str]:
    """The parameters that `quantize_frozen` has rounded."""
    return frozenset(name for name, p in model.named_parameters() if quantized_kind(p) is not None)


def _fits(parameter: torch.Tensor) -> bool:
    large = 2 <= parameter.dim() <= 4 and parameter.numel() >= MIN_ELEMENTS
    return large and not parameter.requires_grad and parameter.is_floating_point()


def frozen_constants(parameters: Iterable[Parameter]) -> Mapping[str, Op]:
    """For each quantized parameter that a step does not train the op that decodes it, by the parameter's name.

    Raises: UsageError ANE133 for weights that were changed since they were quantized.
    """
    found = {}
    for p in parameters:
        kind = quantized_kind(p.tensor)
        if kind is not None and not p.trained and not p.tensor.requires_grad:
            found[p.name] = _decoding(p.name, p.tensor.detach(), kind)
    return found


def _decoding(name: str, weight: torch.Tensor, kind: str) -> Op:
    """The constexpr op of a weight; its result has a name of its own."""
    shape = tuple(weight.shape)
    rows = weight.float().reshape(shape[0], -1)
    result = Value("weight", TensorType("fp16", shape))
    if kind == "int8":
        data, scale = quantize(rows.numpy(), kind, (1,))
        if not np.array_equal(data * scale.astype(np.float32), rows.numpy()):
            raise _changed(name, kind)
        args: tuple[tuple[str, Literal], ...] = (
            ("quantized_data", from_array(data.reshape(shape), dtype="int8")),
            ("zero_point", literal(0, "int8")), ("scale", from_array(scale[:, 0], dtype="fp16")),
            ("axis", literal(0, "int32")),
        )  # fmt: skip
        return Op("constexpr_affine_dequantize", args, (result,), name)
    packed = palette(rows)
    if packed is None:
        raise _changed(name, kind)
    indices, colors = packed
    tables = colors.reshape(shape[0], *(1,) * (len(shape) - 1), COLORS, 1)
    args = (
        ("indices", from_array(indices.reshape(shape), dtype="uint4")),
        ("lut", from_array(tables, dtype="fp16")),
    )
    return Op("constexpr_lut_to_dense", args, (result,), name)


def _changed(name: str, kind: str) -> UsageError:
    return UsageError(
        f"{name}: needs the values that quantizing to {kind} gave it; got others. Load weights before they are "
        "quantized (LoraOptions(frozen=...) does it when the trainer is made).",
        code="ANE133",
    )


def palettize(rows: torch.Tensor) -> torch.Tensor:
    """Rows `[R, K]` with each entry replaced by the nearest of 16 fp16 numbers, which k-means chose for its row."""
    rows = rows.detach().float().contiguous()
    places = (torch.arange(COLORS) + 0.5) / COLORS
    at = (places * (rows.shape[1] - 1)).round().long()
    colors = rows.sort(1).values[:, at].contiguous()
    for _ in range(_ROUNDS):
        nearest = _nearest(colors, rows)
        sums = torch.zeros_like(colors).scatter_add_(1, nearest, rows)
        counts = torch.zeros_like(colors).scatter_add_(1, nearest, torch.ones_like(rows))
        colors = torch.where(counts > 0, sums / counts.clamp(min=1), colors).sort(1).values
    colors = colors.half().float().contiguous()
    return colors.gather(1, _nearest(colors, rows))


def _nearest(colors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The index of the nearest of each row's sorted colors."""
    return torch.searchsorted(((colors[:, 1:] + colors[:, :-1]) / 2).contiguous(), rows)


def palette(rows: torch.Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float16]] | None:
    """(indices `[R, K]`, palettes `[R, 16]`) of rows with at most 16 different fp16 numbers each; None for others."""
    rows = rows.detach().float().contiguous()
    ordered = rows.sort(1).values
    rank = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    if int(rank.amax()) >= COLORS or not torch.equal(rows.half().float(), rows):
        return None
    colors = ordered[:, -1:].repeat(1, COLORS)
    colors[:, 0] = ordered[:, 0]
    colors.scatter_(1, rank, ordered[:, 1:])
    indices = torch.searchsorted(colors, rows)
    return indices.to(torch.uint8).numpy(), colors.half().numpy()
