"""From a Python function over tensors to a functional FX graph of ATen ops, with source locations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.fx import traceback as fx_traceback

from ane_trainer.ane.capture.rewrites.keras_variables import both_branches
from ane_trainer.ane.capture.rewrites.substitutes import rewriting
from ane_trainer.ane.capture.trace.memory_reads import MemoryReads
from ane_trainer.ane.capture.trace.operations import refusal
from ane_trainer.ane.capture.trace.recorder import Recorder
from ane_trainer.ane.capture.trace.simplify import simplify
from ane_trainer.ane.capture.trace.sources import FAULTS, Place, spread_sources
from ane_trainer.ane.capture.trace.stamps import Stamps
from ane_trainer.ane.capture.trace.torch_private import Decompositions, plain_kernels
from ane_trainer.ane.errors import UnsupportedModel


def trace(
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: Mapping[str, torch.Tensor],
    decompositions: Decompositions,
    place: Place | None = None,
    *,
    own: bool = False,
) -> torch.fx.GraphModule:
    """Trace `function(*inputs.values())` into a graph without mutations or dead nodes.

    `function` keeps `place` up to date, with which its operations are annotated. It may run autograd
    and may change its own intermediates in place, but not its inputs, unless they are the trace's `own`.
    Raises: UnsupportedModel for all places that decide by values which are not known beforehand.
    Placeholders are called like the inputs. Nodes carry `meta["ane_source"]` where `sources` knows it.
    """
    place = place or Place()
    taken = {name: value.detach() if own else value.detach().clone() for name, value in inputs.items()}
    try:
        graph_module = _recorded(Recorder(decompositions, place, products=False), place, function, taken)
    except (*FAULTS, UnsupportedModel):  # it may be for the zeros that stand for products
        graph_module = _recorded(Recorder(decompositions, place), place, function, taken)
    simplify(graph_module.graph)
    _name_placeholders(graph_module.graph, list(inputs))
    spread_sources(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _recorded(
    recorder: Recorder,
    place: Place,
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: Mapping[str, torch.Tensor],
) -> torch.fx.GraphModule:
    """The graph of one run.

    Raises: UnsupportedModel for what the recorder found, also where the run failed since it went on with that.
    """
    place.stamp = Stamps(recorder).call
    for name, value in inputs.items():
        recorder.placeholder(name, value)
    with tracing(recorder.knows):
        try:
            with recorder, MemoryReads(recorder.knows, recorder.note_read):
                results = function(*inputs.values())
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if recorder.findings:
                raise refusal(recorder.findings) from error
            raise
        if recorder.findings:
            raise refusal(recorder.findings)
        return recorder.finish(results)


@contextlib.contextmanager
def tracing(knows: Callable[[torch.Tensor], bool] | None = None) -> Iterator[None]:
    """Node meta is kept, autograd stays on this thread, attention and RNNs are made of plain matmuls."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            plain_kernels(),
            fx_traceback.preserve_node_meta(),
            torch.autograd.set_multithreading_enabled(False),
            sdpa_kernel(SDPBackend.MATH),
            rewriting(knows=knows),
            both_branches(knows),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _name_placeholders(graph: torch.fx.Graph, names: list[str]) -> None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    taken, wanted = {node.name for node in graph.nodes}, set(names)
    for node in graph.nodes:  # free the names that the inputs are to have
        if node.op != "placeholder" and node.name in wanted:
            fresh = f"{node.name}_value"
            while fresh in taken:
                fresh += "_"
            taken.add(fresh)
            node.name = fresh
    for node in placeholders:
        node.name = f"arg_of_trace_{node.name}"
    for node, name in zip(placeholders, names, strict=True):
        node.name = node.target = name
