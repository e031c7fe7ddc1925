"""Integers that follow from a batch's integers alone, taken out of a graph for the host to compute.

    before: `embedding(table, (ids * 2654435 + 7) % 1009)`     after: `embedding(table, code_0)`, and the host's part

Where the engine has no form for such arithmetic (products beyond 2 million, floats cut to integers), the host computes
it with PyTorch, exactly, and feeds the result; `report()` says so.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from ane_trainer.ane.capture.trace.simplify import drop_dead
from ane_trainer.ane.dynamo.parts import ancestors, part_of


def follows_from_integers(graph: Graph) -> set[Node]:
    """The inputs of integers, and what is computed from nothing else but constants."""
    found: set[Node] = set()
    constants: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            constants.add(node)
        elif node.op == "placeholder":
            found |= {node} if _integral(node) else set()
        elif node.op == "call_function":
            drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            sources = node.all_input_nodes
            if drawn or any(s not in found and s not in constants for s in sources):
                continue
            (constants if all(s in constants for s in sources) else found).add(node)
    return found


def copy_of(module: GraphModule) -> GraphModule | None:
    """A copy of a graph in which integers are computed from those of the batch; None of any other."""
    alone = follows_from_integers(module.graph)
    if not any(node.op == "call_function" and _integral(node) for node in alone):
        return None
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.output_node().meta = dict(module.graph.output_node().meta)
    return GraphModule(module, graph)


def take_out_codes(module: GraphModule, inputs: list[Node]) -> tuple[list[Node], GraphModule | None]:
    """Put an input in the place of each such integer that the rest of the graph reads, in place; those inputs, and
    what computes them of all `inputs` (None: there are none).
    """
    graph = module.graph
    alone = follows_from_integers(graph)
    leading: set[Node] = set()
    for node in reversed(graph.nodes):
        whole = _integral(node) or any(user in leading for user in node.users)
        if whole and node in alone and node.op == "call_function":
            leading.add(node)
    chosen = [
        n for n in graph.nodes if n in leading and _integral(n) and any(u not in leading for u in n.users)
    ]
    if not chosen:
        return [], None
    wanted = ancestors(chosen)
    computed = part_of(module, inputs, [n for n in graph.nodes if n in wanted and n not in inputs], chosen)
    codes = []
    for number, node in enumerate(chosen):
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            code = graph.placeholder(f"code_{number}")
        code.meta = dict(node.meta)
        node.replace_all_uses_with(code)
        codes.append(code)
    drop_dead(graph)
    return codes, computed


def _integral(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )
