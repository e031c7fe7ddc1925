"""Float buffers that a step changes by less than fp16 resolves, in two terms as weights are; and their ports.

    before: `mean' = mean * 0.999 + x.mean(0) * 0.001`
    after:  `change = (x.mean(0) - mean) * 0.001`, added to `mean + residual / 2^k` by `two_term_add`

A running average of momentum 0.001 stands still in fp16 once its change is below 2^-12 of it, and a count above 2048
does. Which buffers need it is measured: those of which a step keeps 96 % or more. PyTorch's batch norms keep 90 %.
Costs ten ops for each such buffer, and none for others. Test: `tests/ane/dispatch/test_buffers.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.capture.optimizers.rule import RESIDUAL
from ane_trainer.ane.capture.parts import part_of
from ane_trainer.ane.capture.ports import identifier, unique
from ane_trainer.ane.capture.range.changes import change_of
from ane_trainer.ane.capture.range.editing import Editor, aten, shape_of
from ane_trainer.ane.capture.range.running import InOrder
from ane_trainer.ane.capture.trace.simplify import drop_dead
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.stages import Port

Tensors = dict[str, torch.Tensor]

#: Share of itself that a step takes from a buffer, up to which it changes slowly.
_SLOW = 0.04
#: How many steps are looked ahead, and to how many a steady growth is continued.
_AHEAD, _FAR = 16, 2.0**16
#: Magnitude, as stored, to which a buffer's second term is scaled: room for a change 2^8 times as large.
_WANTED_LOG2 = 8
_PROBE = 1e-3
_RUNNING = (
    torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm,
    torch.nn.InstanceNorm1d, torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d,
)  # fmt: skip


@dataclass(frozen=True)
class _Update:
    """A buffer's new value in the graph, what gates it, and the number of the result."""

    port: Port
    old: Node
    new: Node
    gate: Node
    result: int


@dataclass(frozen=True)
class Carried:
    """A step's ports, with those of second terms. `states`: buffers some steps later, by port name, and far on."""

    inputs: tuple[Port, ...]
    outputs: list[Port]
    targets: frozenset[str] = frozenset()
    states: tuple[Tensors, ...] = ()

    def values(self, first: Tensors) -> Tensors:
        """Those of a first step, with second terms."""
        return first | {p.name: torch.zeros(p.shape) for p in self.inputs if p.name not in first}

    def later(self, first: Tensors) -> list[Tensors]:
        """The same with the buffers of later steps."""
        return [self.values(first) | state for state in self.states]


def carry_slow_buffers(
    graph: GraphModule, inputs: tuple[Port, ...], outputs: list[Port], values: Tensors, model: torch.nn.Module
) -> Carried:
    """Give buffers that change slowly a second term, in place, and look where buffers get to.

    `values` are those of the inputs in the first step. PyTorch's norms are looked at if their momentum is small.
    """
    statistics = _statistics(model)
    named = {p.target for p in inputs if p.role == "state" and statistics.get(p.target, 0.0) <= _SLOW}
    found = list(_updates(graph, inputs, outputs, named))
    if not found:
        return Carried(inputs, outputs)
    own = [u for u in found if u.port.target not in statistics]
    later = _look_ahead(graph, found, values, _AHEAD if own else 1)
    shares = [_kept_shares(graph, found, values), _kept_shares(graph, found, values | later)]
    best = {u.port.name: max(s.get(u.port.name, 0.0) for s in shares) for u in found}
    far = {n: _far(values[n], value, best[n], _AHEAD if own else 1) for n, value in later.items()}
    peaks = {n: max(_peak(state[n]) for state in (values, later, far)) for n in later}
    slow = [u for u in found if 1.0 - _SLOW <= best[u.port.name] <= 1.0 + _SLOW]
    new_inputs, new_outputs, targets = _in_two_terms(graph, inputs, outputs, slow, peaks)
    return Carried(new_inputs, new_outputs, targets, (later, far) if own else ())


def _statistics(model: torch.nn.Module) -> dict[str, float]:
    """The buffers of PyTorch's batch and instance norms, with the share of the newest batch."""
    return {
        f"{path}.{name}" if path else name: 1.0 if module.momentum is None else module.momentum
        for path, module in model.named_modules()
        if isinstance(module, _RUNNING)
        for name in ("running_mean", "running_var")
    }


def _peak(value: torch.Tensor) -> float:
    return float(value.abs().amax()) if value.numel() else 0.0


def _updates(
    graph: GraphModule, inputs: Sequence[Port], outputs: Sequence[Port], names: Collection[str]
) -> Iterator[_Update]:
    """The updates `where(fits, new, old)` of the named buffers; those of parameters' state are none."""
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    held = {p.target: (p, n) for p, n in zip(inputs, nodes, strict=True) if p.target in names}
    results = graph.graph.output_node().args[0]
    for place, (port, result) in enumerate(zip(outputs, results, strict=True)):  # type: ignore[arg-type]
        if port.role != "state" or port.target not in held or not isinstance(result, Node):
            continue
        chosen = result
        while chosen.target is aten.view.default:
            chosen = chosen.args[0]  # type: ignore[assignment]
        if chosen.target is aten.where.self:
            gate, new, _ = chosen.args
            if isinstance(new, Node) and isinstance(gate, Node):
                yield _Update(*held[port.target], new, gate, place)


def _runner(graph: GraphModule, found: Sequence[_Update]) -> Callable[[Tensors], Tensors]:
    """Buffers' next values by port name from those of the inputs."""
    module, _ = part_of(graph, [u.new for u in found], {})
    placed = [n.name for n in module.graph.nodes if n.op == "placeholder"]

    def run(values: Tensors) -> Tensors:
        with torch.no_grad():
            results = InOrder(module).run(*(values[n] for n in placed))
        return {u.port.name: r.reshape(u.port.shape).clone() for u, r in zip(found, results, strict=True)}

    return run


def _look_ahead(graph: GraphModule, found: Sequence[_Update], values: Tensors, steps: int) -> Tensors:
    """The buffers after some steps on the same batch."""
    run, state = _runner(graph, found), dict[str, torch.Tensor]()
    for _ in range(steps):
        state = run(values | state)
    return state


def _kept_shares(graph: GraphModule, found: Sequence[_Update], values: Tensors) -> dict[str, float]:
    """Of each buffer, the share of its old value that is in the new one: by moving it a little."""
    shares, run = {}, _runner(graph, found)
    moves = {
        u.port.name: _PROBE * (values[u.port.name].abs() + _peak(values[u.port.name]) + 1e-6) for u in found
    }
    for name, move in moves.items():
        low, high = (run(values | {name: values[name] + sign * move})[name].double() for sign in (-1.0, 1.0))
        slope = (high - low) / (2.0 * move.double())
        if slope.numel() and bool(torch.isfinite(slope).all()):
            shares[name] = float(slope.median())
    return shares


def _far(first: torch.Tensor, later: torch.Tensor, share: float, steps: int) -> torch.Tensor:
    """Where a buffer gets to that goes on like this: an average to its limit, a sum on and on."""
    taken = max(1.0 - share, 1.0 / _FAR)
    return later if taken > _SLOW else first + (later - first) * max(1.0 / (taken * steps), 1.0)


def _in_two_terms(
    graph: GraphModule,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    found: Sequence[_Update],
    peaks: Mapping[str, float],
) -> tuple[tuple[Port, ...], list[Port], frozenset[str]]:
    """The ports with those of second terms, and the buffers that have one: those whose change the graph shows."""
    new_inputs, new_outputs = list(inputs), list(outputs)
    output, editor = graph.graph.output_node(), Editor(graph.graph)
    results = list(output.args[0])  # type: ignore[arg-type]
    taken = {p.name for p in (*inputs, *outputs)}
    for update in found:
        editor.here, editor.marks = update.new.next, {META_KEY: update.new.meta.get(META_KEY)}
        change = change_of(editor, update.new, update.old)
        if change is None:
            continue
        port = _residual_port(update.port, peaks[update.port.name], taken)
        taken |= {port.name, f"{port.name}_next"}
        last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
        with graph.graph.inserting_after(last):
            residual = graph.graph.placeholder(port.name)
        residual.meta["val"] = update.old.meta["val"]
        editor.here, editor.marks = output, {META_KEY: "loss scaling"}
        results[update.result], lo = _two_terms(editor, update, residual, change, port.scale)
        results.append(lo)
        new_inputs.append(port)
        new_outputs.append(dataclasses.replace(port, name=f"{port.name}_next"))
    output.args = (results,)
    drop_dead(graph.graph)
    graph.recompile()
    targets = frozenset(p.target.removesuffix(f"/{RESIDUAL}") for p in new_inputs[len(inputs) :])
    return tuple(new_inputs), new_outputs, targets


def _residual_port(buffer: Port, peak: float, taken: Collection[str]) -> Port:
    exponent = _WANTED_LOG2 - math.ceil(math.log2(peak)) if peak else 0
    target = f"{buffer.target}/{RESIDUAL}"
    port = Port(identifier(target), buffer.shape, "state", target, 2.0 ** max(-12, min(12, exponent)))
    return unique([*(Port(name, (), "state") for name in taken), port])[-1]


def _two_terms(
    editor: Editor, update: _Update, residual: Node, change: Node, scale: float
) -> tuple[Node, Node]:
    """The next value and its residual; both stay where the gradients did not fit."""
    shape = update.port.shape
    delta = editor.view(editor.times(change, scale), shape)
    total = editor.emit(aten.add.Tensor, residual, delta)
    new = editor.emit(aten.add.Tensor, update.old, editor.times(total, 1.0 / scale))
    rounded = editor.emit(aten.sub.Tensor, new, update.old)
    rest = editor.emit(aten.sub.Tensor, total, editor.times(rounded, scale))
    gate = update.gate if shape_of(update.gate) else editor.view(update.gate, (1,) * len(shape))
    return (
        editor.emit(aten.where.self, gate, new, update.old),
        editor.emit(aten.where.self, gate, rest, residual),
    )
