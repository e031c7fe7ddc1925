"""What a step must not do with data: decide by values, or make shapes of them. Found while it is recorded.

The recording goes on with the example's values, so that all such places are reported together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ane_trainer.ane.errors import Finding, UnsupportedModel

aten = torch.ops.aten
_VALUE_READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
#: Ports of random numbers begin with this.
_MASK = "mask_"


def finding(func: Any, nodes: list[Node], place: str | None) -> Finding | None:
    """Why `func` cannot be part of a step, on arguments that are not all known; None if it can."""
    place = place or str(func)
    # `index` keeps its shape but for masks, which its rule refuses
    if torch.Tag.dynamic_output_shape in func.tags and func is not aten.index.Tensor:
        return Finding(
            place, str(func), "gives a shape that depends on data.",
            "Keep the shape: torch.where, masked_fill, or a product with the mask.",
        )  # fmt: skip
    if func not in _VALUE_READS:
        return None
    if _only_random(nodes):
        return Finding(
            place, str(func), "decides by a random number what to run (as LayerDrop does).",
            'Set that probability to 0, or use torch.compile(model, backend="ane"), where the host decides.',
        )  # fmt: skip
    return Finding(
        place, str(func), "reads a tensor's value during the step, to decide what to do next.",
        "Use torch.where or arithmetic instead of if, float() or item() on tensors of the step. "
        "Run the model once before if only its first call does this.",
    )  # fmt: skip


def refusal(findings: list[Finding]) -> UnsupportedModel:
    """All places at once, each a single time."""
    distinct = list(dict.fromkeys(findings))
    return UnsupportedModel("The step depends on values that are not known beforehand:", distinct)


def _only_random(nodes: list[Node]) -> bool:
    """Whether the nodes follow from random numbers and constants alone."""
    pending, seen, inputs = list(nodes), set(nodes), []
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            inputs.append(node.name)
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return bool(inputs) and all(name.startswith(_MASK) for name in inputs)
