"""Graph editing shared by the passes over a captured graph: new nodes with shape and source, and queries on a node."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument, map_arg

from ane_trainer.ane.capture.range.switch import CONSTANTS, note
from ane_trainer.ane.capture.trace.sources import META_KEY

Shape = tuple[int, ...]
aten = torch.ops.aten

#: Sources of the nodes behind the backward pass: their numbers are in units of their own (`optimizers/rules.py`).
UPDATE = ("optimizer ", "loss scaling", "gradient ")


#: Meta key of values that may vanish: epsilons.
TINY = "ane_tiny"


class Editor:
    """Makes nodes in front of `here`, with its source and the shape that the operation gives."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.here: Node = next(iter(graph.nodes))
        self.marks: dict[str, object] = {}
        #: What operations give, by what they are given: the same for every layer that repeats.
        self._results: dict[object, torch.Tensor] = {}

    def emit(self, target: Callable[..., object], *args: Argument) -> Node:
        """`target(*args)` as a node."""
        with self.graph.inserting_before(self.here):
            node = self.graph.call_function(target, args)
        node.meta = {k: v for k, v in self.here.meta.items() if k not in ("val", TINY)} | self.marks
        kind = (target, _kind(args))
        found = self._results.get(kind)
        if found is None:
            of = aten.reshape.default if target is aten.view.default else target  # a program has no strides
            found = _without_data(of(*map_arg(args, lambda n: _without_data(n.meta["val"]))))
            self._results[kind] = found
        node.meta["val"] = found
        return node

    def view(self, node: Node, shape: Shape) -> Node:
        """The node's numbers in another shape."""
        return node if shape_of(node) == shape else self.emit(aten.view.default, node, list(shape))

    def times(self, node: Node, factor: float) -> Node:
        """The node times a number that fp16 may not hold: at most two factors that it holds."""
        if factor == 1.0:
            return node
        parts = split_factor(factor)
        if len(parts) > 1:
            place = str(self.here.meta.get(META_KEY, self.here.name))
            note(
                CONSTANTS,
                place,
                "mul",
                f"times {factor:.3g} as {len(parts)} factors",
                "fp16 does not hold it",
            )
        for part in parts:
            node = self.emit(aten.mul.Tensor, node, part)
        return node


def _kind(argument: Argument) -> object:
    """What of an argument the shape, strides and type of a result depend on."""
    if isinstance(argument, Node):
        value = argument.meta["val"]
        return value.shape, value.stride(), value.dtype
    if isinstance(argument, (list, tuple)):
        return type(argument), *map(_kind, argument)
    return type(argument), argument  # 1, 1.0 and True are equal


def _without_data(value: object) -> torch.Tensor:
    """A tensor's shape, strides and type."""
    assert isinstance(value, torch.Tensor)
    if value.is_meta:
        return value
    return torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")


def split_factor(factor: float) -> list[float]:
    """Factors of fp16's normal range whose product this is, the one with the significand first."""
    significand, power = math.frexp(factor)
    if -13 <= power <= 15:
        return [factor]
    half = max(-13, min(15, power - power // 2))
    return [math.ldexp(significand, half), *_powers(power - half)]


def _powers(power: int) -> list[float]:
    parts = []
    while power:
        part = max(-14, min(15, power))
        parts.append(2.0**part)
        power -= part
    return parts


def shape_of(node: Node) -> Shape:
    """The shape of a node's tensor; () for what is no tensor."""
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def is_float(node: object) -> bool:
    """Whether a node holds floating-point numbers."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def in_update(node: Node) -> bool:
    """Whether the node belongs to what happens to finished gradients."""
    return str(node.meta.get(META_KEY, "")).startswith(UPDATE)


def number(value: object) -> float | None:
    """A Python number as float, None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def dims_of(node: Node) -> list[int] | None:
    """The axes that a sum or mean node reduces, counted from the front; None if it is neither."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node):
        return None
    rank = len(shape_of(source))
    if node.target in (aten.sum.default, aten.mean.default):
        return list(range(rank))
    if node.target in (aten.sum.dim_IntList, aten.mean.dim):
        given = node.args[1] if len(node.args) > 1 else None
        axes = [given] if isinstance(given, int) else given
        if axes is None or (isinstance(axes, (list, tuple)) and not axes):
            return list(range(rank))
        assert isinstance(axes, (list, tuple))
        return sorted(int(a) % max(rank, 1) for a in axes if isinstance(a, int))
    return None


def keeps_dims(node: Node) -> bool:
    """Whether a sum or mean node keeps the axes that it reduces."""
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def padded(shape: Sequence[int], rank: int) -> Shape:
    """A shape with axes of extent 1 in front up to this rank."""
    return (1,) * (rank - len(shape)) + tuple(shape)
