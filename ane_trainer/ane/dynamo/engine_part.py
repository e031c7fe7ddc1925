"""One program of an AOTAutograd graph on a device: tensors in and out, recompiled for other magnitudes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.capture.ports import identifier, tensor_bounds, unique
from ane_trainer.ane.capture.range import GUARD, read_as_floats, scale_found
from ane_trainer.ane.capture.range.calibration import INTEGERS, Magnitude
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.compiler.build import prepare
from ane_trainer.ane.dispatch.feeds import RANGES, Slot, slot_of, tell_of_rounded_integers, to_float, to_pair
from ane_trainer.ane.dynamo.options import Options
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import PAIR, Captured, Port

Values = list[torch.Tensor]


class EnginePart:
    """One program on a device; takes and gives tensors."""

    def __init__(self, module: GraphModule, options: Options) -> None:
        self._options, self._module = options, module
        self._range = RANGES[options.target.precision]
        self._scaled = self._told = False
        #: Of the last run, for each float result: its node, the largest stored entry, and the power of two.
        self.peaks: list[tuple[str, float, float]] = []
        self.fed: list[tuple[str, float, float]] = []  # the same of what was fed
        #: Of values on the way that may leave fp16: node, and largest entry (half of it where fp16 is the limit).
        self.watched: list[tuple[str, float]] = []
        #: Of inputs of whole numbers that are larger than was assumed: the least and largest so far.
        self._ends: dict[str, tuple[float, float]] = {}
        #: By node of the program's graph the node of the module's.
        self._names: dict[str, str] = {}
        self._load(as_captured(module))

    def calibrate(self, found: Mapping[str, Magnitude]) -> bool:
        """Recompile with powers of two beside values that leave the range; False if none does."""
        graph, copies = torch.fx.Graph(), dict[Node, Node]()
        graph.output(graph.graph_copy(self._module.graph, copies))
        for old, new in copies.items():
            new.meta = dict(old.meta)
        names = {
            kind + copies[node].name: found[kind + node.name]
            for node in copies
            for kind in ("", INTEGERS)
            if kind + node.name in found
        }
        if read_as_floats(graph, self._ends):
            names |= {
                n: Magnitude(max(-low, high), max(-low, high), 1.0) for n, (low, high) in self._ends.items()
            }
        captured = as_captured(GraphModule(self._module, graph), self._ends)
        scaled = scale_found(captured, names, watched=True)
        self._names = _origins(graph, {new.name: old.name for old, new in copies.items()})
        if scaled is captured and not self._scaled and not self._ends:
            return False
        self._scaled = scaled is not captured
        self._session.close()
        self._load(scaled)
        return True

    def widen(self, values: Mapping[str, torch.Tensor], found: Mapping[str, Magnitude]) -> bool:
        """Recompile for whole numbers that are larger than those so far; False if there are none."""
        before = dict(self._ends)
        for slot in self._inputs:
            value = values.get(slot.place)
            ends = None if value is None or value.is_floating_point() else tensor_bounds(value)
            if ends is None or slot.bounds is None or slot.chosen is not None:
                continue
            low, high = self._ends.get(slot.place, (0.0, 0.0))
            if ends[0] < slot.bounds[0] or ends[1] > slot.bounds[1]:
                self._ends[slot.place] = min(low, ends[0]), max(high, ends[1])
        return self._ends != before and self.calibrate(found)

    def _load(self, captured: Captured) -> None:
        target = self._options.target
        assert target.chip is not None
        compiled = prepare(captured, target.chip, target.path, target.precision)
        self.program = compiled.program
        self._session = target.load(compiled)
        self._inputs = [
            slot_of(
                p.target, original.shape if len(original.shape) <= len(p.shape) else p.shape, p, mask=True
            )
            for p, original in zip(compiled.inputs, captured.inputs, strict=False)
        ]
        nodes = cast("Sequence[Node]", self._module.graph.output_node().args[0])
        self._outputs = list(zip(compiled.outputs[: len(nodes)], nodes, strict=True))
        self._guards = [port for port in compiled.outputs[len(nodes) :] if port.target.startswith(GUARD)]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Values:
        feeds: dict[str, Array] = {}
        self.fed = []
        for slot, value in zip(self._inputs, inputs, strict=True):
            if value.is_floating_point() and value.numel():
                self.fed.append((slot.place, float(value.detach().abs().amax()), 1.0))
            if slot.high is not None:
                feeds |= to_pair(slot, value, self._range)
            elif slot.port is not None:
                feeds[slot.port] = self._array(value, slot)
        results = self._session.run(feeds)
        found = []
        self.peaks = []
        for port, node in self._outputs:
            value = torch.from_numpy(np.array(results[port.name])).reshape(node.meta["val"].shape)
            if port.quotients:
                high = torch.from_numpy(np.array(results[port.quotients])).reshape(value.shape)
                found.append(value.long() + PAIR * high.long())
                continue
            if node.meta["val"].is_floating_point() and value.numel():
                self.peaks.append((node.name, float(value.abs().amax()), port.scale))
            elif node.meta["val"].dtype != torch.bool and value.numel():
                self._check_integers(node, value)
            found.append(value if port.scale == 1.0 else value.float() / port.scale)
        self.watched = [
            (self._names[port.target.removeprefix(GUARD)], float(results[port.name][0]))
            for port in self._guards
        ]
        return found

    def _check_integers(self, node: Node, value: torch.Tensor) -> None:
        """Warn once of a result of integers that fp16 may have rounded."""
        largest = float(value.abs().amax())
        if largest >= self._range.largest_integer and not self._told:
            self._told = True
            tell_of_rounded_integers(str(node.meta.get(META_KEY) or node.name), largest)

    def _array(self, value: torch.Tensor, slot: Slot) -> Array:
        """Values in the program's precision are taken bit by bit; others are checked and rounded."""
        if value.dtype == self._range.dtype and slot.scale == 1.0:
            return value.detach().contiguous().numpy().reshape(slot.shape)
        return to_float(slot, value, self._range)


def _origins(graph: torch.fx.Graph, names: Mapping[str, str]) -> dict[str, str]:
    """By node of a graph the name of what it was, or of what it was first made of."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        made_of = [found[n.name] for n in node.all_input_nodes]
        found[node.name] = names.get(node.name) or next(iter(made_of), node.name)
    return found


def as_captured(
    module: GraphModule, ends: Mapping[str, tuple[float, float]] = MappingProxyType({})
) -> Captured:
    """A prepared graph with its ports; `ends`: the least and largest number of inputs of whole numbers."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    places = [
        Port(identifier(n.name), _shape(n), "batch", _place(n), bounds=ends.get(n.name)) for n in placeholders
    ]
    results = cast("Sequence[Node]", module.graph.output_node().args[0])
    outputs = [
        Port(f"result_{i}", _shape(n), "result", f"result_{i}", index_encoding="split")
        for i, n in enumerate(results)
    ]  # integers leave in two numbers where they need them
    ports = unique([*places, *outputs])
    return Captured(module, tuple(ports[: len(places)]), tuple(ports[len(places) :]), ())


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape) or (1,)


def _place(node: torch.fx.Node) -> str:
    return str(node.name)
