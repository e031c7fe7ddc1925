"""Match Dynamo's graph of symbolic sizes to an earlier graph of fixed sizes.

After a second batch size Dynamo traces a function anew with symbolic sizes, and from then on prefers that
graph, also for the first size. What was compiled for the first size is used again if the graphs agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ane_trainer.ane.dynamo.torch_private import expression


def sizes_only(graph: Graph) -> bool:
    """Whether there are symbolic inputs and each is a size of an input tensor."""
    inputs = [node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"]
    sizes: set[object] = set()
    for value in inputs:
        if isinstance(value, torch.Tensor):
            sizes |= {expression(size) for size in value.shape}
    symbols = [value for value in inputs if isinstance(value, (int, torch.SymInt))]
    return bool(symbols) and all(expression(value) in sizes for value in symbols)


def same_but_for_sizes(fixed: Graph, symbolic: Graph) -> bool:
    """Whether the graphs have the same operations on the same values, numbers being equal where both are known."""
    left, right = [_work(graph) for graph in (fixed, symbolic)]
    if len(left) != len(right):
        return False
    pairs = dict(zip(left, right, strict=True))
    return all(
        a.op == b.op
        and (a.op == "placeholder" or a.target == b.target)
        and _agree(a.args, b.args, pairs)
        and _agree(a.kwargs, b.kwargs, pairs)
        for a, b in pairs.items()
    )


def _work(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "output" or not _is_number(node)]


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), (int, float, torch.SymInt, torch.SymFloat, torch.Size))


def _agree(a: object, b: Any, pairs: dict[Node, Node]) -> bool:
    if isinstance(a, Node):
        return pairs.get(a) is b if not _is_number(a) else isinstance(b, Node) and _is_number(b)
    if isinstance(b, Node):
        return isinstance(a, int) and not isinstance(a, bool) and _is_number(b)
    if isinstance(a, (list, tuple)):
        same_length = isinstance(b, (list, tuple)) and len(a) == len(b)
        return same_length and all(_agree(x, y, pairs) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_agree(a[k], b[k], pairs) for k in a)
    return type(a) is type(b) and bool(a == b)
