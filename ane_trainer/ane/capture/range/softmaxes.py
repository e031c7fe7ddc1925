"""Find the gradient of a softmax in a graph: as one operation or written out, with rows zeroed, behind a mask."""

from __future__ import annotations

import math
from typing import cast

from torch.fx import Node

from ane_trainer.ane.capture.range.editing import aten, dims_of, number, shape_of
from ane_trainer.ane.capture.range.norms import is_zero
from ane_trainer.ane.capture.trace.moves import CAST

SUMS = (aten.sum.default, aten.sum.dim_IntList)


def softmax_gradient(node: Node | None) -> tuple[Node, int] | None:
    """(p, axis) of `g * p - p * sum(g * p)`, which adds to 0 along it, if p adds to 1 there or is 0 in the whole row.

    That is what is left of a softmax's gradient where rows without anything to attend to are set to 0.
    """
    if node is None or node.target is not aten.sub.Tensor or len(node.args) > 2 or node.kwargs:
        return None
    product, part = (_unwrapped(argument) for argument in node.args)
    if product is None or part is None or {product.target, part.target} != {aten.mul.Tensor}:
        return None
    weights = [_unwrapped(argument) for argument in product.args]
    for p, total in (part.args, part.args[::-1]):
        sum_, p = _unwrapped(total), _unwrapped(p)
        whole = sum_ is not None and sum_.target in SUMS and _unwrapped(sum_.args[0]) is product
        axes = dims_of(sum_) if sum_ is not None and whole else None
        if p is None or p not in weights or axes is None or len(axes) != 1:
            continue
        rows = p if p.target is aten._softmax.default else _softmax_in_rows(p, axes[0])
        if rows is not None and cast("int", rows.args[1]) % len(shape_of(node)) == axes[0]:
            return rows, axes[0]
    return None


def masked_gradient(node: Node) -> Node | None:
    """x of `where(mask, 0, x)`, x the gradient of a softmax that the same mask gave -inf: x is 0 there already."""
    test, *sides = node.args
    zero = [is_zero(side) for side in sides]
    if zero[0] == zero[1]:
        return None
    place = zero.index(False)
    gradient = _unwrapped(sides[place])
    found = softmax_gradient(gradient)
    softmax = (
        gradient.args[1] if gradient is not None and "_softmax_backward" in str(gradient.target) else None
    )
    softmax = found[0] if found is not None else _unwrapped(softmax)
    scores = (
        _unwrapped(softmax.args[0])
        if softmax is not None and softmax.target is aten._softmax.default
        else None
    )
    if scores is None or scores.target is not aten.where.self or scores.args[0] is not test:
        return None
    low = scores.args[2 - place]
    return gradient if number(low) == -math.inf or _is_lowest(low) else None


def _is_lowest(argument: object) -> bool:
    """Whether it is a tensor of one number that exp makes 0 of: -inf, or what stands for it in a mask."""
    if not isinstance(argument, Node):
        return False
    place = {"aten.scalar_tensor.default": 0, "aten.full.default": 1}.get(str(argument.target))
    value = None if place is None else number(argument.args[place])
    return value is not None and value <= -1e4


def _softmax_in_rows(node: Node, axis: int) -> Node | None:
    """The softmax of `where(test, 0, softmax)` or `where(test, softmax, 0)` with one test a row."""
    if node.target is not aten.where.self or not isinstance(node.args[0], Node):
        return None
    test = shape_of(node.args[0])
    place = axis - len(shape_of(node)) + len(test)
    sides = node.args[1:]
    zero = [is_zero(side) for side in sides]
    if (place >= 0 and test[place] != 1) or zero[0] == zero[1]:
        return None
    found = _unwrapped(sides[zero.index(False)])
    return found if found is not None and found.target is aten._softmax.default else None


def _unwrapped(argument: object) -> Node | None:
    """A node without the copies and detached forms around it."""
    while isinstance(argument, Node) and argument.target in CAST:
        argument = argument.args[0]
    return argument if isinstance(argument, Node) and argument.op == "call_function" else None
