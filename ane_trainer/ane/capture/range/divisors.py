"""Divisors stored so that fp16 holds the reciprocals of their least entries, with which the engine multiplies.

    before: `average / count`, counts 1e-5 ... 2    after: `average / (count * 8)`, which stands for its 8-fold

The reciprocal of 1e-5 is 100,000: it saturates, and the quotient is a third too small, however large it is itself. How
small the entries are that count follows from the calibration: one is the numerator's largest over the quotient's
largest at most. Test: `test_divisors.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.bands import LARGEST
from ane_trainer.ane.capture.range.calibration import Magnitude
from ane_trainer.ane.capture.range.editing import aten, in_update, shape_of
from ane_trainer.ane.capture.range.shifting import Shifting
from ane_trainer.ane.capture.trace.moves import SPREAD

#: The least divisor whose reciprocal fp16 holds, and the one to which lesser ones are brought: no further, since the
#: reciprocals of the large ones become small.
_LEAST, _WANTED = 2.0**-15, 2.0**-14
#: An entry counts as a mean size this many times larger, which is brought near 1: it is to be stored, no more.
_BESIDE = 2.0**7


_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)


def with_small_divisors(graph: Graph, found: Mapping[str, Magnitude]) -> dict[str, Magnitude]:
    """Magnitudes in which a divisor, and what it is made of, counts as its least entries do that matter.

    `(count + 1e-5) / (sum + c) * sum`: 1e-5 over a sum of 200 is no number of fp16's, however large the others are.
    """
    sizes = dict(found)
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        divisor = node.args[1]
        if not in_update(node) and isinstance(divisor, Node):
            _lower(sizes, divisor, _least(sizes, node, node.args[0]))
    return sizes


def _least(sizes: Mapping[str, Magnitude], quotient: Node, numerator: object) -> float:
    """About the least entry of a divisor that matters, from what it divides and what that gives; or infinity."""
    given, found = sizes.get(getattr(numerator, "name", "")), sizes.get(quotient.name)
    if isinstance(numerator, (int, float)):
        given = Magnitude(abs(numerator), abs(numerator), 1.0)
    if given is None or found is None or not given.rms or not found.rms:
        return math.inf
    return min(given.peak / found.peak, given.rms / found.rms)


def _lower(sizes: dict[str, Magnitude], node: Node, least: float) -> None:
    """Let a value count as small as `least`, and what it is a view or multiple of accordingly."""
    while least < _WANTED and node.op == "call_function":
        size = sizes.get(node.name)
        if size is None or not size.finite or size.masked:
            return
        if least * _BESIDE < size.rms:
            sizes[node.name] = dataclasses.replace(size, rms=least * _BESIDE, spread=True)
        factor = node.args[1] if node.target in _PRODUCTS and len(node.args) == 2 else None
        if isinstance(factor, Node) and math.prod(shape_of(factor)) == 1 and _peak(sizes, factor):
            by = _peak(sizes, factor)
            least = least * by if node.target is aten.div.Tensor else least / by
        elif node.target not in SPREAD:
            return
        node = node.all_input_nodes[0]


def raised_divisor(values: Shifting, node: Node, numerator: Node | float, divisor: Node) -> Node:
    """The divisor of a quotient, or what stores it times a power of two; its exponent is in `values.of`."""
    own, least = values.of.get(divisor, 0), _least(values.found, node, numerator)
    size = values.found.get(divisor.name)
    if in_update(node) or divisor in values.masked or least * 2.0**-own >= _LEAST:
        return divisor
    if size is None or not size.peak or not size.finite:
        return divisor
    room = math.ceil(math.log2(_peak(values.found, divisor) / LARGEST))
    exponent = max(math.floor(math.log2(least / _WANTED)), room)
    if exponent >= own:
        return divisor
    raised = cast("Node", values.at(divisor, exponent))
    values.of[raised], values.found[raised.name] = exponent, values.found[divisor.name]
    node.replace_input_with(divisor, raised)
    return raised


def _peak(sizes: Mapping[str, Magnitude], node: object) -> float:
    size = sizes.get(node.name) if isinstance(node, Node) else None
    return 0.0 if size is None else size.peak
