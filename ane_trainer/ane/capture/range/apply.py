"""The range pass on a captured graph: forms that cannot leave the range, then powers of two from the calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Node
from torch.fx.node import Argument

from ane_trainer.ane.capture.range.calibration import Magnitude, magnitudes
from ane_trainer.ane.capture.range.editing import aten, is_float
from ane_trainer.ane.capture.range.exponents import Exponents, scale_values
from ane_trainer.ane.capture.scaling import SCALING
from ane_trainer.ane.stages import Captured, Port

#: Targets of results that the host reads in their ports' scale: the loss, gradients, outputs.
_SCALED_RESULTS = ("loss", "output", "result_")


def keep_in_range(captured: Captured, examples: Sequence[Mapping[str, torch.Tensor]]) -> Captured:
    """The same step with its values in fp16's range for these examples (port name -> value).

    Changes the graph in place. Ports of the batch and of results carry their power of two as `scale`; state keeps
    its own.
    """
    found = magnitudes(captured.graph, [[e[p.name] for p in captured.inputs] for e in examples])
    return scale_found(captured, found)


def scale_found(captured: Captured, magnitudes: Mapping[str, Magnitude]) -> Captured:
    """`keep_in_range` for magnitudes by node name; `captured` itself if every value is in range as it is."""
    graph, found = captured.graph.graph, dict(magnitudes)
    scale_names = {p.name for p in captured.inputs if p.target.startswith(SCALING)}
    for node in graph.nodes:  # the loss scale and its views: powers of two
        if node.name in scale_names:
            for user in (node, *(u for u in node.users if u.target is aten.view.default)):
                found.pop(user.name, None)
    fixed = [p.name for p in captured.inputs if p.role != "batch" or "/" in p.target]
    exponents = scale_values(graph, found, fixed)
    if not exponents.shifts:
        return captured
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    inputs = tuple(_scaled(p, exponents, n) for p, n in zip(captured.inputs, placeholders, strict=True))
    output = graph.output_node()
    exponents.here = output
    nodes: list[Argument] = []
    outputs = []
    for port, node in zip(captured.outputs, _results(output), strict=True):
        free = port.role == "result" and (port.target.startswith(_SCALED_RESULTS) or "/" in port.target)
        nodes.append(node if free else exponents.at(node, 0))
        outputs.append(_scaled(port, exponents, node) if free else port)
    output.args = (nodes,)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    captured.graph.recompile()
    return dataclasses.replace(captured, inputs=inputs, outputs=tuple(outputs))


def _results(output: Node) -> Sequence[Argument]:
    results = output.args[0]
    assert isinstance(results, (list, tuple))
    return results


def _scaled(port: Port, exponents: Exponents, node: object) -> Port:
    exponent = exponents.of.get(node, 0) if isinstance(node, Node) and is_float(node) else 0
    return dataclasses.replace(port, scale=port.scale * 2.0**-exponent) if exponent else port
