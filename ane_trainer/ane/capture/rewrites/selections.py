"""`x[mask]` with a mask that the step computes, where no later shape depends on the data.

The selected rows stay where they are, in the full tensor beside the mask (`Selected`): elementwise functions and layers
on the other axes act on all, sums and means and losses count the selected, and `y[mask] = f(x[mask])` is a choice. Rows
that are not selected hold 1 (integers 0), so that no function of them leaves the numbers.

Masks that are known when compiling give rows of a known number; large ones go the same way, which costs nothing that
grows with the square of their size, and become ordinary tensors (`whole`) where it leads no further.

    before: `loss[m].mean()`      after: `(where(m, loss, 1) * m).mean() / m.mean()`
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ane_trainer.ane.capture.trace.torch_private import SideTable, pytree, version
from ane_trainer.ane.errors import Finding, UnsupportedModel

Function = Callable[..., Any]
#: What a torch function is given.
Given = Any

_OPERATORS = (
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ __neg__ __mod__ "
    "__floordiv__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __invert__"
).split()
_IN_PLACE = "__iadd__ __isub__ __imul__ __itruediv__ add_ sub_ mul_ div_ relu_ sin_ tanh_".split()
#: Functions of each element alone, by name; the other operands are numbers, or have no more axes than a row.
_ELEMENTWISE = frozenset(
    (
        "abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tan tanh sigmoid relu gelu silu elu "
        "selu celu mish hardtanh hardswish hardsigmoid leaky_relu softplus logsigmoid relu6 erf square sign floor ceil "
        "round trunc frac clamp clamp_min clamp_max clip pow add sub mul div true_divide floor_divide remainder rsub "
        "eq ne lt le gt ge logical_not logical_and logical_or maximum minimum fmax fmin float double half to type "
        "long int bool detach clone contiguous where masked_fill dropout nan_to_num lerp addcmul addcdiv hypot atan2 "
        "isfinite isnan multiply subtract divide absolute negative type_as requires_grad_"
    ).split()
    + _OPERATORS
    + _IN_PLACE
)
#: Those that give the same on the same operands.
_PURE = _ELEMENTWISE - {"dropout", "requires_grad_", "clone", *_IN_PLACE} | frozenset(
    "__getitem__ select unsqueeze squeeze view reshape flatten expand sum any all argmax isin".split()
)
#: Functions of the last axes of a row.
_ROWWISE = frozenset("linear layer_norm rms_norm normalize embedding __matmul__ matmul".split())
#: Functions that reduce `dim`, an axis of the row.
_ALONG = frozenset(
    "sum mean amax amin logsumexp norm softmax log_softmax var std prod argmax all any cumsum".split()
)
_LOSSES = frozenset(
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits".split()
)
_CLASSES = ("cross_entropy", "nll_loss")
_SHAPING = ("view", "reshape", "flatten", "squeeze", "unsqueeze")
_JOINING = ("cat", "concat", "concatenate", "stack")
#: Largest and smallest of all elements, and the arguments by name of reductions of all.
_ENDS = ("max", "min", "amax", "amin")
_TAKEN = {"sum": ("dtype",), "mean": ("dtype",), **dict.fromkeys(("std", "var"), ("unbiased", "correction"))}
#: Known masks up to this many elements are taken by index.
_SMALL = 512
_FIX = "Keep the shape: torch.where, masked_fill, or a product with the mask."


class Selected:
    """Rows of `values` `[*mask's shape, *row]` where `mask` holds; stands for the tensor `[number of rows, *row]`."""

    def __init__(self, values: torch.Tensor, mask: torch.Tensor, masks: Masks, behind: bool = False) -> None:
        """`behind`: stands for `[1, number of rows, *row]`, until it is given another shape."""
        self.values, self.mask, self.masks, self.behind = values, mask, masks, behind

    def whole(self) -> torch.Tensor | None:
        """The tensor that this stands for, if the mask is known."""
        if not self.masks.knows(self.mask):
            return None
        places = self.mask.reshape(-1).nonzero().reshape(-1)
        return self.values.reshape(-1, *self.values.shape[self.mask.dim() :]).index_select(0, places)

    @classmethod
    def __torch_function__(
        cls, func: Function, types: object, args: object = (), kwargs: Mapping[str, object] | None = None
    ) -> Any:
        return apply(func, args, dict(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch.Tensor, name)
        if name in ("dtype", "device", "requires_grad", "is_cuda"):
            return getattr(self.values, name)
        if not callable(attribute):
            whole = self.whole()
            if whole is None:
                raise refusal(f"x[mask].{name}")
            return getattr(whole, name)
        return functools.partial(_method, attribute, self)

    def __len__(self) -> int:
        whole = self.whole()
        if whole is None:
            raise refusal("len(x[mask])")
        return len(whole)


def _operator(name: str) -> Function:
    def method(self: Selected, *others: object) -> Any:
        return apply(getattr(torch.Tensor, name), (self, *others), {})

    return method


for _name in (*_OPERATORS, *(n for n in _IN_PLACE if n.startswith("__")), "__matmul__", "__getitem__"):
    setattr(Selected, _name, _operator(_name))


class Masks:
    """What one capture knows of tensors: which call made each, so that equal masks are found equal.

    `knows` tells tensors whose values are known when compiling; they select as ever.
    """

    def __init__(self, knows: Callable[[torch.Tensor], bool]) -> None:
        self.knows = knows
        self._numbers: SideTable[int] = SideTable()
        self._calls: dict[tuple[object, ...], int] = {}

    def note(self, func: Function, args: Given, kwargs: Given, result: object) -> None:
        """Remember a call: another of the same function on the same values gives the same."""
        name = getattr(func, "__name__", "")
        if name in _PURE and isinstance(result, torch.Tensor) and self._numbers.get(result) is None:
            call = (
                name,
                *(self._key(a) for a in args),
                *((k, self._key(v)) for k, v in (kwargs or {}).items()),
            )
            self._numbers[result] = self._calls.setdefault(call, len(self._calls) + 1)

    def _key(self, value: object) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._key(item) for item in value)
        if not isinstance(value, torch.Tensor):
            return repr(value)
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = self._calls.setdefault((object(),), len(self._calls) + 1)
        return number, version(value)

    def same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether two masks are one, were made by equal calls, or are known to be equal."""
        if a is b or self._key(a) == self._key(b):
            return True
        return a.shape == b.shape and self.knows(a) and self.knows(b) and bool(torch.equal(a, b))

    def takes(self, index: object) -> bool:
        """Whether an index is one boolean mask that the step computes, or a large one."""
        mask = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or not mask.dim():
            return False
        return mask.numel() > _SMALL or not self.knows(mask)

    def masked_select(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        """`torch.masked_select(x, mask)`"""
        shape = torch.broadcast_shapes(x.shape, mask.shape)  # type: ignore[no-untyped-call]
        if self.knows(mask):
            return x.expand(shape)[mask.expand(shape)]
        return self.select(x.expand(shape), mask.expand(shape))

    def select(self, x: torch.Tensor, index: Given) -> Selected:
        """`x[mask]`"""
        mask = index[0] if isinstance(index, tuple) else index
        spread = mask.reshape(*mask.shape, *(1,) * (x.dim() - mask.dim()))
        idle = 1.0 if x.is_floating_point() else 0
        return Selected(torch.where(spread, x, torch.full((), idle, dtype=x.dtype)), mask, self)

    def put(self, x: torch.Tensor, index: Given, value: Selected) -> None:
        """`x[mask] = value`"""
        mask = index[0] if isinstance(index, tuple) else index
        if not self.same(mask, value.mask):
            whole = value.whole()
            if whole is None:
                raise refusal("x[mask] = y[other mask]")
            torch.Tensor.__setitem__(x, mask, whole)
            return
        x.copy_(torch.where(widened(value), value.values.to(x.dtype), x))


def widened(x: Selected) -> torch.Tensor:
    """The mask with an axis of extent 1 for each of a row."""
    return x.mask.reshape(*x.mask.shape, *(1,) * (x.values.dim() - x.mask.dim()))


def refusal(what: str) -> UnsupportedModel:
    """What is said of an operation that needs the number of rows."""
    finding = Finding(what, "mask", "gives a shape that depends on data.", _FIX)
    return UnsupportedModel("The step depends on values that are not known beforehand:", [finding])


def _method(attribute: Function, rows: Selected, *args: object, **kwargs: object) -> Any:
    return apply(attribute, (rows, *args), kwargs)


def apply(func: Function, args: Given, kwargs: dict[str, object]) -> Any:
    """A torch function of selected rows: on the full tensors, counting the selected, or of the whole if it is known.

    Raises: UnsupportedModel for what would need their number.
    """
    try:
        return _apply(func, args, dict(kwargs))
    except UnsupportedModel:
        rows = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Selected)]
        if not all(row.masks.knows(row.mask) for row in rows):
            raise
        args, kwargs = pytree.tree_map(lambda a: a.whole() if isinstance(a, Selected) else a, (args, kwargs))
        return func(*args, **kwargs)


def _apply(func: Function, args: Given, kwargs: dict[str, Any]) -> Any:
    name = str(getattr(func, "__name__", func))
    rows = next((a for a in [*args, *kwargs.values()] if isinstance(a, Selected)), None)
    if rows is None:  # in a list
        return _joined(func, *args, **kwargs)
    inner = rows.values.dim() - rows.mask.dim()
    if name in _SHAPING:
        return shaped(rows, name, (*args[1:], *kwargs.values()))
    if any(isinstance(a, Selected) and a.behind for a in args):
        raise refusal(f"{name}(x[None, where(mask)])")
    if name == "__getitem__":
        return _columns(rows, args[1])
    if name in _CLASSES:
        return _classes(func, args, kwargs)
    if name in _LOSSES:
        reduction = kwargs.pop("reduction", "mean")
        each = _wrapped(
            rows, func(*_full(rows, args, inner), **_named(rows, kwargs, inner), reduction="none")
        )
        return each if reduction == "none" else _reduced(each, reduction)
    if name in _ENDS and len(args) == 2 and not isinstance(args[1], int):
        larger: Function = torch.maximum if name == "max" else torch.minimum
        return _wrapped(rows, larger(*_full(rows, args, inner)))
    if name in ("sum", "mean", "all", "any", "std", "var", *_ENDS) and not _dims(args, kwargs):
        return _reduced(rows, name, **{k: v for k, v in kwargs.items() if k in _TAKEN.get(name, ())})
    if name == "dim" or (name == "size" and args[1:] and args[1] not in (0, -1 - inner)):
        row = rows.values.shape[rows.mask.dim() :]
        return 1 + inner if name == "dim" else row[args[1] if args[1] < 0 else args[1] - 1]
    if name == "numel" or (name == "size" and tuple(args[1:]) == (0,)):
        return _count(rows) * (math.prod(rows.values.shape[rows.mask.dim() :]) if name == "numel" else 1)
    if name in _ALONG:
        return _along(func, rows, args, kwargs)
    if name in _ELEMENTWISE:
        return _wrapped(rows, func(*_full(rows, args, inner), **_named(rows, kwargs, inner)))
    if (name in _ROWWISE and inner) or name == "embedding":
        return _wrapped(rows, func(*_full(rows, args, None), **_named(rows, kwargs, None)))
    raise refusal(f"{name}(x[mask])")


def _wrapped(rows: Selected, values: torch.Tensor) -> Selected:
    return Selected(values, rows.mask, rows.masks)


def _full(rows: Selected, args: Given, inner: int | None) -> list[object]:
    return [_one(rows, a, inner) for a in args]


def _named(rows: Selected, kwargs: Mapping[str, object], inner: int | None) -> dict[str, object]:
    return {k: _one(rows, v, inner) for k, v in kwargs.items()}


def _one(rows: Selected, value: object, inner: int | None = None) -> Any:
    """An operand in full: the rows of the same mask, or what has no more than the `inner` axes of a row."""
    if isinstance(value, Selected):
        if not rows.masks.same(rows.mask, value.mask):
            raise refusal("x[mask] with y[other mask]")
        return value.values
    if isinstance(value, torch.Tensor) and inner is not None and value.dim() > inner and value.numel() != 1:
        if value.dim() == inner + 1 and value.shape[0] == 1:
            return value.squeeze(0)
        raise refusal("x[mask] with a tensor of as many rows")
    return value


def _dims(args: Given, kwargs: Mapping[str, object]) -> Any:
    return kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], torch.dtype) else None)


def _along(func: Function, rows: Selected, args: Given, kwargs: dict[str, object]) -> Any:
    """A reduction of the row's own axes; axis 0, that of the rows, for a sum or mean of all."""
    inner = rows.values.dim() - rows.mask.dim()
    dims = _dims(args, kwargs)
    places = [dims] if isinstance(dims, int) else list(dims or [])
    if not places or any(d == 0 or d < -inner for d in places):
        raise refusal(f"{getattr(func, '__name__', func)} over the rows of x[mask]")
    moved = [d if d < 0 else d + rows.mask.dim() - 1 for d in places]
    rest = {k: v for k, v in kwargs.items() if k != "dim"}
    return _wrapped(rows, func(rows.values, moved[0] if isinstance(dims, int) else moved, *args[2:], **rest))


def _reduced(
    rows: Selected, name: str, dtype: torch.dtype | None = None, unbiased: bool = True, correction: float = 1
) -> torch.Tensor:
    """The sum, mean, spread or an end of all elements of the selected rows, or whether all or any hold."""
    spread = widened(rows)
    if name in ("all", "any"):
        return (rows.values.bool() | ~spread).all() if name == "all" else (rows.values.bool() & spread).any()
    values = rows.values if dtype is None else rows.values.to(dtype)
    if name in _ENDS:
        limits = torch.finfo(values.dtype) if values.is_floating_point() else torch.iinfo(values.dtype)
        largest = name in ("max", "amax")
        kept = torch.where(
            spread, values, torch.full((), limits.min if largest else limits.max, dtype=values.dtype)
        )
        return kept.amax() if largest else kept.amin()
    if name in ("std", "var"):
        apart = _wrapped(rows, (values - _reduced(rows, "mean")).square())
        count = _count(rows) * math.prod(values.shape[rows.mask.dim() :])
        found = _reduced(apart, "mean") * (count / (count - (correction if unbiased else 0)))
        return found.sqrt() if name == "std" else found
    kept = torch.where(spread, values, torch.zeros((), dtype=values.dtype))
    return kept.sum() if name == "sum" else kept.mean() / rows.mask.to(values.dtype).mean()


def _count(rows: Selected) -> torch.Tensor:
    """How many rows are selected, as a number of floats."""
    return rows.mask.to(torch.get_default_dtype()).sum()


def shaped(rows: Selected, name: str, given: Given) -> Selected:
    """The rows in another shape, each whole or taken apart: `view(-1, 2)`, `flatten()`, `squeeze(1)`."""
    sizes = tuple(given[0]) if given and isinstance(given[0], (tuple, list)) else given
    lead, row = tuple(rows.mask.shape), tuple(rows.values.shape[rows.mask.dim() :])
    if rows.behind and name == "squeeze" and sizes == (0,):
        return _wrapped(rows, rows.values)
    places = [a + len(row) + 1 + (name == "unsqueeze") if a < 0 else a for a in sizes if isinstance(a, int)]
    if not all(isinstance(a, int) for a in sizes) or (rows.behind and name not in ("view", "reshape")):
        raise refusal(f"{name}(x[mask])")
    if name == "unsqueeze" and places[0] > 0:
        sizes = (-1, *row[: places[0] - 1], 1, *row[places[0] - 1 :])
    elif name == "squeeze" and 0 not in places:
        sizes = (-1, *(n for a, n in enumerate(row, 1) if n != 1 or (places and a not in places)))
    elif name == "flatten" and (len(places) < 2 or places[1] == len(row)):
        sizes = (-1, *row[: places[0] - 1], math.prod(row[places[0] - 1 :])) if any(places[:1]) else (-1,)
    whole, part = math.prod(row), math.prod(sizes[1:])
    if sizes[:1] != (-1,) or -1 in sizes[1:] or name not in _SHAPING or not part or whole % part:
        raise refusal(f"{name}(x[mask])")
    if part == whole:
        return _wrapped(rows, rows.values.reshape(*lead, *sizes[1:]))
    mask = rows.mask.unsqueeze(-1).expand(*lead, whole // part)
    return Selected(rows.values.reshape(*mask.shape, *sizes[1:]), mask, rows.masks)


def _joined(func: Function, parts: Given, dim: int = 0) -> Selected:
    """`torch.cat([x[mask], y[mask]], 1)`, `torch.stack(..., -1)`: of rows of one mask, along an axis of theirs."""
    name = getattr(func, "__name__", "")
    rows = next((part for part in parts if isinstance(part, Selected)), None)
    if (
        rows is None
        or name not in _JOINING
        or not all(isinstance(p, Selected) and not p.behind for p in parts)
    ):
        raise refusal(f"{name}([x[mask], ..])")
    inner = rows.values.dim() - rows.mask.dim() + (name == "stack")
    if dim == 0 or dim < -inner:
        raise refusal(f"{name}([x[mask], ..]) along the rows")
    return _wrapped(rows, func([_one(rows, p) for p in parts], dim if dim < 0 else dim + rows.mask.dim() - 1))


def _columns(rows: Selected, index: Given) -> Selected:
    """`x[mask][:, i]`: the first entry keeps all rows."""
    parts = index if isinstance(index, tuple) else (index,)
    if parts[:1] == (Ellipsis,):
        return _wrapped(rows, rows.values[index])
    if not isinstance(parts[0], slice) or parts[0] != slice(None):
        raise refusal("x[mask][i]")
    return _wrapped(rows, rows.values[(slice(None),) * rows.mask.dim() + tuple(parts[1:])])


def _classes(func: Function, args: Given, kwargs: dict[str, object]) -> Any:
    """`cross_entropy(x[mask], t[mask])`: labels of the others are ignored."""
    names = ("input", "target", "weight")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    scores, target = given.pop("input"), given.pop("target")
    if (
        not isinstance(scores, Selected)
        or not isinstance(target, Selected)
        or scores.values.dim() != scores.mask.dim() + 1
    ):
        raise refusal("cross_entropy of x[mask] with other rows")
    labels = _one(scores, target)
    ignored = given.get("ignore_index", -100)
    count = math.prod(scores.mask.shape)
    if labels.is_floating_point():
        raise refusal("cross_entropy of x[mask] with class probabilities")
    labels = torch.where(scores.mask, labels, torch.full((), ignored, dtype=labels.dtype)).reshape(count)
    result = func(scores.values.reshape(count, -1), labels, **given)
    if given.get("reduction", "mean") == "none":
        return _wrapped(scores, result.reshape(scores.mask.shape))
    return result
