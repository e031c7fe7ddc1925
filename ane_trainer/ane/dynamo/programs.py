"""An AOTAutograd graph as a function that runs programs on a device.

The values of the first call, in full precision, say which values need a power of two (`capture.range`); a later call
whose results leave the range adds to them and is run again.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.capture.range.calibration import Magnitude
from ane_trainer.ane.capture.scaling import OVERFLOW
from ane_trainer.ane.capture.trace.sources import FAULTS, META_KEY
from ane_trainer.ane.capture.trace.torch_private import without_modes
from ane_trainer.ane.dynamo.codes import copy_of
from ane_trainer.ane.dynamo.ends import mark_ends, split_forward
from ane_trainer.ane.dynamo.engine_part import EnginePart
from ane_trainer.ane.dynamo.fallback import Segment, split
from ane_trainer.ane.dynamo.graphs import USER_RESULTS, Prepared, graph_fault, prepare_graph
from ane_trainer.ane.dynamo.joint import KEPT, Kept
from ane_trainer.ane.dynamo.options import Options
from ane_trainer.ane.dynamo.proof import Call, MeasuredGraph
from ane_trainer.ane.dynamo.report import record_of, report
from ane_trainer.ane.dynamo.torch_private import changed_inputs, make_boxed_func, one_at_a_time
from ane_trainer.ane.errors import DataError, NumericsWarning, UnsupportedModel
from ane_trainer.ane.mil.program import MAX_FP16

#: How often a graph's powers of two are chosen again, since a call's values left the range.
MOST_CALIBRATIONS = 16
#: A stored result of this magnitude or more is out of range.
_FULL = 65400.0
#: A value whose largest entry is below this share of the average one so far, or above this multiple of the largest, is
#: of another size.
_EMPTY, _LARGER = 2.0**-6, 8.0

Values = list[torch.Tensor]


def forward_function(
    module: GraphModule, example_inputs: Sequence[object], options: Options, role: str
) -> Callable[..., object]:
    """The compiler that AOTAutograd calls for forward (and inference) graphs."""
    del example_inputs
    users = int(module.meta.get(USER_RESULTS, 1 << 30))
    if role == "inference":
        results = cast("Sequence[object]", module.graph.output_node().args[0])
        changed = changed_inputs()
        mark_ends(module.graph, results[changed:], kept=results[:changed])
    end, kept = split_forward(module, users), module.meta.get(KEPT)
    function = GraphFunction(module, options, role)
    function.kept = kept
    if end is not None and kept is not None:
        ends = {i: number for i, (part, number) in enumerate(end.results) if part == "module"}
        kept.places = {n: ends[i] for n, i in kept.places.items() if i in ends}
    if end is not None:
        function.record.host += ("last activation computed",)

    def run(*inputs: object) -> list[object]:
        return function(inputs, users) if end is None else end.whole(function(inputs, end.users))

    return make_boxed_func(run)


class GraphFunction:
    """A graph on the engine, with the host's part of it."""

    def __init__(self, module: GraphModule, options: Options, role: str) -> None:
        self._dtypes = [_dtype(node) for node in module.graph.output_node().args[0]]  # type: ignore[union-attr]
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        shapes = tuple(tuple(node.meta["val"].shape) for node in placeholders if _tensor(node))
        changed = 0 if role == "backward" else changed_inputs()
        with without_modes():  # constants are to be real tensors
            spare = copy_of(module)
            try:
                self._prepared, self._segments, self._parts = _made(module, options, changed)
            except UnsupportedModel:
                if spare is None:
                    raise
                self._prepared, self._segments, self._parts = _made(spare, options, changed, integers=True)
        programs = [part.program for part in self._parts if part is not None]
        self.record = record_of(role, shapes, options, self._segments, programs, self._prepared.notes)
        report().programs.append(self.record)
        #: Models of one class share a function, in several threads, too.
        self.lock = threading.RLock()
        #: What the calls so far showed of each value, while the program's precision needs to know.
        self.found: dict[str, Magnitude] = {}
        self.calibrations = 0
        self.follows_gradients = False  # whether the sizes of incoming gradients count: they have no power
        self.kept: Kept | None = None  # of a forward graph: what its backward graph is to be compared with
        self._options, self._told = options, False
        nodes = self.engine_results()
        self._added = {nodes[s.change].name for s in self._prepared.results if s.kind == "sum"}
        self._shares = {n.name for n in nodes if n.target is torch.ops.aten._log_softmax.default}
        self._expected: Values = []  # the engine's results in full precision, after a calibration
        self._fills: set[int] = set()  # those of them that only stand for infinity where the engine has one

    def __call__(self, inputs: Sequence[Any], users: int) -> list[Any]:
        """The results; those from number `users` on stay in the engine's precision, for the backward graph."""
        with self.lock:
            values, known = self.values(inputs)
            try:
                engine = self.run_in_range(values)
            except DataError as error:
                lost = next(
                    (v for v in inputs if isinstance(v, torch.nn.Parameter) and not v.isfinite().all()), None
                )
                if error.code != "DATA106" or lost is None:
                    raise
                raise _lost_parameter(lost) from error
            results, compared = self.results(known | {"engine": engine}, users), self.expects
            self.prove(values, engine, users)
            if compared and self.kept is not None:
                nodes, sources = self.engine_results(), enumerate(self._prepared.results)
                engine_made = {i: (nodes[s.value], results[i]) for i, s in sources if s.kind == "engine"}
                self.kept.hold(self._prepared.graph, values, engine_made)
            return results

    def run_in_range(self, values: Values) -> Values:
        """The results of the engine's part, calibrated at the first call, and again where a call's leave the range."""
        if not self.calibrations and self.can_calibrate:
            self.calibrate(self.measured(values))
        results = self.run_or_none(values)
        if results is None or self.left_range(_FULL):
            if not self.can_calibrate:
                self.tell_of_sizes()
            elif self.calibrate(self.measured(values)):
                results = self.run_or_none(values)
            self._tell_of_saturation()
        return self.run_engine(values) if results is None else results

    def run_or_none(self, values: Values) -> Values | None:
        """None if a value that is fed is beyond what its port holds; the last attempt raises."""
        try:
            return self.run_engine(values)
        except DataError as error:
            if error.code == "DATA107" and self.widen(values):
                return self.run_or_none(values)
            if error.code != "DATA106" or not self.can_calibrate:
                raise
            return None

    def widen(self, values: Values) -> bool:
        """Recompile for whole numbers of this call that are larger than those so far; whether there are any."""
        names = {n.name: v for n, v in zip(self._placeholders(), values, strict=True)}
        parts = [part for part in self._parts if part is not None]
        with without_modes():
            widened = [part.widen(names, self.found) for part in parts] if self.can_calibrate else []
        return any(widened)

    @property
    def can_calibrate(self) -> bool:
        """Whether powers of two may still be chosen again."""
        return self._options.target.precision == "fp16" and self.calibrations < MOST_CALIBRATIONS

    def values(self, inputs: Sequence[Any]) -> tuple[Values, dict[str, Sequence[Any]]]:
        """What the engine's part is fed, and the results that are known without it by kind."""
        prepared = self._prepared
        draws = [draw() for draw in prepared.draws]
        host = prepared.host(*inputs, *draws) if prepared.host is not None else ()
        codes = prepared.codes(*inputs, *draws) if prepared.codes is not None else ()
        values = [inputs[i] for i in prepared.inputs] + [draws[i] for i in prepared.used_draws]
        values += [codes[i] for i in prepared.used_codes]
        return values, {"input": inputs, "copy": inputs, "draw": draws, "code": codes, "host": host}

    def results(self, sources: Mapping[str, Sequence[Any]], users: int) -> list[Any]:
        """The whole graph's results in order, those before number `users` in PyTorch's types."""
        found = []
        for number, (source, dtype) in enumerate(zip(self._prepared.results, self._dtypes, strict=True)):
            if source.kind == "sum":
                change = sources["engine"][source.change]
                found.append((sources["input"][source.value].detach() + change.float()).to(dtype))
                continue
            value = source.value if source.kind == "value" else sources[source.kind][source.value]
            if source.kind == "engine" and number >= users and source.value in self._fills:
                value = value.nan_to_num(
                    math.nan, MAX_FP16, -MAX_FP16
                )  # 1e10: infinity times a gradient of 0
            cast = isinstance(value, torch.Tensor) and source.kind == "engine" and number < users
            value = value.clone() if source.kind == "copy" else value
            found.append(value.to(dtype) if cast else value)
        return found

    def measured(self, values: Values) -> dict[str, Magnitude]:
        """The magnitudes of a call's values in PyTorch's precision."""
        with (
            one_at_a_time(),
            torch.no_grad(),
            without_modes(),
        ):  # torch.fx keeps what it interprets in a global
            run = MeasuredGraph(self._prepared.graph)
            nodes = self._placeholders()
            try:
                self._expected = run.run(
                    *(v.detach().to(n.meta["val"].dtype) for n, v in zip(nodes, values, strict=True))
                )
            except FAULTS as error:
                raise graph_fault(error) from error
        sizes = [run.found.get(node.name) for node in self.engine_results()]
        self._fills = {i for i, size in enumerate(sizes) if size is not None and size.masked}
        self._fills = {i for i in self._fills if bool(self._expected[i].isfinite().all())}
        return run.found

    def calibrate(self, found: Mapping[str, Magnitude]) -> bool:
        """Choose the powers of two for these magnitudes, later for those before as well; whether a program changed."""
        self.calibrations += 1
        known = self.found
        if self.calibrations > MOST_CALIBRATIONS * 3 // 4:  # calls of several sizes take turns: fit all
            found = {n: m.joined(known[n]) if n in known else m for n, m in found.items()}
        self.found = {n: m if m.peak or n not in known else known[n] for n, m in found.items()}
        with without_modes():
            changed = [part.calibrate(self.found) for part in self._parts if part is not None]
        return any(changed)

    def run_engine(self, values: Sequence[torch.Tensor]) -> Values:
        """The results of the engine's part."""
        names = dict(zip((n.name for n in self._placeholders()), values, strict=True))
        for segment, part in zip(self._segments, self._parts, strict=True):
            inputs = [names[name] for name in segment.inputs]
            if part is None:
                outputs = segment.run(inputs)
            else:
                outputs = part(inputs)
                self.record.dispatches += 1
            names.update(zip(segment.outputs, outputs, strict=True))
        return [names[node.name] for node in self.engine_results()]

    def engine_results(self) -> Sequence[Node]:
        """The nodes of the engine's results."""
        results: Any = self._prepared.graph.graph.output_node().args[0]
        return results  # type: ignore[no-any-return]

    def result_names(self) -> set[str]:
        """The names of the engine's results."""
        return {node.name for node in self.engine_results()}

    def followers(self, begins: Callable[[Node], bool]) -> set[str]:
        """The names of all nodes that depend on the chosen ones."""
        found: set[Node] = set()
        for node in self._prepared.graph.graph.nodes:
            if begins(node) or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return {node.name for node in found}

    def left_range(self, limit: float) -> bool:
        """Whether a value of the last run is stored beyond the limit, or of another size than those before."""
        parts = [part for part in self._parts if part is not None]
        return bool(self.beyond(limit)) or any(
            self._is_other(name, peak / scale, _LARGER if at is part.fed else math.inf)
            for part in parts
            for at in (part.fed, part.peaks)
            for name, peak, scale in at
        )

    def _is_other(self, name: str, peak: float, larger: float) -> bool:
        """Whether the largest entry of a value is far from what was found; gradients that come in have a power.

        What is added to buffers becomes smaller as averages settle, and then counts for less.
        """
        known = self.found.get(name)
        unlike = (
            name.startswith("tangents") and not self.follows_gradients
        ) or name in self._added  # any size
        if known is None or not _is_ordinary(known) or not 0.0 < peak < math.inf or unlike:
            return False
        return known.peak == 0.0 or peak < _EMPTY * known.rms or peak > larger * known.peak

    def beyond(self, limit: float) -> list[str]:
        """Results of the last run that are stored beyond the limit, or no numbers, where PyTorch's are finite.

        The logarithms of shares that are 0, of masked scores, count for nothing however low they are.
        """
        none = self._shares
        full = [n for n, peak, _ in self._peaks() if not peak < limit and not (n in none and peak == peak)]
        watched = (w for part in self._parts if part is not None for w in part.watched)
        full += [n for n, peak in watched if not peak < OVERFLOW]
        return [name for name in full if name not in self.found or _is_ordinary(self.found[name])]

    def _peaks(self) -> list[tuple[str, float, float]]:
        """Of the last run, by node: the largest stored entry, and the power of two that it is stored with."""
        return [p for part in self._parts if part is not None for p in part.peaks]

    def _tell_of_saturation(self) -> None:
        """Warn once if results are still beyond the range."""
        names = self.beyond(_FULL)
        if not names or self._told:
            return
        node = next(n for s in self._segments for n in s.graph.graph.nodes if n.name == names[0])
        self._tell(
            f"{node.meta.get(META_KEY) or node.name} ({self.record.role}): needs values below 65504; got larger ones "
            f"({node.target}). Results are saturated. Normalise the inputs, or scale the layer down."
        )

    def tell_of_sizes(self) -> None:
        """Warn once that sizes are no longer followed."""
        if self._options.target.precision == "fp16" and not self._told:
            self._tell(
                f"{self.record.role}: needs inputs and gradients of about one size; got {MOST_CALIBRATIONS} changes of "
                "size, and later ones are not followed. Normalise the inputs."
            )

    def tell_of_lost_values(self) -> None:
        """Warn once that values which the forward keeps for the backward are no numbers."""
        if not self._told:
            self._tell(
                f"{self.record.role}: values of the forward pass left fp16, and what was kept of them is infinite: the "
                "gradients are nan. Lower the learning rate, or normalise the inputs."
            )

    @property
    def expects(self) -> bool:
        """Whether the results in full precision are there to be compared with."""
        return bool(self._expected)

    def prove(
        self,
        values: Values,
        engine: Values,
        users: int = 1 << 30,
        scale: float = 1.0,
        kept: Kept | None = None,
    ) -> None:
        """Compare a call's results with those in full precision, if they are there; warn of more than fp16 costs.

        `engine` are the results for `values`, the incoming gradients among them times `scale`. With `kept` those of
        the forward graph and this one together are compared, too.
        """
        expected, self._expected = self._expected, []
        if not expected and kept is None:
            return
        numbers = [s.value for n, s in enumerate(self._prepared.results) if s.kind == "engine" and n < users]
        found = {i: engine[i].double() / scale for i in numbers
                 if engine[i].is_floating_point() and engine[i].numel()}  # fmt: skip
        graph = self._prepared.graph
        calls = [Call(graph, values, found, expected)] if expected else []
        with one_at_a_time(), without_modes():
            if kept is not None:
                calls.append(Call(*kept.joined(graph, self._prepared.inputs, values), found))
            text = "" if self._told else next(filter(None, (c.in_words(self.record.role) for c in calls)), "")
        if text:
            self._tell(text)

    def _tell(self, text: str) -> None:
        self._told = True
        warnings.warn(f"torch.compile: {text}", NumericsWarning, stacklevel=2)

    def _placeholders(self) -> list[Node]:
        return [node for node in self._prepared.graph.graph.nodes if node.op == "placeholder"]


def _is_ordinary(size: Magnitude) -> bool:
    """Whether no entry of a value is infinite, or stands for infinity."""
    return size.finite and not size.masked


def _tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _made(
    module: GraphModule, options: Options, changed: int, *, integers: bool = False
) -> tuple[Prepared, list[Segment], list[EnginePart | None]]:
    """A graph made ready, its segments, and their programs; `integers`: those of the batch's are the host's."""
    prepared = prepare_graph(module, changed, integers)
    segments = split(prepared.graph, options)
    return prepared, segments, [None if s.on_cpu else EnginePart(s.graph, options) for s in segments]


def _lost_parameter(parameter: torch.nn.Parameter) -> DataError:
    """What is wrong with a parameter that an update made nan."""
    wrong = parameter.numel() - int(parameter.isfinite().sum())
    return DataError(
        f"a parameter of shape {tuple(parameter.shape)}: needs finite numbers; got {wrong} that are nan or inf, which "
        "an update before wrote. Look in the loss for logarithms and roots of 0, or lower the learning rate.",
        code="DATA106",
    )


def _dtype(node: object) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
