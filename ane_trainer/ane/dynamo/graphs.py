"""Prepare AOTAutograd's graphs for lowering: host-side bookkeeping is taken out.

Taken out are random numbers (drawn on the host from PyTorch's generator, fed as inputs), integer counters
such as batch norm's (fp16 would stick at 2048), and results that are inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from ane_trainer.ane.capture.range import count_in_floats, cut_far_codes, drop_cancelled, scale_rows
from ane_trainer.ane.capture.range.changes import changes_of
from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.trace.simplify import simplify
from ane_trainer.ane.capture.trace.sources import META_KEY, PACKAGE_FOLDER, Place, fault, place_of
from ane_trainer.ane.capture.trace.torch_private import without_modes
from ane_trainer.ane.capture.trace.tracer import trace
from ane_trainer.ane.compiler.lower.indices.codes import MOVES
from ane_trainer.ane.compiler.lower.indices.ranges import packet_name
from ane_trainer.ane.compiler.lower.registry import ACCEPTS
from ane_trainer.ane.dynamo.codes import take_out_codes
from ane_trainer.ane.dynamo.ends import mark_ends
from ane_trainer.ane.dynamo.joint import KEPT, Kept
from ane_trainer.ane.dynamo.parts import ancestors, part_of
from ane_trainer.ane.dynamo.torch_private import changed_inputs, default_partition, with_effects
from ane_trainer.ane.errors import Finding, UnsupportedModel

aten = torch.ops.aten

#: Key of a forward module's meta: how many of its results are the user's; the rest is kept for backward.
USER_RESULTS = "ane_user_results"

_CHECKS = (aten._linalg_check_errors.default,)

#: Random operations of whose tensors only the shape counts.
_RANDOM = {
    aten.rand.default, aten.randn.default, aten.rand_like.default, aten.randn_like.default,
    aten.bernoulli.p, aten.uniform.default, aten.normal_functional.default, aten.exponential.default,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a result comes from: "input" number, "draw" number, "code" number, "host" number, "engine" number, "value".

    "copy": an input's number, where the result is a tensor of its own with the input's values. "sum": an input's
    number, to which the host adds the engine's result number `change`: a buffer keeps fp32's digits.
    """

    kind: str
    value: Any
    change: int = 0


@dataclass(frozen=True)
class Prepared:
    """A graph of engine work with what the host does around it.

    `graph` takes the inputs numbered `inputs`, then the draws numbered `draws`, then of what `codes` gives those
    numbered `used_codes`; `host` and `codes` (None: no work) take all inputs and all draws. `results` are those of
    the whole graph in order.
    """

    graph: GraphModule
    inputs: tuple[int, ...]
    draws: tuple[Callable[[], torch.Tensor], ...]
    used_draws: tuple[int, ...]
    host: GraphModule | None
    results: tuple[Source, ...]
    notes: tuple[str, ...]
    codes: GraphModule | None = None
    used_codes: tuple[int, ...] = ()


def partition(
    joint: GraphModule, inputs: object, *, num_fwd_outputs: int, **options: object
) -> tuple[GraphModule, GraphModule]:
    """AOTAutograd's forward and backward; indices that the engine's rules do without are not passed on."""
    joint = real_graph(joint)
    _drop_checks(joint.graph)
    _spell_out_dropout(joint.graph)
    for node in joint.graph.nodes:
        if str(node.target) in ACCEPTS["absent"] and "backward" in str(node.target):
            node.args = (*node.args[:-1], node.args[1])
    drop_cancelled(joint.graph)
    _rewrite(joint.graph)
    results = cast("Sequence[object]", joint.graph.output_node().args[0])
    changed = changed_inputs()
    mark_ends(joint.graph, results[changed:num_fwd_outputs], kept=results[:changed])
    forward, backward = default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
    forward.meta[USER_RESULTS] = num_fwd_outputs
    given = cast("Sequence[object]", forward.graph.output_node().args[0])[num_fwd_outputs:]
    kept = {n.name: number for number, n in enumerate(given, num_fwd_outputs) if isinstance(n, Node)}
    places = (n.name for n in backward.graph.nodes if n.op == "placeholder")
    forward.meta[KEPT] = backward.meta[KEPT] = Kept({i: kept[n] for i, n in enumerate(places) if n in kept})
    return forward, backward


def _rewrite(graph: Graph) -> None:
    """The forms of the range pass that need no magnitudes."""
    count_in_floats(graph)
    cut_far_codes(graph)
    scale_rows(graph)


class _Placing(torch.fx.Interpreter):
    """Runs a graph, and says of each node where the user's code has it."""

    def __init__(self, module: GraphModule, place: Place) -> None:
        super().__init__(module)
        self._place = place

    def run_node(self, n: Node) -> object:
        self._place.text = n.meta.get(META_KEY)
        return super().run_node(n)


def real_graph(module: GraphModule) -> GraphModule:
    """A graph within which there are complex numbers, on pairs of real ones (`capture.rewrites.complexes`).

    Raises: UnsupportedModel for complex tensors that go in or come out.
    """
    nodes = [n for n in module.graph.nodes if _is_complex(n)]
    if not nodes:
        return module
    _note_sources(module.graph)
    output = module.graph.output_node()
    ends = [n for n in nodes if n.op == "placeholder" or output in n.users]
    if ends:
        found = [
            Finding(n.meta.get(META_KEY) or n.name, "complex", "is complex outside of what is compiled.",
                    "Keep a real tensor [..., 2] (torch.view_as_real), and call torch.view_as_complex on it within.")
            for n in ends
        ]  # fmt: skip
        raise UnsupportedModel("torch.compile: parameters, inputs and results must be real:", found)
    place, inputs = Place(), [n for n in module.graph.nodes if n.op == "placeholder"]
    runner = _Placing(module, place)
    with without_modes(), torch.no_grad():
        values = {n.name: torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in inputs}
        given = output.args[0]
        kept = [i for i, n in enumerate(given) if isinstance(n, Node)]  # type: ignore[arg-type]

        def results(*tensors: torch.Tensor) -> list[torch.Tensor]:
            found = runner.run(*tensors, enable_io_processing=False)
            return [found[i] for i in kept]

        traced = trace(results, values, decomposition_table(), place)
    for new, old in zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True):
        new.meta = {**old.meta, **{k: v for k, v in new.meta.items() if k != "val"}}
    ending = traced.graph.output_node()
    new = dict(zip(kept, ending.args[0], strict=True))  # type: ignore[arg-type]
    ending.args = (tuple(new.get(i, n) for i, n in enumerate(given)),)  # type: ignore[arg-type]
    ending.meta = dict(output.meta)
    return traced


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return any(
        isinstance(v, torch.Tensor) and v.is_complex()
        for v in (value if isinstance(value, (list, tuple)) else (value,))
    )


def prepare_graph(module: GraphModule, changed: int = 0, integers: bool = False) -> Prepared:
    """Split `module` (changed in place) into the engine's part and the host's; with `integers` those that are
    computed from inputs of integers alone are the host's, too.

    The first `changed` results are new values of inputs: of those the engine gives what is added, where the graph
    shows it (`capture.range.changes`).
    """
    module = real_graph(module)
    graph = module.graph
    _note_sources(graph)
    _drop_checks(graph)
    _spell_out_dropout(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    draws = _take_out_draws(module, inputs)
    given = list(graph.output_node().args[0])  # type: ignore[arg-type]
    simplify(graph)
    _rewrite(graph)
    places = {node: Source("input", number) for number, node in enumerate(inputs)}
    places |= {node: Source("draw", number) for number, (node, _) in enumerate(draws)}
    codes, code_module = take_out_codes(module, list(places)) if integers else ([], None)
    places |= {node: Source("code", number) for number, node in enumerate(codes)}
    results: list[Source] = []
    engine: list[Node] = []
    host: list[Node] = []
    changes = changes_of(graph, inputs, changed)
    for number, (before, result) in enumerate(zip(given, graph.output_node().args[0], strict=True)):  # type: ignore[arg-type]
        if number in changes:
            old, change = changes[number]
            results.append(Source("sum", places[old].value, len(engine)))
            engine.append(change)
        elif not isinstance(result, Node):
            results.append(Source("value", result))
        elif result in places:
            copied = before is not result and places[result].kind == "input"
            results.append(Source("copy", places[result].value) if copied else places[result])
        else:
            kind, chosen = ("host", host) if _only_integers(result) else ("engine", engine)
            results.append(Source(kind, len(chosen)))
            chosen.append(result)
    host_module = _host_module(module, [*inputs, *(node for node, _ in draws)], host) if host else None
    graph.output_node().args = (tuple(engine),)
    simplify(graph)
    used = [node for node in places if node.users]
    for node in places:
        if not node.users:
            graph.erase_node(node)
    module.recompile()
    numbers = {
        kind: tuple(places[n].value for n in used if places[n].kind == kind)
        for kind in ("input", "draw", "code")
    }
    notes = [f"{len(draws)} random tensors drawn"] if draws else []
    notes += [f"{len(host)} integer results computed"] if host else []
    notes += [f"{len(codes)} tensors of integers computed from those of the batch"] if codes else []
    functions = tuple(function for _, function in draws)
    return Prepared(
        module, numbers["input"], functions, numbers["draw"], host_module, tuple(results), tuple(notes),
        code_module, numbers["code"],
    )  # fmt: skip


def _note_sources(graph: Graph) -> None:
    """`module.path (file.py:line)` on every node that Dynamo knows it for."""
    for node in graph.nodes:
        path = _module_path(node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack"))
        line = last_line(node.meta.get("stack_trace"))
        if path or line:
            node.meta[META_KEY] = f"{path or 'model'} ({line})" if line else path


def _module_path(stack: Any) -> str:
    """`L['self'].conv1` -> `conv1` of the innermost module."""
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = path.replace("L['self'].", "").replace("L['self']", "").replace("_modules.", "")
    return path.replace("['", "").replace("']", "").strip(".")


def last_line(trace: str | None) -> str:
    """`File "net.py", line 7, in forward` -> `net.py:7` for the last frame outside torch."""
    frames = [line.strip() for line in (trace or "").splitlines() if line.strip().startswith("File ")]
    own = [line for line in frames if "/torch/" not in line and PACKAGE_FOLDER not in line]
    if not own:
        return ""
    file, line = own[-1].split('"')[1], own[-1].split("line ")[1].split(",")[0]
    return f"{file}:{line}"


def graph_fault(error: BaseException, line: str = "") -> UnsupportedModel:
    """An error that torch raised while a graph was made, compiled or calibrated, with the user's line if known."""
    where = line or last_line(str(error)) or place_of(error, torch.nn.Module()).partition(" (")[2].rstrip(")")
    fix = "See whether plain PyTorch runs it; if so, keep it out with torch.compiler.disable."
    return fault(error, where or "torch.compile", fix)


# -- Random numbers


def _drop_checks(graph: Graph) -> None:
    """Without the checks of values that PyTorch puts behind some operations: programs have no exceptions."""
    for node in list(graph.nodes):
        if node.target is with_effects and node.args[1] in _CHECKS:
            for user in list(node.users):
                user.replace_all_uses_with(node.args[0])
                graph.erase_node(user)
            graph.erase_node(node)


def _spell_out_dropout(graph: Graph) -> None:
    """`native_dropout(x, p)` -> `mask = bernoulli(1-p)`, `x * mask * 1/(1-p)`.

    Before partitioning, so that the one mask is kept for the backward graph and not drawn again.
    """
    for node in list(graph.nodes):
        if node.target is aten.native_dropout.default and node.args[2] is not False:
            x, p = node.args[0], float(node.args[1])
            output, kept = node.meta["val"]
            scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
            with graph.inserting_before(node):
                mask = graph.call_function(aten.bernoulli.p, (x, 1.0 - p))
                masked = graph.call_function(aten.mul.Tensor, (x, mask))
                result = graph.call_function(aten.mul.Tensor, (masked, scale))
                boolean = graph.call_function(aten._to_copy.default, (mask,), {"dtype": torch.bool})
            for new in (mask, masked, result, boolean):
                new.meta = {**node.meta, "val": kept if new is boolean else output}
            for user in list(node.users):
                user.replace_all_uses_with(result if user.args[1] == 0 else boolean)
                graph.erase_node(user)
            graph.erase_node(node)


def _take_out_draws(module: GraphModule, inputs: list[Node]) -> list[tuple[Node, Callable[[], torch.Tensor]]]:
    """Random nodes become placeholders after the inputs; returns each with what draws its value."""
    graph = module.graph
    found: list[tuple[Node, Callable[[], torch.Tensor]]] = []
    for node in [node for node in graph.nodes if _is_random(node)]:
        if node.users:
            drawing = _drawing(node) if node.target in _RANDOM else _running(module, node)
            placeholder = _placeholder(graph, inputs, len(found), node.meta["val"])
            node.replace_all_uses_with(placeholder)
            found.append((placeholder, drawing))
        graph.erase_node(node)
    return found


def _is_random(node: Node) -> bool:
    """Whether the host can draw the node's value: it depends on shapes, numbers and constants only."""
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(
        node.target, "tags", ()
    ):
        return False
    return node.target in _RANDOM or not any(n.op == "placeholder" for n in ancestors([node]))


def _running(module: GraphModule, node: Node) -> Callable[[], torch.Tensor]:
    """Computes the node and what it follows from (`randint`, `randperm`, `multinomial` of constant weights)."""
    part = _host_module(module, [], [node])
    return lambda: part()[0]


def _placeholder(graph: Graph, inputs: list[Node], number: int, value: object) -> Node:
    after = [node for node in graph.nodes if node.op == "placeholder"][-1] if inputs else None
    with graph.inserting_after(after):
        node = graph.placeholder(f"draw_{number}")
    node.meta["val"] = value
    return node


def _drawing(node: Node) -> Callable[[], torch.Tensor]:
    """Calls the node's op; a tensor among its arguments counts by its shape only."""

    def empty(argument: Any) -> Any:
        value = argument.meta["val"]
        return torch.empty(tuple(value.shape), dtype=value.dtype)

    args = torch.fx.node.map_arg(node.args, empty)
    keywords = {k: v for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")}
    target: Any = node.target
    return lambda: target(*args, **keywords)


# -- Integers


def _only_integers(node: Node, seen: set[Node] | None = None) -> bool:
    """Whether integers follow from integer inputs, masks, or input floats cut to integers, by integer operations."""
    first, seen = seen is None, seen or set()
    if node in seen:
        return True
    seen.add(node)
    value = node.meta.get("val")
    if node.op == "get_attr":
        value = getattr(node.graph.owning_module, str(node.target), value)
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        return False
    if first and value.dtype == torch.bool:
        return False
    sources = node.all_input_nodes
    if node.target is aten._to_copy.default and _is_moved_input(sources[0]):
        return True
    return all(_only_integers(source, seen) for source in sources)


def _is_moved_input(node: Node) -> bool:
    while len(node.all_input_nodes) == 1 and packet_name(node) in MOVES:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _host_module(module: GraphModule, inputs: list[Node], results: Iterable[Node]) -> GraphModule:
    """The ancestors of `results` as a module over all inputs."""
    results = tuple(results)
    wanted = ancestors(results)
    return part_of(
        module, inputs, [n for n in module.graph.nodes if n in wanted and n not in inputs], results
    )
