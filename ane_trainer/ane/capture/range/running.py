"""Run captured graphs on example values node by node, without the weight update, freeing values early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Interpreter, Node
from torch.fx.node import Target

from ane_trainer.ane.capture.range.editing import in_update

aten = torch.ops.aten

#: What needs an operand in the order of its axes, and which one: views, and a kernel whose operand PyTorch has so.
_IN_ORDER: dict[object, int] = {
    aten.view.default: 0, aten._unsafe_view.default: 0, aten.as_strided.default: 0, aten.nll_loss2d_backward.default: 1,
}  # fmt: skip


class InOrder(Interpreter):
    """Runs nodes of a graph; what needs order sees values that simplification left in another layout in order."""

    def call_function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, object]) -> object:
        """One operation."""
        place = _IN_ORDER.get(target)
        if place is not None:
            args = (*args[:place], args[place].contiguous(), *args[place + 1 :])
        return super().call_function(target, args, kwargs)

    def value(self, node: Node) -> object:
        """What the next nodes see of one."""
        held: object = self.env[node]
        return held


def in_step(
    runs: Sequence[InOrder], inputs: Sequence[torch.Tensor]
) -> Iterator[tuple[Node, tuple[object, ...]]]:
    """Run one graph several ways, node by node; each node in front of the update, and what the runs make of it.

    `inputs`: the values of the placeholders in order.
    """
    graph = runs[0].module.graph
    assert isinstance(graph, Graph)
    last = _last_readers(graph)
    for run in runs:
        run.args_iter = iter(inputs)
        run.env = {}
    for node in graph.nodes:
        if node.op == "output":
            return
        if node not in last and node.op != "placeholder":
            continue
        for run in runs:
            run.env[node] = run.run_node(node)
        if not in_update(node):
            yield node, tuple(run.value(node) for run in runs)
        for gone in last.get(node, ()):
            for run in runs:
                run.env.pop(gone, None)


def _last_readers(graph: Graph) -> dict[Node, list[Node]]:
    """The nodes that what is in front of the update needs, with the values that nobody reads after each of them."""
    needed: dict[Node, list[Node]] = {}
    read: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (in_update(node) and node not in read):
            continue
        own = [node, *node.all_input_nodes]
        needed[node] = [each for each in dict.fromkeys(own) if each not in read]
        read.update(own)
    return needed
