"""Rules for reductions, other shapes and matrix products of forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ane_trainer.ane.capture.user_optimizer import coefficients as co
from ane_trainer.ane.capture.user_optimizer.coefficients import NOUGHT, UNIT, number
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed
from ane_trainer.ane.capture.user_optimizer.form_choices import absolute, larger
from ane_trainer.ane.capture.user_optimizer.form_products import add, multiply, square, square_root
from ane_trainer.ane.capture.user_optimizer.form_registry import (
    RULES,
    constant,
    numeric,
    of,
    rule,
    unchanging,
)
from ane_trainer.ane.capture.user_optimizer.forms import Atom, Form, Workshop, scaled

#: log2 of what sums are kept below.
_LARGEST_SUM = 14
_SMALLEST_PEAK = 2.0**-24

# -- sums


def _axes(shape: tuple[int, ...], dim: Any) -> list[int]:
    rank = max(len(shape), 1)
    if dim is None or dim == () or dim == []:
        return list(range(rank))
    return sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))


def _reduced(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return tensor.reshape(shape or (1,))


@rule("sum")
def total_of(
    w: Workshop, shape: Any, self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Form:
    """The sum over `dim`; of squares by the norm, which does not overflow."""
    form = numeric(self)
    axes = _axes(form.shape, dim)
    count = math.prod((form.shape or (1,))[a] for a in axes)
    if not form.terms:
        return constant(co.times(form.constant, number(count)), shape)
    if len(form.terms) == 1 and form.constant == NOUGHT and len(axes) == max(len(form.shape), 1):
        ((atom, coefficient),) = form.terms.items()
        if atom.squared:
            return of(_norm_of(w, atom, count, shape), coefficient, shape)
    atom, coefficient = w.single(form)
    apart = w.decide(lambda: min(0.0, _LARGEST_SUM - math.ceil(math.log2(count)) - max(atom.peak, 0.0)))
    tensor = atom.tensor * 2.0**apart if apart else atom.tensor
    for axis in reversed(axes):
        tensor = tensor.sum(axis, keepdim=True)
    tensor = _reduced(tensor, shape)
    made = Atom(
        tensor, atom.exponent + apart, w.peak(tensor, atom.peak + apart), atom.positive, states=atom.states
    )
    return of(made, coefficient, shape)


def _norm_of(w: Workshop, atom: Atom, count: int, shape: tuple[int, ...]) -> Atom:
    """The norm of the atom's tensor as the root of the sum: nothing is squared that is above 1."""
    peak = torch.clamp(atom.tensor.abs().amax().reshape(1), min=_SMALLEST_PEAK)
    ratios = atom.tensor / peak
    squares = ratios * ratios
    halved = max(0, math.ceil(math.log2(count) / 2) - 6)
    for axis in reversed(range(squares.ndim)):
        if axis == 0:
            squares = squares * 2.0 ** (-2 * halved)
        squares = squares.sum(axis, keepdim=True)
    root = torch.sqrt(squares).reshape(1)
    raw = w.peak(root * peak, 6.0)
    apart = w.decide(lambda: 6 - raw)
    tensor = _reduced(root * (peak * 2.0**apart), shape)
    return Atom(tensor, atom.exponent + apart - halved, raw + apart, True, True, atom.states)


@rule("mean")
def _mean(
    w: Workshop, shape: Any, self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Form:
    form = numeric(self)
    count = math.prod((form.shape or (1,))[a] for a in _axes(form.shape, dim))
    return scaled(total_of(w, shape, form, dim, keepdim), number(1.0 / count))


@rule("linalg_vector_norm", "norm")
def norm(
    w: Workshop, shape: Any, self: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False,
    dtype: Any = None, p: Any = None,
) -> Form:  # fmt: skip
    """The norm of order 1, 2 or infinity."""
    kind = unchanging(numeric(ord if p is None else p))
    if kind == 2.0:
        whole = numeric(self)
        return square_root(w, shape, total_of(w, shape, square(w, whole.shape, whole), dim, keepdim))
    size = absolute(w, numeric(self).shape, self)
    if kind == 1.0:
        return total_of(w, shape, size, dim, keepdim)
    if kind == math.inf:
        return _amax(w, shape, size, dim, keepdim)
    raise NotFollowed(f"takes the norm of order {kind:g}, which has no rule", place=False)


@rule("amax", "max")
def _amax(
    w: Workshop, shape: Any, self: Any, dim: Any = None, keepdim: bool = False, other: Any = None
) -> Form:
    if other is not None:
        return larger(w, shape, self, other)
    form = numeric(self)
    atom, coefficient = w.single(form)
    if w.sign_of(coefficient) < 0:
        atom, coefficient = w.atom(form), UNIT
    tensor = _reduced(atom.tensor.amax(_axes(form.shape, dim), keepdim=True), shape)
    return of(Atom(tensor, atom.exponent, atom.peak, atom.positive, states=atom.states), coefficient, shape)


# -- other shapes


@rule("stack", "cat")
def _stack(w: Workshop, shape: Any, tensors: Any, dim: int = 0) -> Form:
    """Single numbers side by side."""
    forms = [numeric(t) for t in tensors]
    if any(math.prod(f.shape) != 1 for f in forms):
        raise NotFollowed("joins tensors of more than one number", place=False)
    top = max(w.magnitude(f) for f in forms)
    exponent = w.decide(lambda: 6 - top)
    parts = [w.total(f, exponent).reshape(1) for f in forms]
    positive = all(map(w.positive, forms))
    states = frozenset().union(*(f.states for f in forms))
    return of(Atom(torch.cat(parts).reshape(shape), exponent, 6.0, positive, states=states), UNIT, shape)


def _shaped(w: Workshop, shape: Any, self: Any, name: str = "view", **options: Any) -> Form:
    form = numeric(self)
    if not form.terms:
        return constant(form.constant, shape)
    atom, coefficient = w.single(form)
    tensor = atom.tensor
    if name in ("t", "transpose", "permute"):
        tensor = tensor.permute(_order(name, len(form.shape), options))
    elif name in ("expand", "expand_as"):
        tensor = tensor.expand(shape or (1,))
    made = Atom(_reduced(tensor, shape), atom.exponent, atom.peak, atom.positive, states=atom.states)
    return of(made, coefficient, shape)


def _order(name: str, rank: int, options: Mapping[str, Any]) -> list[int]:
    if name == "permute":
        return [d % rank for d in options["dims"]]
    order = list(range(rank))
    if name == "t":
        return order[::-1]
    a, b = options["dim0"] % rank, options["dim1"] % rank
    order[a], order[b] = order[b], order[a]
    return order


for _name in ("view", "reshape", "_unsafe_view", "expand", "expand_as", "unsqueeze", "squeeze", "t", "transpose", "permute"):  # fmt: skip  # noqa: E501
    RULES[_name] = lambda w, shape, self, name=_name, **o: _shaped(w, shape, self, name, **o)


# -- matrices


@rule("mm", "bmm")
def _mm(w: Workshop, shape: Any, self: Any, mat2: Any) -> Form:
    """The accumulator holds 2^-16 ... 32768: operands near 2^3, and less for long sums."""
    (x, cx), (y, cy) = w.single(numeric(self)), w.single(numeric(mat2))
    inner = numeric(self).shape[-1]
    reach = 14 - math.ceil(math.log2(inner))
    shift = w.decide(lambda: (reach - x.peak - y.peak) // 2 + (y.peak - x.peak) / 2)
    other = w.decide(lambda: reach - x.peak - y.peak - shift)
    left, right = _power(x.tensor, shift), _power(y.tensor, other)
    tensor = torch.matmul(left, right)
    made = Atom(
        tensor, x.exponent + y.exponent + shift + other, w.peak(tensor, 6.0), states=x.states | y.states
    )
    return of(w.centered(made), co.times(cx, cy), shape)


@rule("addmm", "baddbmm")
def _addmm(
    w: Workshop, shape: Any, self: Any, mat1: Any = None, mat2: Any = None, batch1: Any = None, batch2: Any = None,
    beta: Any = 1, alpha: Any = 1,
) -> Form:  # fmt: skip
    product = _mm(w, shape, batch1 if mat1 is None else mat1, batch2 if mat2 is None else mat2)
    return add(w, shape, multiply(w, shape, self, beta), product, alpha)


def _power(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    return tensor * 2.0**exponent if exponent else tensor
