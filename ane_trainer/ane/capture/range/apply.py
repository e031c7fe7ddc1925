"""The range pass on a captured graph: forms that cannot leave the range, then powers of two from the calibration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch.fx import Node
from torch.fx.node import Argument

from ane_trainer.ane.capture.ports import identifier
from ane_trainer.ane.capture.range.calibration import Magnitude, magnitudes
from ane_trainer.ane.capture.range.divisors import with_small_divisors
from ane_trainer.ane.capture.range.editing import aten, is_float
from ane_trainer.ane.capture.range.exponents import Exponents, scale_values
from ane_trainer.ane.capture.range.guarding import guard, watch
from ane_trainer.ane.capture.range.near import tell_of_near_numbers
from ane_trainer.ane.capture.range.switch import POWERS, is_allowed, note
from ane_trainer.ane.capture.scaling import HEALTH, SCALING
from ane_trainer.ane.capture.trace.simplify import drop_dead
from ane_trainer.ane.stages import Captured, Port

#: Buffers above the first get an exponent that brings them to the second.
LARGEST_BUFFER, WANTED_BUFFER = 2.0**12, 2.0**9
#: Prefix of the results that watched values have.
GUARD = "guard/"
#: Targets of results that the host reads in their ports' scale: the loss, gradients, outputs.
_SCALED_RESULTS = ("loss", "output", "result_")


def calibrated(captured: Captured, examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Magnitude]:
    """The magnitudes of the step's values on these examples (port name -> value)."""
    return magnitudes(captured.graph, [[e[p.name] for p in captured.inputs] for e in examples])


def keep_in_range(captured: Captured, examples: Sequence[Mapping[str, torch.Tensor]]) -> Captured:
    """The same step with its values in fp16's range for these examples; see `scale_found`."""
    return scale_found(captured, calibrated(captured, examples))


def scale_found(
    captured: Captured,
    magnitudes: Mapping[str, Magnitude],
    buffers: Collection[str] = (),
    watched: bool = False,
) -> Captured:
    """The same step with its values in fp16's range, for magnitudes by node name; `captured` if they are as it is.

    Changes the graph in place. Ports of the batch, of results and of `buffers` carry their power of two as `scale`;
    other state keeps its own. `watched`: the magnitudes of watched values are further results, GUARD + node name.
    """
    if not is_allowed(POWERS):
        return captured
    graph, found = captured.graph.graph, dict(magnitudes)
    scale_names = {p.name for p in captured.inputs if p.target.startswith(SCALING)}
    for node in graph.nodes:  # the loss scale and its views: powers of two
        if node.name in scale_names:
            for user in (node, *(u for u in node.users if u.target is aten.view.default)):
                found.pop(user.name, None)
    fixed = [p.name for p in captured.inputs if p.role != "batch" or "/" in p.target]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    held = _buffer_exponents(captured, found, buffers)
    kinds = {n.name: str(n.target).removeprefix("aten.").partition(".")[0] for n in graph.nodes}
    exponents = scale_values(graph, with_small_divisors(graph, found), fixed, held)
    exponents.found |= found
    for shift in exponents.shifts:
        change = f"carried times 2^{-shift.exponent}"
        note(POWERS, shift.source, kinds.get(shift.node, shift.node), change, shift.reason)
    tell_of_near_numbers(exponents, captured, exact=bool(scale_names))
    guarded = guard(exponents, captured, [n for n in placeholders if n.name in scale_names], buffers)
    peaks = watch(exponents, captured) if watched else []
    if not exponents.changed and not peaks:
        return captured
    inputs = tuple(_scaled(p, exponents, n) for p, n in zip(captured.inputs, placeholders, strict=True))
    output, names = graph.output_node(), {p.target: p.name for p in captured.inputs if p.role == "state"}
    exponents.here = output
    nodes: list[Argument] = []
    outputs = []
    for port, node in zip(captured.outputs, _results(output), strict=True):
        kept = held.get(names.get(port.target, ""), 0) if port.role == "state" else 0
        free = port.role == "result" and (port.target.startswith(_SCALED_RESULTS) or "/" in port.target)
        nodes.append(node if free else exponents.at(node, kept))
        scaled = dataclasses.replace(port, scale=port.scale * 2.0**-kept) if kept else port
        outputs.append(_scaled(port, exponents, node) if free else scaled)
    for node, peak in peaks:
        nodes.append(peak)
        outputs.append(Port(identifier(f"{GUARD}{node.name}"), (1,), "result", GUARD + node.name))
    output.args = (nodes,)
    drop_dead(graph)
    graph.lint()
    captured.graph.recompile()
    outputs = [
        dataclasses.replace(p, shape=(p.shape[0] + len(guarded),)) if p.target == HEALTH else p
        for p in outputs
    ]
    return dataclasses.replace(captured, inputs=inputs, outputs=tuple(outputs), guarded=guarded)


def _buffer_exponents(
    captured: Captured, found: Mapping[str, Magnitude], buffers: Collection[str]
) -> dict[str, int]:
    """Port name -> exponent of buffers that come near the end of the range: statistics have a way to go still."""
    after = {
        port.target: [node.name, *(n.name for n in node.all_input_nodes)]  # where(fits, new, old)
        for port, node in zip(captured.outputs, _results(captured.graph.graph.output_node()), strict=True)
        if port.role == "state" and isinstance(node, Node)
    }
    exponents = {}
    for port in captured.inputs:
        if port.role == "state" and port.target in buffers:
            names = [port.name, *after.get(port.target, [])]
            peak = max((found[name].peak for name in names if name in found), default=0.0)
            if peak > LARGEST_BUFFER:
                exponents[port.name] = math.ceil(math.log2(peak / WANTED_BUFFER))
    return exponents


def _results(output: Node) -> Sequence[Argument]:
    results = output.args[0]
    assert isinstance(results, (list, tuple))
    return results


def _scaled(port: Port, exponents: Exponents, node: object) -> Port:
    exponent = exponents.of.get(node, 0) if isinstance(node, Node) and is_float(node) else 0
    return dataclasses.replace(port, scale=port.scale * 2.0**-exponent) if exponent else port
