"""Record a function once for all calls on tensors of equal structure; later calls get copies of its nodes.

before: an optimizer's rule runs for each of 240 parameters, 40 operations each     after: for each distinct shape

The nodes, their order and their names are those of a run; each copy has the place of its own call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ane_trainer.ane.capture.trace.recorder import Recorder, Slot
from ane_trainer.ane.capture.trace.sources import Tensors
from ane_trainer.ane.capture.trace.torch_private import without_modes

Function = Callable[..., Tensors]


@dataclass(frozen=True)
class _Template:
    """The nodes of one run: of its inputs, those that it recorded, and of its results with a tensor like each."""

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    results: Mapping[str, tuple[Node, torch.Tensor]]


class Stamps:
    """The functions that one recorder has seen, by what their callers call them and the structure of their tensors."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._templates: dict[object, _Template | None] = {}

    def call(self, name: object, function: Function, *groups: Tensors) -> Tensors:
        """`function(*groups)`, which depends on nothing but these tensors and what `name` stands for.

        It runs again where copies would not be the same: it wrote to its inputs, read others or constants, returned
        views of them, or did what no program can; or these inputs are known numbers or have stale views.
        """
        tensors = list(itertools.chain.from_iterable(group.values() for group in groups))
        slots = [self._recorder.current(tensor) for tensor in tensors]
        inputs = tuple(slot.node for slot in slots if slot is not None)
        if len(inputs) < len(slots):
            return function(*groups)
        first = {node: place for place, node in reversed(list(enumerate(inputs)))}
        forms = tuple((t.shape, t.stride(), t.dtype, first[n]) for t, n in zip(tensors, inputs, strict=True))
        key = name, tuple(map(tuple, groups)), forms
        if key not in self._templates:
            return self._run(key, lambda: function(*groups), inputs, [s for s in slots if s is not None])
        template = self._templates[key]
        return function(*groups) if template is None else self._copy(template, inputs)

    def _run(
        self, key: object, function: Callable[[], Tensors], inputs: tuple[Node, ...], slots: list[Slot]
    ) -> Tensors:
        """Run the function, and keep what it recorded if that may be copied."""
        recorder = self._recorder
        before, found = len(recorder.graph.nodes), len(recorder.findings)
        writes = [slot.root.writes for slot in slots]
        results = function()
        count = len(recorder.graph.nodes) - before
        nodes = tuple(reversed(list(itertools.islice(reversed(recorder.graph.nodes), count))))
        made = {name: recorder.current(tensor) for name, tensor in results.items()}
        kept = {name: (slot.node, results[name]) for name, slot in made.items() if slot is not None}
        roots, known = {id(slot.root) for slot in slots}, {*inputs, *nodes}
        whole = (
            len(recorder.findings) == found
            and writes == [slot.root.writes for slot in slots]
            and len(kept) == len(results)
            and not any(slot is not None and id(slot.root) in roots for slot in made.values())
            and all(node.op == "call_function" and known.issuperset(node.all_input_nodes) for node in nodes)
        )
        self._templates[key] = _Template(inputs, nodes, kept) if whole else None
        return results

    def _copy(self, template: _Template, inputs: tuple[Node, ...]) -> Tensors:
        """The template's nodes once more, on other inputs."""
        copies = dict(zip(template.inputs, inputs, strict=True))
        for node in template.nodes:
            args, kwargs = (map_arg(each, copies.__getitem__) for each in (node.args, node.kwargs))
            copies[node] = self._recorder.emit(node.target, args, node, kwargs)
        with without_modes():  # each result is a tensor of its own; nobody reads its numbers
            fresh = {name: tensor.detach() for name, (_, tensor) in template.results.items()}
        for name, (node, _) in template.results.items():
            self._recorder.attach(fresh[name], copies[node], known=False)
        return fresh
