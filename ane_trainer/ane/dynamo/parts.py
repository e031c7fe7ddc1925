"""Parts of a graph as modules of their own, which PyTorch runs beside the engine's programs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from ane_trainer.ane.capture.trace.moves import VIEWS


def reshape_views(node: Node) -> None:
    """Let a view that PyTorch is to run take a tensor in any order: what made its own contiguous may be gone."""
    if node.target in VIEWS:
        node.target = torch.ops.aten.reshape.default


def ancestors(nodes: Iterable[Node], within: Container[Node] | None = None) -> set[Node]:
    """The nodes and all that they follow from; only those `within`."""
    found, pending = set[Node](), list(nodes)
    while pending:
        node = pending.pop()
        if node not in found and (within is None or node in within):
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def part_of(
    module: GraphModule, inputs: Sequence[Node], nodes: Iterable[Node], results: Sequence[Node]
) -> GraphModule:
    """Nodes of a graph, given in order, as a module over `inputs`."""
    graph = Graph()
    new = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        new[node] = graph.node_copy(node, lambda n: new[n])
        reshape_views(new[node])
    graph.output(tuple(new[node] for node in results))
    return GraphModule(module, graph)
