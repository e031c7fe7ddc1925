"""What an ATen overload does to its arguments, from its schema: writes, views, outs, and its form without writes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ane_trainer.ane.capture.trace.torch_private import schema
from ane_trainer.ane.errors import Finding, UnsupportedModel


@functools.cache
def written_argument(func: Any) -> int | None:
    """The index of the argument that the overload changes in place; None if it changes none."""
    written = (a.alias_info is not None and a.alias_info.is_write for a in schema(func).arguments)
    return next((i for i, is_written in enumerate(written) if is_written), None)


@functools.cache
def out_argument(func: Any) -> str | None:
    """The name of the only `out` argument (`div.out`); None if the overload has none or several."""
    outs = [a.name for a in schema(func).arguments if a.is_out]
    return outs[0] if len(outs) == 1 else None


@functools.cache
def is_view(func: Any) -> bool:
    """Whether the result shows the first argument's numbers."""
    arguments = schema(func).arguments
    return bool(arguments) and arguments[0].alias_info is not None and written_argument(func) is None


def pure_form(func: Any, place: str | None) -> Any:
    """The operation that computes what the writing one writes: `aten.add_.Tensor` -> `aten.add`."""
    namespace, name = schema(func).name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if name == "zero_":
        return lambda x: torch.zeros_like(x)
    if name == "fill_":
        return lambda x, value: torch.zeros_like(x) + value
    if packet is None or (not name.endswith("_") and out_argument(func) is None):
        reason, fix = "changes tensors in place in a way without a pure form.", "Use its out-of-place form."
        raise UnsupportedModel(
            "The step changes tensors in a way that cannot be captured:",
            [Finding(place or str(func), str(func), reason, fix)],
        )
    return packet  # it finds the overload by itself: `pow_.Scalar` is `pow.Tensor_Scalar`, not `pow.Scalar`
