"""Nodes stored with a power of two, arguments rescaled to another, and how far the factors of a product may move.

`of[node]` is the exponent e of a node that holds its value times 2^-e. The rules that choose exponents are in
`exponents.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from ane_trainer.ane.capture.range.bands import LARGEST, Bands
from ane_trainer.ane.capture.range.calibration import Magnitude
from ane_trainer.ane.capture.range.editing import aten, number, shape_of
from ane_trainer.ane.capture.scaling import OVERFLOW

#: Root mean square error of one product in the accumulator: it is rounded to 2^-16.
PRODUCT_ERROR = 2.0**-16 / math.sqrt(12.0)
#: Share of a contraction's result up to which that error is left alone; sums to which they are brought instead.
TOLERATED, WANTED_SUM, LARGEST_SUM = 2.0**-8, 2.0**10, 2.0**14
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Shift:
    """One value that is carried with a power of two: the node's name, its source, the exponent, and why."""

    node: str
    source: str
    exponent: int
    reason: str = ""


class Shifting(Bands):
    """A graph's exponents by node, 0 where one is missing."""

    def __init__(self, graph: Graph, found: Mapping[str, Magnitude]) -> None:
        super().__init__(graph, found)
        self.of: dict[Node, int] = {}
        self.parts: dict[Node, list[int]] = {}  # of operations with several results
        self.shifts: list[Shift] = []
        self.changed = False  # whether a node has another form than it had
        self._peaks: set[Node] = set()
        self._shifted: dict[tuple[Node, int], Node] = {}

    def emit(self, target: Callable[..., object], *args: Argument) -> Node:
        """`target(*args)` as a node; the graph then is another one, also where no value carries an exponent."""
        self.changed = True
        return super().emit(target, *args)

    def at(self, argument: Argument, exponent: int) -> Argument:
        """A node argument stored with this exponent, whole numbers then as floats; a number divided by 2^exponent."""
        value = number(argument)
        if value is not None and exponent:
            return math.ldexp(value, -exponent) if math.isfinite(value) else value
        if not isinstance(argument, Node):
            return argument
        shift = self.of.get(argument, 0) - exponent
        if shift == 0 or not isinstance(argument.meta.get("val"), torch.Tensor):
            return argument
        if (argument, exponent) not in self._shifted:
            self._shifted[argument, exponent] = self._with_overflow(
                argument, self.times(argument, 2.0**shift)
            )
        return self._shifted[argument, exponent]

    def _with_overflow(self, peak: Node, value: Node) -> Node:
        """The largest entry of a gradient that is stored larger than it is: beyond fp16 if what is stored is."""
        if peak not in self._peaks:
            return value
        beyond = self.emit(aten.full.default, list(shape_of(peak)), LARGEST_HALF)
        return self.emit(aten.where.self, self.emit(aten.ge.Scalar, peak, OVERFLOW), beyond, value)

    def stored_larger(self) -> list[Node]:
        """Values that are stored larger than they are and then taken back: what leaves fp16 there looks small again."""
        larger = (v for v, exponent in self._shifted if self.of.get(v, 0) < exponent)
        return [v for v in dict.fromkeys(larger) if v not in self._peaks]

    def raised(self) -> Iterator[tuple[Node, Node]]:
        """Values with a copy that is stored larger than they are, and that copy: it may leave fp16 before they do."""
        for (value, exponent), copy in self._shifted.items():
            size = self.found.get(value.name)
            reach = (self.bound(value), 0.0 if size is None else size.peak)
            if (
                exponent < self.of.get(value, 0)
                and reach[1] * 2.0**-exponent <= LARGEST < reach[0] * 2.0**-exponent
            ):
                yield value, copy

    def settle(self, node: Node) -> None:
        """Give the node the true values of its arguments."""
        for argument in node.all_input_nodes:
            if self.of.get(argument):
                node.replace_input_with(argument, cast("Node", self.at(argument, 0)))

    def note(self, node: Node, exponent: int) -> None:
        if exponent:
            self.of[node], self.changed = exponent, True
            place = str(node.meta.get("ane_source", node.name))
            self.shifts.append(Shift(node.name, place, exponent, self.why(node)))

    def item(self, node: Node) -> None:
        source, index = cast("Node", node.args[0]), cast("int", node.args[1])
        if source in self.parts:
            self.note(node, self.parts[source][index])

    # -- sums of products

    def contraction_shift(self, node: Node, a: Node, b: Node, natural: int) -> int:
        wish, room = self.growth(node, a, b, self.terms(node, a), natural)
        return min(wish, room) if wish > 0 else wish

    def growth(self, node: Node, a: Node, b: Node, terms: int, natural: int) -> tuple[int, int]:
        """The power of two by which the products of a contraction are to grow, and by which they may."""
        sizes = [self.found.get(x.name) for x in (a, b, node)]
        if any(s is None or s.peak == 0.0 for s in sizes):
            return 0, 0
        left, right, result = cast("list[Magnitude]", sizes)
        count = max(1.0, terms * left.density * right.density)
        unit = 2.0**-natural
        error = math.sqrt(count) * PRODUCT_ERROR
        reach = max(result.peak, 4.0 * math.sqrt(count) * left.rms * right.rms) * unit
        room = math.floor(math.log2(WANTED_SUM / reach))
        if reach > LARGEST_SUM:
            return room, room
        if error > TOLERATED * result.rms * unit or self.risky(node, natural):
            return max(0, math.ceil(math.log2(error / (TOLERATED / 16 * result.rms * unit)))), max(0, room)
        return 0, max(0, room)

    def room(self, x: Node) -> int:
        """The power of two by which a value may grow."""
        size = self.found.get(x.name)
        if size is None or size.peak == 0.0:
            return 0
        return max(0, math.floor(math.log2(LARGEST / size.peak) + self.of.get(x, 0)))

    def shared_shift(self, a: Node, b: Node, shift: int) -> tuple[int, int]:
        """A shift divided between two operands so that both stay in fp16, at one of them if possible."""
        if shift == 0:
            return 0, 0
        room = [self.room(x) for x in (a, b)]
        small, large = (0, 1) if math.prod(shape_of(a)) <= math.prod(shape_of(b)) else (1, 0)
        pair = [0, 0]
        if shift < 0 or room[small] >= shift:
            pair[small] = shift
        elif room[large] >= shift:
            pair[large] = shift
        else:
            pair[small] = max(0, min(room[small], shift))
            pair[large] = max(0, min(room[large], shift - pair[small]))
        return pair[0], pair[1]
