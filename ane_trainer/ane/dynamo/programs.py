"""A graph of AOTAutograd as a function that runs programs on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule

from ane_trainer.ane.capture.ports import identifier, unique
from ane_trainer.ane.capture.trace.torch_private import without_modes
from ane_trainer.ane.chips.counting import flops
from ane_trainer.ane.compiler.build import prepare
from ane_trainer.ane.dispatch.feeds import RANGES, Slot, slot_of, to_float, to_pair
from ane_trainer.ane.dynamo.fallback import Segment, cpu_flops, split
from ane_trainer.ane.dynamo.graphs import USER_RESULTS, Prepared, prepare_graph
from ane_trainer.ane.dynamo.options import Options
from ane_trainer.ane.dynamo.report import ProgramRecord, report
from ane_trainer.ane.dynamo.torch_private import make_boxed_func
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Captured, Port


def forward_function(
    module: GraphModule, example_inputs: Sequence[object], options: Options, role: str
) -> Callable[..., object]:
    """The compiler that AOTAutograd calls for forward (and inference) graphs."""
    del example_inputs
    users = int(module.meta.get(USER_RESULTS, 1 << 30))
    function = GraphFunction(module, options, role)

    def run(*inputs: object) -> list[object]:
        return function(inputs, users)

    return make_boxed_func(run)


class GraphFunction:
    """A graph on the engine, with the host's part of it."""

    def __init__(self, module: GraphModule, options: Options, role: str) -> None:
        self._dtypes = [_dtype(node) for node in module.graph.output_node().args[0]]  # type: ignore[union-attr]
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        shapes = tuple(tuple(node.meta["val"].shape) for node in placeholders if _tensor(node))
        with without_modes():  # constants are to be real tensors
            self._prepared: Prepared = prepare_graph(module)
            self._segments = split(self._prepared.graph, options)
            self._parts = [
                None if part.on_cpu else EnginePart(part.graph, options) for part in self._segments
            ]
        self.record = _record(role, shapes, options, self._segments, self._parts, self._prepared.notes)
        report().programs.append(self.record)

    def __call__(self, inputs: Sequence[Any], users: int) -> list[Any]:
        """The results; those from number `users` on stay in the engine's precision, for the backward graph."""
        prepared = self._prepared
        draws = [draw() for draw in prepared.draws]
        host = prepared.host(*inputs) if prepared.host is not None else ()
        values = [inputs[i] for i in prepared.inputs] + [draws[i] for i in prepared.used_draws]
        engine = self._run_engine(values)
        sources = {"input": inputs, "draw": draws, "host": host, "engine": engine}
        results = []
        for number, (source, dtype) in enumerate(zip(prepared.results, self._dtypes, strict=True)):
            value = source.value if source.kind == "value" else sources[source.kind][source.value]
            cast = isinstance(value, torch.Tensor) and source.kind == "engine" and number < users
            results.append(value.to(dtype) if cast else value)
        return results

    def _run_engine(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        names = dict(zip(self._input_names(), values, strict=True))
        for segment, part in zip(self._segments, self._parts, strict=True):
            inputs = [names[name] for name in segment.inputs]
            if part is None:
                outputs = segment.run(inputs)
            else:
                outputs = part(inputs)
                self.record.dispatches += 1
            names.update(zip(segment.outputs, outputs, strict=True))
        results: Any = self._prepared.graph.graph.output_node().args[0]
        return [names[node.name] for node in results]

    def _input_names(self) -> list[str]:
        return [node.name for node in self._prepared.graph.graph.nodes if node.op == "placeholder"]


class EnginePart:
    """One program on a device; takes and gives tensors."""

    def __init__(self, module: GraphModule, options: Options) -> None:
        target = options.target
        assert target.chip is not None
        self._range = RANGES[target.precision]
        captured = as_captured(module)
        compiled = prepare(captured, target.chip, target.path, target.precision)
        self.program = compiled.program
        self._session = target.load(compiled)
        self._inputs = [
            slot_of(
                p.target, original.shape if len(original.shape) <= len(p.shape) else p.shape, p, mask=True
            )
            for p, original in zip(compiled.inputs, captured.inputs, strict=False)
        ]
        nodes: Any = module.graph.output_node().args[0]
        self._outputs = [
            (p.name, tuple(n.meta["val"].shape)) for p, n in zip(compiled.outputs, nodes, strict=True)
        ]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        feeds: dict[str, Array] = {}
        for slot, value in zip(self._inputs, inputs, strict=True):
            if slot.high is not None:
                feeds |= to_pair(slot, value, self._range)
            elif slot.port is not None:
                feeds[slot.port] = self._array(value, slot)
        results = self._session.run(feeds)
        return [torch.from_numpy(np.array(results[n])).reshape(shape) for n, shape in self._outputs]

    def _array(self, value: torch.Tensor, slot: Slot) -> Array:
        """Values in the program's precision are taken bit by bit; others are checked and rounded."""
        if value.dtype == self._range.dtype:
            return value.detach().contiguous().numpy().reshape(slot.shape)
        return to_float(slot, value, self._range)


def as_captured(module: GraphModule) -> Captured:
    """A prepared graph with its ports."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    places = [Port(identifier(n.name), _shape(n), "batch", _place(n)) for n in placeholders]
    results: Any = module.graph.output_node().args[0]
    outputs = [Port(f"result_{i}", _shape(n), "result", f"result_{i}") for i, n in enumerate(results)]
    ports = unique([*places, *outputs])
    return Captured(module, tuple(ports[: len(places)]), tuple(ports[len(places) :]), ())


def _record(
    role: str,
    shapes: tuple[tuple[int, ...], ...],
    options: Options,
    segments: Sequence[Segment],
    parts: Sequence[EnginePart | None],
    notes: tuple[str, ...],
) -> ProgramRecord:
    programs = [part.program for part in parts if part is not None]
    engine = sum(flops(op) for program in programs for op in program.main.ops)
    host = sum(cpu_flops(segment.graph) for segment in segments if segment.on_cpu)
    return ProgramRecord(
        role=role,
        shapes=shapes,
        chip=options.target.chip or "",
        device=options.target.device,
        programs=len(programs),
        ops=sum(len(program.main.ops) for program in programs),
        engine_flop_fraction=engine / (engine + host) if engine + host else 0.0,
        host=notes,
        cpu=tuple(text for segment in segments for text in segment.reasons),
    )


def _tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape) or (1,)


def _place(node: torch.fx.Node) -> str:
    return str(node.name)


def _dtype(node: object) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
