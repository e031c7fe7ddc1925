"""`fallback="cpu"`: a graph in segments that alternate between the engine and PyTorch on the CPU.

Without a fallback the graph is one segment. With it, the nodes that lowering or the chip refuses are moved
to the CPU until what remains is accepted; a node's segment is the first one of its kind that comes after
the segments of all its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.compiler.legalize import legalize
from ane_trainer.ane.compiler.lower import lower
from ane_trainer.ane.dispatch import Target
from ane_trainer.ane.dynamo.options import Options
from ane_trainer.ane.dynamo.parts import reshape_views
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.stages import Captured, Port

_MARK = "refusable/"


@dataclass(frozen=True)
class Segment:
    """Part of a graph; `inputs` and `outputs` name values of the whole graph. `reasons`: why on the CPU."""

    graph: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    on_cpu: bool = False
    reasons: tuple[str, ...] = field(default=())

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The segment in PyTorch; values come in the precision of the engine and are given their own dtype."""
        nodes = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        values = [value.to(node.meta["val"].dtype) for node, value in zip(nodes, inputs, strict=True)]
        with torch.no_grad():
            return list(self.graph(*values))


def split(module: GraphModule, options: Options) -> list[Segment]:
    """The segments in order; none for a graph without results."""
    results: Any = module.graph.output_node().args[0]
    if not results:
        return []
    names = tuple(node.name for node in module.graph.nodes if node.op == "placeholder")
    whole = Segment(module, names, tuple(node.name for node in results))
    if options.fallback != "cpu":
        return [whole]
    refused = _refused(module, options)
    return _segments(module, refused) if refused else [whole]


def cpu_flops(module: GraphModule) -> int:
    """Floating-point operations of a segment: torch's formulas where it has them, else one an element."""
    from torch.utils.flop_counter import flop_registry  # imports triton where that is installed: 0.3 s

    total = 0
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        packet = getattr(node.target, "overloadpacket", None)
        first = value[0] if isinstance(value, (tuple, list)) else value
        if packet in flop_registry:
            args = torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
            total += int(flop_registry[packet](*args, **node.kwargs, out_val=value))
        elif isinstance(first, torch.Tensor):
            total += first.numel()
    return total


def _refused(module: GraphModule, options: Options) -> dict[str, Finding]:
    """Node name -> why the engine does not take it, with the user's place in it."""
    places = {node.name: node.meta.get(META_KEY) for node in module.graph.nodes}
    refused: dict[str, Finding] = {}
    while True:
        found: dict[str, Finding] = {}
        for segment in _segments(module, refused):
            if not segment.on_cpu:
                found |= _try(segment.graph, options.target)
        if not found:
            break
        refused |= found
    return {
        name: Finding(places.get(name) or f"node {name}", f.op, f.reason, f.fix)
        for name, f in refused.items()
    }


def _try(module: GraphModule, target: Target) -> dict[str, Finding]:
    """The findings of lowering and legalizing by node name.

    Raises: UnsupportedModel again if a finding belongs to no node (an input that is too large).
    """
    for node in module.graph.nodes:
        node.meta[META_KEY] = _MARK + node.name
    try:
        lowered = lower(_captured(module), dtype=target.precision)
        if target.precision == "fp16" and target.chip is not None:
            legalize(lowered, target.chip, target.path)
    except UnsupportedModel as error:
        marked = {f.where.removeprefix(_MARK): f for f in error.findings if f.where.startswith(_MARK)}
        for finding in error.findings:  # an input that the engine does not take: nor what uses it
            users = [n.users for n in module.graph.nodes if finding.where == f"input {n.name}"]
            marked |= {node.name: finding for node in users[0] if node.op != "output"} if users else {}
        if not marked:
            raise
        return marked
    return {}


def _captured(module: GraphModule) -> Captured:
    def port(node: Node, name: str, role: str) -> Port:
        return Port(name, tuple(node.meta["val"].shape) or (1,), role, name)

    inputs = [port(n, n.name, "batch") for n in module.graph.nodes if n.op == "placeholder"]
    results: Any = module.graph.output_node().args[0]
    outputs = [port(n, f"result_{i}", "result") for i, n in enumerate(results)]
    return Captured(module, tuple(inputs), tuple(outputs), ())


def _segments(module: GraphModule, refused: dict[str, Finding]) -> list[Segment]:
    """Even levels for the engine, odd ones for the CPU."""
    levels: dict[Node, int] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            levels[node] = 0
        elif node.op != "output":
            least = max((levels[source] for source in node.all_input_nodes), default=0)
            if node.target is operator.getitem:
                levels[node] = least
            else:
                levels[node] = least + (least % 2 != (node.name in refused))
    computed = [n for n in levels if n.op not in ("placeholder", "get_attr")]
    return [
        _segment(module, [n for n in computed if levels[n] == level], level % 2 == 1, refused)
        for level in sorted({levels[n] for n in computed})
    ]


def _segment(module: GraphModule, nodes: list[Node], on_cpu: bool, refused: dict[str, Finding]) -> Segment:
    own = set(nodes)
    graph, new = Graph(), {}
    inputs = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in own and s.op != "get_attr")
    for source in inputs:
        new[source] = graph.placeholder(source.name)
        new[source].meta = dict(source.meta)
    for constant in dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s.op == "get_attr"):
        new[constant] = graph.node_copy(constant)
    for node in nodes:
        new[node] = graph.node_copy(node, lambda n: new[n])
        if on_cpu:
            reshape_views(new[node])
    outputs = [
        n
        for n in nodes
        if any(user not in own for user in n.users) and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    graph.output(tuple(new[node] for node in outputs))
    reasons = tuple(str(refused[n.name]) for n in nodes if n.name in refused)
    names = tuple(n.name for n in inputs), tuple(n.name for n in outputs)
    return Segment(GraphModule(module, graph), *names, on_cpu, reasons)
