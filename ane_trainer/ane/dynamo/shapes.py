"""One Dynamo graph, compiled once for each set of input shapes, within a stated budget.

The engine's programs have fixed shapes. Dynamo hands over a graph of symbolic sizes as soon as it has seen
two batch sizes; it is specialized here for each size that comes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils.weak import WeakIdKeyDictionary

from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.rewrites.selections import Selected
from ane_trainer.ane.capture.trace.sources import FAULTS
from ane_trainer.ane.capture.trace.tracer import tracing
from ane_trainer.ane.dynamo.assigned import as_writes
from ane_trainer.ane.dynamo.gradient import backward_function
from ane_trainer.ane.dynamo.graph_match import same_but_for_sizes, sizes_only
from ane_trainer.ane.dynamo.graphs import graph_fault, last_line, partition
from ane_trainer.ane.dynamo.options import Options
from ane_trainer.ane.dynamo.programs import forward_function
from ane_trainer.ane.dynamo.report import ProgramRecord, report
from ane_trainer.ane.dynamo.silence import tell_of_cpu
from ane_trainer.ane.dynamo.torch_private import (
    DynamicOutputShapeException,
    FakeTensorMode,
    aot_module_simplified,
    is_known,
    one_at_a_time,
    tracing_with,
)
from ane_trainer.ane.errors import Finding, ProgramError, UnsupportedModel, UsageError

Key = tuple[Any, ...]

#: First parameter -> function -> shapes it was compiled for, over all graphs that Dynamo makes of it. Dynamo
#: takes all models of one class for one function, so the parameter tells them apart.
_SHAPES: Any = WeakIdKeyDictionary()
#: Function -> its graphs that are alive.
_GRAPHS: dict[str, weakref.WeakSet[Specializer]] = {}
#: Marks the nodes that stand for the numbers a graph reads.
_READ = "ane_read"
_WITHOUT_PARAMETERS = torch.nn.Parameter(torch.empty(0))


def forget_shapes() -> None:
    """Dynamo forgot what it compiled: no function has been compiled for any shapes."""
    _SHAPES.clear()


class Specializer:
    """Callable in the graph's place; `function` identifies the user's function that the graph is of."""

    def __init__(self, graph: torch.fx.GraphModule, options: Options, function: str) -> None:
        self._graph, self._options, self._function = _prepared(graph), options, function
        self._reads = [
            i for i, n in enumerate(_placeholders(self._graph)) if any(_READ in u.meta for u in n.users)
        ]
        self._by_value = False  # whether the numbers that the graph reads are compiled in
        self._compiled: dict[Key, Callable[..., object]] = {}
        self._earlier: list[Specializer] = []
        family = _GRAPHS.setdefault(function, weakref.WeakSet())
        if sizes_only(graph.graph):
            alike = [s for s in family if s._options == options]
            self._earlier = [s for s in alike if same_but_for_sizes(s._graph.graph, graph.graph)]
        family.add(self)

    def __call__(self, *inputs: object) -> Any:
        """The graph's results; compiled first if these shapes are new."""
        key = (torch.is_grad_enabled(), *(_description(value) for value in inputs))
        if self._by_value:
            key = (*key, *(float(inputs[i]) for i in self._reads))  # type: ignore[arg-type]
        function = self._compiled.get(key)
        if function is None:
            with one_at_a_time():
                function = self._compiled[key] = self._compiled.get(key) or self._find(key, inputs)
        return function(*inputs)

    def _find(self, key: Key, inputs: Sequence[object]) -> Callable[..., object]:
        """What an earlier graph of fixed sizes has for these inputs, else a new compilation."""
        tensors_only = (key[0], *(item for item in key[1:] if isinstance(item, tuple)))
        for earlier in self._earlier:
            known = earlier._compiled.get(tensors_only)
            if known is not None:
                return lambda *values: known(*(v for v in values if isinstance(v, torch.Tensor)))
        if self._by_value:
            return self._compile_values(inputs)
        self._count(inputs)
        try:
            return self._compile(self._graph, list(inputs))
        except DynamicOutputShapeException as error:
            return self._without_engine(str(error).splitlines()[0], inputs)
        except (ProgramError, UnsupportedModel) as error:
            if not all(v.numel() for v in inputs if isinstance(v, torch.Tensor)):
                reason, fix = "is without elements, which no program takes.", "Leave empty batches out."
                return self._in_pytorch(Finding("an input", "shape", reason, fix), inputs)
            if isinstance(error, ProgramError):
                raise
            if self._reads:
                self._by_value = True
                return self._compile_values(inputs)
            if not _selects(self._graph) or error.code != "ANE300":
                raise
            return self._without_engine(error.findings[0].op, inputs)
        except FAULTS as error:
            if Selected.__name__ in str(error):  # what a mask selects is a result of the graph
                return self._without_engine("x[mask]", inputs)
            if not self._reads:
                raise graph_fault(error) from error
            self._by_value = True
            return self._compile_values(inputs)

    def _compile_values(self, inputs: Sequence[object]) -> Callable[..., object]:
        """The graph for the present values of the numbers that it reads: an operation takes them as it is compiled.

        Raises: UsageError ANE114 beyond recompile_limit.
        """
        values = [float(inputs[i]) for i in self._reads]  # type: ignore[arg-type]
        limit = self._options.recompile_limit
        if len(self._compiled) >= limit:
            raise UsageError(
                f"torch.compile: needs at most {limit} values of a number that {_reader(self._graph)} takes (each is "
                f"a program of its own); got another one, {values[0]:g}. Change it less often, or raise the limit: "
                'options={"recompile_limit": ...}.',
                code="ANE114",
            )
        try:
            return self._compile(_with_values(self._graph, values), list(inputs))
        except FAULTS as error:
            raise graph_fault(error) from error

    def _without_engine(self, operation: str, inputs: Sequence[object]) -> Callable[..., object]:
        """The graph in PyTorch, for one whose tensors have shapes that depend on data; warns."""
        found = Finding(
            _last_place(self._graph), operation, "gives a shape that depends on data.",
            "Keep the shape: torch.where or a product with the mask; or use compile_step.",
        )  # fmt: skip
        return self._in_pytorch(found, inputs)

    def _in_pytorch(self, found: Finding, inputs: Sequence[object]) -> Callable[..., object]:
        """The graph in PyTorch for these inputs; warns of the reason."""
        tell_of_cpu(str(found), "")
        shapes = tuple(tuple(v.shape) for v in inputs if isinstance(v, torch.Tensor))
        chip, device = self._options.target.chip or "", self._options.target.device
        report().programs.append(ProgramRecord("forward", shapes, chip, device, 0, 0, 0.0, (), (str(found),)))
        return self._graph

    def _count(self, inputs: Sequence[object]) -> None:
        shapes = tuple(tuple(v.shape) for v in inputs if isinstance(v, torch.Tensor))
        parameters = (v for v in inputs if isinstance(v, torch.nn.Parameter))
        functions = _SHAPES.setdefault(next(parameters, _WITHOUT_PARAMETERS), {})
        seen: set[Key] = functions.setdefault(self._function, set())
        if shapes not in seen and len(seen) >= self._options.recompile_limit:
            raise UsageError(
                f"torch.compile: needs at most {self._options.recompile_limit} different input shapes (each is "
                f"a program of its own); got another one, {_varying(shapes, seen)}. Pad or drop odd batches, or "
                'raise it: options={"recompile_limit": ...}.',
                code="ANE114",
            )
        seen.add(shapes)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        if torch.is_inference_mode_enabled():  # tensors made there cannot be traced
            with torch.inference_mode(mode=False), torch.no_grad():
                return self._compile(graph, [_ordinary(v) for v in inputs])
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # constants made in the model are real tensors
        fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in inputs]
        with tracing(is_known), tracing_with(mode):
            compiled: Callable[..., object] = aot_module_simplified(
                graph,
                fakes,
                fw_compiler=functools.partial(forward_function, options=self._options, role="forward"),
                bw_compiler=functools.partial(backward_function, options=self._options),
                inference_compiler=functools.partial(
                    forward_function, options=self._options, role="inference"
                ),
                partition_fn=partition,
                decompositions=decomposition_table(),
                ignore_shape_env=True,
            )
        return compiled


def _ordinary(value: object) -> object:
    """A tensor that was made in inference mode as one that was not."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _last_place(graph: torch.fx.GraphModule) -> str:
    """The user's line of the last operation that takes a mask as an index."""
    names = ("getitem", "setitem", "masked_select", "nonzero", "unique", "where")
    indexing = [n for n in graph.graph.nodes if getattr(n.target, "__name__", n.target) in names]
    lines = [last_line(n.meta.get("stack_trace")) for n in indexing]
    return next((line for line in reversed(lines) if line), "torch.compile")


def _without_reads(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Numbers that change from call to call, which Dynamo hands over as tensors to be read, stay tensors.

    before: `tau = L_tau_.item(); y = x / tau`      after: `tau = L_tau_.to(torch.float32); y = x / tau`

    Also in the graphs of an `autograd.Function`'s forward and backward.
    """
    for part in [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]:
        for node in list(part.graph.nodes):
            if node.op == "call_method" and node.target == "item" and _is_float_input(node.args[0]):
                with part.graph.inserting_before(node):
                    kept = part.graph.call_method("to", (node.args[0], torch.float32))
                kept.meta = {**node.args[0].meta, _READ: True}
                node.replace_all_uses_with(kept)
                part.graph.erase_node(node)
        part.recompile()
    return module


def _prepared(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """What Dynamo hands over in forms that AOTAutograd takes, changed in place."""
    return _without_counts(_without_reads(as_writes(graph)))


def _placeholders(module: torch.fx.GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _with_values(module: torch.fx.GraphModule, values: Sequence[float]) -> torch.fx.GraphModule:
    """A copy in which the numbers that it reads are these."""
    graph, copies = torch.fx.Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    reads = [p for p in _placeholders(module) if any(_READ in u.meta for u in p.users)]
    for placeholder, value in zip(reads, values, strict=True):
        for read in [copies[u] for u in placeholder.users if _READ in u.meta]:
            for user in list(read.users):
                number = functools.partial(_number_for, read, value)
                user.args = torch.fx.node.map_arg(user.args, number)
                user.kwargs = torch.fx.node.map_arg(user.kwargs, number)
            graph.erase_node(read)
    return torch.fx.GraphModule(module, graph)


def _number_for(read: Node, value: float, argument: Node) -> Node | float:
    return value if argument is read else argument


def _reader(module: torch.fx.GraphModule) -> str:
    """The first operation that takes a number that is read, with its line."""
    read = next(n for n in module.graph.nodes if _READ in n.meta)
    user = next(iter(read.users), read)
    name, line = getattr(user.target, "__name__", user.target), last_line(user.meta.get("stack_trace"))
    return f"{name} ({line})" if line else str(name)


def _without_counts(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Without what Dynamo asserts of the number of rows that a mask selects: the rows stay where they are."""
    graph = module.graph
    for node in reversed(graph.nodes):
        node.meta.pop("unbacked_bindings", None)
        asserts = "_assert_scalar" in str(node.target) or "sym_constrain" in str(node.target)
        if node.op == "call_function" and not node.users and (asserts or _is_number(node)):
            graph.erase_node(node)
    module.recompile()
    return module


def _is_number(node: Any) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat))


def _selects(module: torch.fx.GraphModule) -> bool:
    """Whether a graph takes a mask as an index."""
    names = {getattr(n.target, "__name__", n.target) for n in module.graph.nodes}
    return bool(names & {"getitem", "setitem", "masked_select"})


def _is_float_input(node: Any) -> bool:
    value = node.meta.get("example_value")
    return node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_floating_point()


def _description(value: object) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), value.dtype, value.requires_grad


def _varying(shapes: Key, seen: set[Key]) -> str:
    """The shapes that no compiled program has at their place."""
    for other in seen:
        differing = [a for a, b in zip(shapes, other, strict=False) if a != b]
        if differing:
            return ", ".join(str(list(shape)) for shape in differing[:3])
    return f"{len(shapes)} tensors"
