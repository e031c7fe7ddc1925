"""Split a traced step for lowering: whole, or at its gradients into a backward and an update part.

The update part takes what the backward part returns, so that a sum over several backward passes can stand between
them. What goes across, each in a port called a partial result:

    <parameter>/partial   its gradient in its unit, before accumulation and clipping
    <buffer>/partial      its new value (running statistics)
    partial/peaks         the largest magnitude of each gradient in its unit
    partial/fits          1 if the scaled gradients fit, else 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from ane_trainer.ane.capture.ports import identifier
from ane_trainer.ane.capture.range import (
    calibrated,
    count_in_floats,
    cut_far_codes,
    drop_cancelled,
    keep_in_range,
    read_as_floats,
    scale_found,
    scale_rows,
)
from ane_trainer.ane.capture.range.calibration import Magnitudes
from ane_trainer.ane.capture.trace.torch_private import graph_module
from ane_trainer.ane.stages import Alias, Captured, Port

Tensors = dict[str, torch.Tensor]

PARTIAL = "partial"
#: Values of later steps that are larger than the first step's by this count.
_GROWN = 4.0
#: Targets of the partial results that are not sums.
PEAKS, ALL_FIT = "partial/peaks", "partial/fits"


def partial_ports(values: Mapping[str, torch.Tensor]) -> list[Port]:
    """Ports of partial results by target."""
    return [Port(identifier(t), tuple(v.shape) or (1,), "result", t) for t, v in values.items()]


def is_partial(port: Port) -> bool:
    """Whether the port carries a partial result."""
    return port.target in (PEAKS, ALL_FIT) or port.target.endswith(f"/{PARTIAL}")


def finish(graph: GraphModule, inputs: Sequence[Port], outputs: Sequence[Port]) -> Captured:
    """The graph within the engine's range, without unused inputs, and its aliases; unchanged state is no output."""
    drop_cancelled(graph.graph)
    count_in_floats(graph.graph)
    read_as_floats(graph.graph, {p.name: p.bounds for p in inputs if p.role == "batch"})
    cut_far_codes(graph.graph)
    scale_rows(graph.graph)
    nodes = {n.name: n for n in graph.graph.nodes if n.op == "placeholder"}
    state = {p.target: p.name for p in inputs if p.role == "state"}
    output = graph.graph.output_node()
    results = list(zip(output.args[0], outputs, strict=True))  # type: ignore[arg-type]
    results = [(r, p) for r, p in results if p.role != "state" or r is not nodes[state[p.target]]]
    output.args = ([r for r, _ in results],)
    dropped = [p for p in inputs if p.role != "state" and not nodes[p.name].users]
    for port in dropped:
        graph.graph.erase_node(nodes[port.name])
    graph.recompile()
    kept = tuple(p for _, p in results)
    aliases = tuple(Alias(p.name, state[p.target]) for p in kept if p.role == "state")
    return Captured(graph, tuple(p for p in inputs if p not in dropped), kept, aliases)


def finish_whole(
    graph: GraphModule,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    examples: Sequence[Tensors],
    sizes: Magnitudes,
    buffers: Collection[str],
    later: Sequence[Tensors] = (),
) -> tuple[Captured, Magnitudes]:
    """`finish`, then the range pass on `examples` (values by port name; none: a program in single precision).

    `later`: the same batch with the buffers of later steps, of which only what is larger counts. `sizes`: magnitudes
    of an earlier capture of the same graph, instead; those that were used are returned.
    """
    captured = finish(graph, inputs, outputs)
    if not examples:
        return captured, {}
    if not sizes or not sizes.keys() <= {n.name for n in graph.graph.nodes}:
        sizes = calibrated(captured, examples)
        for name, found in calibrated(captured, later).items():
            known = sizes.get(name, found)
            if found.peak > _GROWN * known.peak:
                sizes = {
                    **sizes,
                    name: dataclasses.replace(known, peak=found.peak, rms=known.rms or found.rms),
                }
    return scale_found(captured, sizes, buffers), sizes


def finish_divided(
    graph: GraphModule, inputs: Sequence[Port], outputs: Sequence[Port], examples: Sequence[Tensors]
) -> tuple[Captured, Captured]:
    """The backward part (batch, weights -> loss, partial results) and the update part of a traced step."""
    results = list(zip(graph.graph.output_node().args[0], outputs, strict=True))  # type: ignore[arg-type]
    cut = {node: port for node, port in results if is_partial(port) and node.op == "call_function"}
    first = [(n, p) for n, p in results if p.target == "loss" or (n in cut and is_partial(p))]
    rest = [(n, p) for n, p in results if p.target != "loss" and not is_partial(p)]
    update, used = part_of(graph, [n for n, _ in rest], cut)
    state = {p.name for p in inputs if p.role == "state"}
    backward, own = part_of(graph, [n for n, _ in first], {}, keep=state - used)
    backward_part = finish(backward, [p for p in inputs if p.name in own], [p for _, p in first])
    fed = [dataclasses.replace(p, role="batch") for n, p in cut.items() if p.name in used]
    placeholders = [p for p in inputs if p.name in used] + fed
    update_part = finish(update, placeholders, [p for _, p in rest])
    if examples:
        examples = [{**e, **_results_of(backward_part, e)} for e in examples]
        backward_part, update_part = (keep_in_range(part, examples) for part in (backward_part, update_part))
    return backward_part, update_part


def part_of(
    whole: GraphModule, results: Sequence[Node], cut: Mapping[Node, Port], keep: Collection[str] = ()
) -> tuple[GraphModule, set[str]]:
    """A graph of the nodes that `results` need, those in `cut` as placeholders; and the names of its placeholders.

    Placeholders named in `keep` stay, used or not.
    """
    needed, waiting = set(), list(results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [] if node in cut else node.all_input_nodes
    graph, copies = Graph(), {}
    for node in whole.graph.nodes:
        if node.op == "placeholder" and (node in needed or node.name in keep):
            copies[node] = graph.node_copy(node)
    for node, port in cut.items():
        if node in needed:
            copies[node] = graph.placeholder(port.name)
            copies[node].meta = dict(node.meta)
    names = {node.name for node in copies.values()}
    for node in whole.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in results])
    return graph_module(whole, graph), names


def _results_of(captured: Captured, example: Tensors) -> Tensors:
    """The results of a captured part by port name."""
    with torch.no_grad():
        values = captured.graph(*(example[p.name] for p in captured.inputs))
    return {p.name: v.reshape(p.shape) for p, v in zip(captured.outputs, values, strict=True)}
