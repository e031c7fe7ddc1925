"""Logarithms, exponentials, powers and norms of values that carry a power of two.

    before: `log(x)`, x = v * 2^e              after: `log(v) + e * ln 2`
    before: `log1p(x)`, x near 1e6             after: `log(v) + e * ln 2` where x is large, else `log1p(v * 2^e)`
    before: `log1p(x)`, x near 1e-6            after: `v - v * v * 2^(e-1)`, and it stands for its 2^e-fold
    before: `exp(x)`, exp(x) near 1e6          after: `exp(x - 20 * ln 2)`, and it stands for its 2^20-fold
    before: `x ** 1.5`, x near 1000            after: `(x * 2^-5) ** 1.5 * 2^-0.5`, and it stands for its 2^8-fold
    before: `norm(x, p=3)`                     after: `m * norm(x / m, p=3)`, m = max(abs(x))

Tests: `test_transcendental.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from torch.fx import Node

from ane_trainer.ane.capture.range.editing import aten, in_update, number, shape_of
from ane_trainer.ane.capture.range.shifting import Shifting

#: From here on log(1 + x) is log(x) to 11 bits.
_LARGE = 2.0**10
#: Up to here log(1 + x) and exp(x) - 1 are x and a square to 11 bits.
_SMALL = 2.0**-6
_LEAST = 2.0**-14

_SCALES = {"aten.log.default": math.log(2.0), "aten.log2.default": 1.0, "aten.log10.default": math.log10(2.0)}


def logarithm(x: Shifting, node: Node) -> None:
    """log, log2, log10: the exponent is added to the result."""
    source = cast("Node", node.args[0])
    inner = x.emit(cast("Callable[..., object]", node.target), source)
    node.args = (inner, x.of.get(source, 0) * _SCALES[str(node.target)])
    node.target = aten.add.Tensor


def near_one(x: Shifting, node: Node) -> None:
    """log1p and expm1 of large or small values."""
    source = cast("Node", node.args[0])
    exponent, size = x.of.get(source, 0), x.size(source)
    if size is not None and size.peak <= _SMALL and exponent:
        half = 2.0 ** (exponent - 1) * (-1.0 if node.target is aten.log1p.default else 1.0)
        square = x.times(x.emit(aten.mul.Tensor, source, source), half)
        node.target, node.args = aten.add.Tensor, (source, square)
        return x.note(node, exponent)
    if exponent <= 0 or node.target is not aten.log1p.default:
        return x.settle(node)
    bound = _LARGE * 2.0**-exponent
    small = x.emit(
        aten.log1p.default, x.times(x.emit(aten.clamp.default, source, None, bound), 2.0**exponent)
    )
    log = x.emit(aten.log.default, x.emit(aten.clamp.default, source, _LEAST))
    large = x.emit(aten.add.Tensor, log, exponent * math.log(2.0))
    node.target, node.args = aten.where.self, (x.emit(aten.gt.Scalar, source, bound), large, small)
    return None


def exponential(x: Shifting, node: Node) -> None:
    """exp of what makes it leave the range."""
    x.settle(node)
    exponent = 0 if in_update(node) else x.wanted(node, 0)
    if exponent:
        node.args = (x.emit(aten.sub.Tensor, node.args[0], exponent * math.log(2.0)),)
        x.note(node, exponent)


def log_softmax(x: Shifting, node: Node) -> None:
    """`z = x - max(x)` keeps its exponent: `z - log(sum(exp(z * 2^e))) * 2^-e`; exp of what is below fp16 is 0."""
    source, axis = cast("Node", node.args[0]), cast("int", node.args[1])
    exponent = x.of.get(source, 0)
    if not exponent or (not x.risky(node, 0) and not x.risky(source, 0)):
        return x.settle(node)
    if exponent < 0 and x.risky(
        node, exponent
    ):  # scores near 0: log of the count is far larger than they are
        return x.settle(node)
    z = x.emit(aten.sub.Tensor, source, x.emit(aten.amax.default, source, [axis], True))
    total = x.emit(aten.sum.dim_IntList, x.emit(aten.exp.default, x.times(z, 2.0**exponent)), [axis], True)
    log = x.times(x.emit(aten.log.default, total), 2.0**-exponent)
    node.target, node.args = aten.sub.Tensor, (z, log)
    return x.note(node, exponent)


def power(x: Shifting, node: Node, degree: float) -> None:
    """x ** degree for any degree: what is no whole power of two becomes a factor near 1."""
    source = cast("Node", node.args[0])
    natural = x.of.get(source, 0)
    exponent = x.wanted(node, math.floor(natural * degree))
    moved = math.ceil(exponent / degree) if degree > 0 else math.floor(exponent / degree)
    whole = round(moved * degree)
    inner = x.emit(aten.pow.Tensor_Scalar, cast("Node", x.at(source, moved)), degree)
    node.target, node.args = aten.mul.Tensor, (inner, 2.0 ** (moved * degree - whole))
    x.note(node, whole)


def norm(x: Shifting, node: Node) -> None:
    """Norms of other orders than 0, 1, 2 and infinity, which raise nothing to a power: of x by its largest entry."""
    source, order = cast("Node", node.args[0]), number(node.args[1]) if len(node.args) > 1 else 2.0
    if in_update(node) or order in (0.0, 1.0, 2.0, math.inf, -math.inf, None) or node.kwargs:
        return x.settle(node)
    axes = node.args[2] if len(node.args) > 2 and node.args[2] else list(range(len(shape_of(source))))
    largest = x.emit(aten.amax.default, x.emit(aten.abs.default, source), axes, True)
    ratio = x.emit(aten.div.Tensor, source, x.emit(aten.clamp.default, largest, _LEAST))
    inner = x.emit(aten.linalg_vector_norm.default, ratio, *node.args[1:])
    exponent = x.wanted(node, x.of.get(source, 0))
    factor = x.times(x.view(largest, shape_of(node)), 2.0 ** (x.of.get(source, 0) - exponent))
    node.target, node.args, x.changed = aten.mul.Tensor, (inner, factor), True
    return x.note(node, exponent)
