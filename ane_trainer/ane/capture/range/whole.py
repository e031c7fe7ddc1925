"""Integers of the batch beyond fp16 that only floats read, as floats, which the range pass scales by a power of two.

    before: `x.float() / 1e6`, x int64 up to 2,000,000        after: x is fed as x * 2^-6

What looks them up, compares, divides or takes sines of them reads them exactly, and is left as it is.
Tests: `test_counting.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.editing import aten, is_float
from ane_trainer.ane.capture.trace.moves import TAKEN
from ane_trainer.ane.mil.program import MAX_FP16

#: Operations with floats whose results are off by as much as their operands.
_LINEAR = (
    "aten.add.",
    "aten.sub.",
    "aten.rsub.",
    "aten.mul.",
    "aten.div.",
    "aten.neg.",
    "aten.mm.",
    "aten.matmul.",
)
_PERIODIC = ("aten.sin.", "aten.cos.", "aten.tan.", "aten.floor.", "aten.ceil.", "aten.round.", "aten.trunc.",
             "aten.frac.", "aten.remainder.", "aten.fmod.", "aten._to_copy.")  # fmt: skip


def read_as_floats(graph: Graph, bounds: Mapping[str, tuple[float, float] | None]) -> int:
    """Let placeholders of integers beyond fp16 (`bounds` by name) be floats where only floats read them; how many."""
    count = 0
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        ends = bounds.get(node.name)
        if ends is None or max(-ends[0], ends[1]) <= MAX_FP16 or not _integral(node):
            continue
        moved, turned = _readers(node)
        if moved is None or any(_exact(t) for t in turned):
            continue
        for each in moved:
            each.meta["val"] = torch.empty_like(each.meta["val"], dtype=torch.float32, device="meta")
        for each in turned:
            each.replace_all_uses_with(each.all_input_nodes[0])
            graph.erase_node(each)
        count += 1
    return count


def _integral(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )


def _readers(node: Node) -> tuple[list[Node] | None, list[Node]]:
    """The node with what moves it, and what turns that into floats; None if anything else reads them."""
    moved, turned, waiting = list[Node](), list[Node](), [node]
    while waiting:
        source = waiting.pop()
        moved.append(source)
        for user in source.users:
            if user.target is aten._to_copy.default and is_float(user):
                turned.append(user)
            elif user.target in TAKEN:
                waiting.append(user)
            else:
                return None, []
    return moved, turned


def _exact(node: Node) -> bool:
    """Whether floats get to an operation with a period or steps by linear operations."""
    waiting, seen = [node], set[Node]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        for user in source.users:
            name = str(user.target)
            if name.startswith(_PERIODIC) or (user.op == "call_function" and not is_float(user)):
                return True
            if name.startswith(_LINEAR) or user.target in TAKEN:
                waiting.append(user)
    return False
