"""`torch.where(mask)` and `nonzero` of a mask that the step computes: places without their number.

The places are all coordinates of the mask, selected by it (`Places`); rows that they pick lie as the mask does, and
rows that they are added or written to get the sum over the mask's other axes, of what is selected. Mixtures of experts
are written so: each expert then sees every row.

    before: `i, t = where(m); out.index_add_(0, t, f(x[t]) * w[t, i, None])`      m [K, N], x [N, D]
    after:  `out += where(m, f(x) * w.T, 0).sum(0)`
"""

from __future__ import annotations

import torch

from ane_trainer.ane.capture.rewrites.selections import Function, Given, Masks, Selected, refusal, widened

_MAKING = (torch.where, torch.nonzero, torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere)
#: What takes places, and as which argument.
_USING = {"__getitem__": 1, "__setitem__": 1, "index_select": 2, "index_add": 2, "index_add_": 2}


class Places(Selected):
    """Coordinates along `axis` of what a mask selects."""

    def __init__(self, mask: torch.Tensor, axis: int, masks: Masks) -> None:
        shape = [-1 if a == axis else 1 for a in range(mask.dim())]
        super().__init__(torch.arange(mask.shape[axis]).reshape(shape).expand(mask.shape), mask, masks)
        self.axis = axis


def concerns(func: Function, args: Given) -> bool:
    """Whether a call makes places, or indexes by what was selected."""
    if func in _MAKING:
        return len(args) == 1 and isinstance(args[0], torch.Tensor)
    place = _USING.get(getattr(func, "__name__", ""))
    if place is None or len(args) <= place or not isinstance(args[0], torch.Tensor):
        return False
    return any(isinstance(part, Selected) for part in _parts(args[place])[:8])


def apply(masks: Masks, func: Function, args: Given, kwargs: dict[str, Given]) -> tuple[object] | None:
    """The result of a call that `concerns`; None where the mask is known."""
    name = getattr(func, "__name__", "")
    if func in _MAKING:
        if masks.knows(args[0]):
            return None
        found = _places(args[0], masks)
        return (found if name == "where" or kwargs.get("as_tuple") else _stacked(found),)
    if name == "__getitem__":
        return (_picked(args[0], args[1]),)
    if name == "__setitem__":
        _write(args[0], args[1], args[2])
        return (None,)
    if name == "index_select":
        return (_picked(args[0], (*(slice(None),) * args[1], args[2])),)
    return (_added(name, *args, **kwargs),)


def _places(mask: torch.Tensor, masks: Masks) -> tuple[Places, ...]:
    mask = mask if mask.dtype == torch.bool else mask != 0
    return tuple(Places(mask, axis, masks) for axis in range(mask.dim()))


def _stacked(places: tuple[Places, ...]) -> Selected:
    """`mask.nonzero()` [number, axes]"""
    first = places[0]
    return Selected(torch.stack([p.values for p in places], -1), first.mask, first.masks)


def _parts(index: object) -> tuple[Given, ...]:
    return tuple(index) if isinstance(index, (tuple, list)) else (index,)


def _picked(x: torch.Tensor, index: object) -> Selected:
    """`x[places, ...]`: by all coordinates, of which the mask selects."""
    parts = _parts(index)
    behind = len(parts) > 1 and parts[0] is None
    chosen = [part for part in parts if isinstance(part, Selected)]
    first = parts[1 if behind else 0]
    truths = any(part.values.dtype in (torch.bool, torch.uint8) for part in chosen)
    if not isinstance(first, Selected) or truths or any(isinstance(part, torch.Tensor) for part in parts):
        raise refusal("x[:, where(mask)]")
    if not all(
        first.masks.same(first.mask, other.mask) and other.values.dim() == first.mask.dim()
        for other in chosen
    ):
        raise refusal("x[where(mask), where(other mask)]")
    plain = tuple(part.values if isinstance(part, Selected) else part for part in parts[1 if behind else 0 :])
    return Selected(torch.Tensor.__getitem__(x, plain), first.mask, first.masks, behind)


def _kept(value: object, like: Selected) -> torch.Tensor:
    """What is added or written where the mask holds, 0 elsewhere; of a number or a row the same for all."""
    if isinstance(value, Selected):
        if value.behind or not like.masks.same(like.mask, value.mask):
            raise refusal("x[where(mask)] = y[where(other mask)]")
        return torch.where(widened(value), value.values, torch.zeros((), dtype=value.values.dtype))
    raise refusal("x[where(mask)] = a tensor")


def _added(
    name: str, x: torch.Tensor, dim: int, places: Selected, source: object, alpha: float = 1
) -> torch.Tensor:
    """`x.index_add(dim, places, source)`"""
    rows = _kept(source, places)
    if dim != 0 or places.values.dim() != places.mask.dim():
        raise refusal("index_add of places along another axis")
    count = places.mask.dim()
    if isinstance(places, Places):
        others = [a for a in range(count) if a != places.axis]
        total = rows.sum(others) if others else rows
    else:
        flat = rows.reshape(-1, *rows.shape[count:])
        total = torch.zeros_like(x).index_add(0, places.values.reshape(-1), flat.to(x.dtype))
    total = total.to(x.dtype) if alpha == 1 else total.to(x.dtype) * alpha
    return x.add_(total) if name.endswith("_") else x + total


def _write(x: torch.Tensor, index: object, value: object) -> None:
    """`x[places] = value`: of several for one place the last counts and all have its gradient, as PyTorch has it."""
    (places, *others) = _parts(index)
    if others or not isinstance(places, Places):
        raise refusal("x[where(mask), ..] = y")
    rows, count = _kept(value, places), places.mask.dim()
    mask = places.mask.movedim(places.axis, 0).reshape(places.mask.shape[places.axis], -1)
    rows = rows.movedim(places.axis, 0).reshape(*mask.shape, *rows.shape[count:])
    wide = (*mask.shape, *(1,) * (rows.dim() - 2))
    kept = rows.sum(1)
    if mask.shape[1] > 1:
        last = mask & (mask.flip(1).to(torch.float32).cumsum(1).flip(1) == 1)
        chosen = torch.where(last.reshape(wide), rows, torch.zeros((), dtype=rows.dtype)).sum(1)
        kept = chosen.detach() + (kept - kept.detach())
    x.copy_(torch.where(mask.any(1).reshape(-1, *wide[2:]), kept.to(x.dtype), x))
