"""Handwritten exponentials over their sum, and logarithms of such sums, as softmax, logsumexp and their like.

    exp(x) / exp(x).sum(1, keepdim=True) -> softmax(x, 1)      log(exp(x).sum(1)) -> logsumexp(x, 1)
    1 / (1 + exp(-x)) -> sigmoid(x)                             log1p(exp(x)), log(1 + exp(x)) -> softplus(x)

Exponentials of numbers that lie 17 apart do not stand in fp16 together, whatever power of two they carry. A result
remembers what it was made of as long as neither was written to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional as F

from ane_trainer.ane.capture.rewrites.logits import Origins
from ane_trainer.ane.capture.trace.torch_private import SideTable, version

Function = Callable[..., Any]

#: torch's functions, for arguments of any kind.
_EXP: Function = torch.exp
_SUM: Function = torch.sum
_MUL: Function = torch.mul
_DIV: Function = torch.div
_INVERSE: Function = torch.reciprocal


@dataclass(frozen=True)
class _Made:
    """A tensor of exponentials of `scores`: "exp" themselves, their "sum" over `axes`, or "one" added to them."""

    kind: str
    scores: torch.Tensor
    versions: tuple[int, int]
    axes: tuple[int, ...] = ()


class Exponentials(Origins):
    """What exponentials and their sums were made of, beside probabilities; `rewrites` are the functions of both."""

    def __init__(self, item: Function = torch.Tensor.__getitem__) -> None:
        """`item` is what `x[...]` does otherwise."""
        super().__init__()
        self._made: SideTable[_Made] = SideTable()
        divided, added = (torch.div, torch.true_divide, torch.Tensor.div, torch.Tensor.true_divide), (
            torch.add, torch.Tensor.add,
        )  # fmt: skip
        self.rewrites |= {
            torch.exp: self._exp, torch.Tensor.exp: self._exp, torch.sum: self._sum, torch.Tensor.sum: self._sum,
            torch.log1p: self._log1p, torch.Tensor.log1p: self._log1p, torch.Tensor.__rdiv__: self._divided_by,
            torch.Tensor.__getitem__: functools.partial(self._item, item), torch.reciprocal: self._inverse,
            torch.Tensor.reciprocal: self._inverse,
            **dict.fromkeys(divided, self._quotient), **dict.fromkeys(added, self._total),
        }  # fmt: skip

    def _exp(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        result: torch.Tensor = _EXP(x, *args, **kwargs)
        return self._note("exp", result, x) if x.is_floating_point() and not kwargs else result

    def _sum(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        result: torch.Tensor = _SUM(x, *args, **kwargs)
        made = self._of(x, "exp")
        axes = axes_of_sum(x.ndim, args, kwargs)
        return result if made is None or axes is None else self._note("sum", result, made.scores, axes)

    def _total(self, x: object, y: object, *args: object, **kwargs: object) -> torch.Tensor:
        result = super()._total(x, y, *args, **kwargs)
        for each, other in ((x, y), (y, x)):
            made = self._of(each, "exp")
            if made is not None and type(other) in (int, float) and other == 1 and not args and not kwargs:
                return self._note("one", result, made.scores)
        return result

    def _quotient(self, x: object, y: object, *args: object, **kwargs: object) -> object:
        """exp / sum of them, and anything over 1 + exp."""
        above, below = self._of(x, "exp"), self._of(y, "sum", "one")
        if below is None or args or kwargs:
            return _DIV(x, y, *args, **kwargs)
        same = above is not None and above.scores is below.scores
        if below.kind == "one":
            return torch.sigmoid(below.scores) if same else _MUL(torch.sigmoid(-below.scores), x)
        below_each = tuple(y.shape) if isinstance(y, torch.Tensor) else ()
        found = self._share(below.scores, below.axes, below_each) if same else None
        return _DIV(x, y) if found is None else found

    def _share(
        self, scores: torch.Tensor, axes: tuple[int, ...], below: tuple[int, ...]
    ) -> torch.Tensor | None:
        """The softmax over the axes, if a sum of this shape stands below each of its terms."""
        kept = tuple(1 if axis in axes else size for axis, size in enumerate(scores.shape))
        if len(axes) == scores.ndim and math.prod(below) == 1:
            return self._softmax(scores.reshape(-1), 0).view(scores.shape)
        if len(axes) != 1 or below != kept[len(kept) - len(below) :] or math.prod(below) != math.prod(kept):
            return None
        return self._softmax(scores, axes[0])

    def _divided_by(self, x: torch.Tensor, y: object) -> object:
        """`y / x`, as Python calls it for a number y."""
        return self._quotient(y, x)

    def _inverse(self, x: torch.Tensor, *args: object, **kwargs: object) -> object:
        made = self._of(x, "one")
        return _INVERSE(x, *args, **kwargs) if made is None or kwargs else torch.sigmoid(-made.scores)

    def _log1p(self, x: torch.Tensor, *args: object, **kwargs: object) -> object:
        made = self._of(x, "exp")
        return super()._log1p(x, *args, **kwargs) if made is None or kwargs else F.softplus(made.scores)

    def _logarithm(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """`torch.log`: of a sum of exponentials `logsumexp`, of one and an exponential `softplus`."""
        made = self._of(x, "sum", "one")
        if made is None or args or kwargs:
            return super()._logarithm(x, *args, **kwargs)
        if made.kind == "one":
            return F.softplus(made.scores)
        return torch.logsumexp(made.scores, made.axes).reshape(x.shape)

    def _moved(self, function: Function, x: object, *args: object, **kwargs: object) -> object:
        """A view or reshape, which passes on that it is a sum in another shape."""
        return self._pass_on(x, super()._moved(function, x, *args, **kwargs))

    def _item(self, item: Function, x: object, index: object) -> object:
        """`x[:, None]`: a new axis; of probabilities any choice of entries."""
        result = self._carry(x, item(x, index), lambda tensor: item(tensor, index))
        parts = index if isinstance(index, tuple) else (index,)
        whole = all(p is None or p is Ellipsis or (isinstance(p, slice) and p == slice(None)) for p in parts)
        return self._pass_on(x, result) if whole else result

    def _pass_on(self, x: object, result: object) -> object:
        made = self._of(x, "sum")
        if made is not None and isinstance(result, torch.Tensor):
            self._note("sum", result, made.scores, made.axes)
        return result

    def _note(
        self, kind: str, result: torch.Tensor, scores: torch.Tensor, axes: tuple[int, ...] = ()
    ) -> torch.Tensor:
        self._made[result] = _Made(kind, scores, (version(result), version(scores)), axes)
        return result

    def _of(self, x: object, *kinds: str) -> _Made | None:
        made = self._made.get(x)
        if (
            not isinstance(x, torch.Tensor)
            or made is None
            or made.kind not in kinds
            or made.versions != (version(x), version(made.scores))
        ):
            return None
        return made


def axes_of_sum(rank: int, args: Sequence[object], kwargs: dict[str, object]) -> tuple[int, ...] | None:
    """The axes that `sum` takes with these arguments; None for arguments of another kind."""
    if kwargs.keys() - {"dim", "axis", "keepdim"} or len(args) > 2:
        return None
    axes = args[0] if args else kwargs.get("dim", kwargs.get("axis"))
    listed = range(rank) if axes is None else axes if isinstance(axes, (list, tuple)) else [axes]
    return tuple(sorted(a % max(rank, 1) for a in cast("Sequence[int]", listed)))
