"""torch functions whose own code reads values or changes shapes by them: the same functions without that.

`RewriteMode` calls the function in the table instead; its result and gradient are PyTorch's. It is the outermost
mode, so that it also sees the calls that other modes make; replacements are not looked up in the table again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributions import Distribution
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ane_trainer.ane.capture.rewrites import places, selections
from ane_trainer.ane.capture.rewrites.criteria import (
    ctc_loss,
    gaussian_nll,
    logcumsumexp,
    multi_label_margin,
    multi_margin,
    one_hot,
    soft_margin,
)
from ane_trainer.ane.capture.rewrites.exponentials import axes_of_sum
from ane_trainer.ane.capture.rewrites.packed import (
    ROW_BY_ROW,
    PackedSequences,
    as_rows,
    check_use,
    lengths_of,
)
from ane_trainer.ane.capture.rewrites.ragged import embedding_bag, histc
from ane_trainer.ane.capture.rewrites.selections import Masks, Selected
from ane_trainer.ane.capture.rewrites.weighted import WeightedSums
from ane_trainer.ane.capture.trace.torch_private import (
    causal_masks_as_given,
    checkpoints_run_once,
    is_all_true,
)

Function = Callable[..., object]
Knows = Callable[[torch.Tensor], bool]


class RewriteMode(TorchFunctionMode):
    """Replaces the functions of `REWRITES` by their replacements; holds what one capture knows of its tensors."""

    def __init__(self, values_known: bool = False, knows: Knows | None = None) -> None:
        super().__init__()
        self._masks = Masks(knows) if knows is not None else None
        self._packed = PackedSequences(values_known)
        self._table: dict[Function, Function] = {
            **REWRITES, **WeightedSums(_getitem).rewrites, lengths_of: self._packed.lengths,
            as_rows: self._packed.mark_rows,
        }  # fmt: skip
        #: By name: these have no function object of their own in Python.
        self._by_name: dict[str, Function] = {
            "_pack_padded_sequence": self._packed.pack, "_pad_packed_sequence": self._packed.pad,
        }  # fmt: skip

    def __torch_function__(
        self, func: Function, types: object, args: Any = (), kwargs: dict[str, object] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self._masks is not None:
            found = self._selection(self._masks, func, args, kwargs or {})
            if found is not None:
                return found[0]
        replacement = self._by_name.get(name) or self._table.get(func)
        result = (replacement or func)(*args, **(kwargs or {}))
        if self._masks is not None:
            self._masks.note(func, args, kwargs, result)
        if args and self._packed.is_rows(args[0]) and name not in self._by_name and func not in _OF_ROWS:
            kept = name in _REDUCING and _keeps_rows(name, args[0], args[1:], kwargs or {})
            if replacement is None or (name in _REDUCING and not kept):
                check_use(name)
            if replacement is None or kept or name in ROW_BY_ROW:
                self._packed.mark_rows(result)
        return result

    def _selection(
        self, masks: Masks, func: Function, args: Any, kwargs: dict[str, Any]
    ) -> tuple[object] | None:
        """The result of a call that selects by a computed mask, or that takes what was selected; None for others."""
        if places.concerns(func, args):
            with self:
                return places.apply(masks, func, args, kwargs)
        if (
            any(isinstance(a, Selected) for a in (*args, *kwargs.values()))
            and func is not torch.Tensor.__setitem__
        ):
            with self:
                return (selections.apply(func, args, kwargs),)
        if func is torch.Tensor.__getitem__ and masks.takes(args[1]):
            return (masks.select(args[0], args[1]),)
        if func is torch.Tensor.__setitem__ and isinstance(args[2], Selected):
            masks.put(args[0], args[1], args[2])
            return (None,)
        if func in (torch.masked_select, torch.Tensor.masked_select):
            return (masks.masked_select(*args, **kwargs),)
        return None


@contextlib.contextmanager
def rewriting(values_known: bool = False, knows: Knows | None = None) -> Iterator[None]:
    """`RewriteMode`, and what changes torch otherwise while the block runs; `values_known` as in `PackedSequences`.

    `knows` tells tensors whose values are known: masks of other values select without a shape (`selections`).

    `torch.distributions` does not look at its parameters' and samples' values (programs have no exceptions), and
    checkpointed parts run once: the program recomputes nothing, and their dropouts are drawn once.
    """
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with checkpoints_run_once(), causal_masks_as_given(), RewriteMode(values_known, knows):
            yield
    finally:
        Distribution.set_default_validate_args(checks)


#: Functions that are made for rows of packed sequences, and replaced ones that reduce them.
_OF_ROWS: tuple[Function, ...] = (lengths_of, as_rows)
_REDUCING = ("sum", "mean", "binary_cross_entropy", "kl_div", "gaussian_nll_loss", "multi_margin_loss",
             "multilabel_margin_loss", "ctc_loss", "histc", "logcumsumexp")  # fmt: skip


def _keeps_rows(name: str, rows: torch.Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether a sum or mean is over other axes than that of the rows."""
    axes = axes_of_sum(rows.dim(), args, kwargs) if name in ("sum", "mean") else None
    return axes is not None and 0 not in axes


def _all_true(tensor: torch.Tensor) -> torch.Tensor:
    """What a distribution made before, with its checks on, asks of samples; calibration answered it."""
    return torch.ones((), dtype=torch.bool)


def _embedding(
    input: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The gradient is dense: a program has no sparse tensors."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)


def _getitem(x: torch.Tensor, index: Any) -> torch.Tensor:
    """`x[i]` with a tensor `i` of rank 0 reads its value; `index_select` does not."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(map(_is_scalar_index, parts)):
        return torch.Tensor.__getitem__(x, index)
    axis = 0
    for number, part in enumerate(parts):
        if part is Ellipsis:
            axis = x.dim() - sum(_axes(p) for p in parts[number + 1 :])
        elif _is_scalar_index(part):
            x = x.index_select(axis, part.reshape(1).to(torch.int64) % x.shape[axis])
            parts[number] = 0
            axis += 1
        else:
            axis += _axes(part)
    return torch.Tensor.__getitem__(x, tuple(parts))


def _setitem(x: torch.Tensor, index: Any, value: object) -> None:
    """`x[i] = value` with one tensor `i` of rank 0 among numbers and slices, as `index_copy_`, which reads no value."""
    parts = list(index) if isinstance(index, tuple) else [index]
    scalars = [n for n, part in enumerate(parts) if _is_scalar_index(part)]
    others = [part for n, part in enumerate(parts) if n not in scalars]
    if len(scalars) != 1 or any(isinstance(part, (torch.Tensor, list)) for part in others):
        torch.Tensor.__setitem__(x, index, value)  # type: ignore[assignment]
        return
    place = scalars[0]
    view = torch.Tensor.__getitem__(x, tuple(slice(None) if n == place else p for n, p in enumerate(parts)))
    axis = sum(part is None or isinstance(part, slice) for part in parts[:place])
    if Ellipsis in parts[:place]:
        axis += x.dim() - sum(_axes(part) for part in parts)
    given = torch.as_tensor(value, dtype=x.dtype)
    while given.dim() > view.dim() - 1 and given.shape[0] == 1:  # as PyTorch takes them
        given = given.squeeze(0)
    rest = [*view.shape[:axis], *view.shape[axis + 1 :]]
    chosen = parts[place].reshape(1).to(torch.int64) % view.shape[axis]
    view.index_copy_(axis, chosen, given.expand(rest).unsqueeze(axis))


def _is_scalar_index(part: object) -> bool:
    return (
        isinstance(part, torch.Tensor)
        and part.dim() == 0
        and part.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
    )


def _axes(part: object) -> int:
    """How many axes of the tensor a part of an index takes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1


def _set_data(x: torch.Tensor, value: torch.Tensor) -> None:
    """`x.data = value` as a write into x, which stays the step's own; another shape or type is for PyTorch to take."""
    if x.shape != value.shape or x.dtype != value.dtype:
        x.data = value
        return
    with torch.no_grad():
        x.detach().copy_(value)


REWRITES: dict[Function, Function] = {
    F.one_hot: one_hot, is_all_true: _all_true, F.embedding: _embedding, F.embedding_bag: embedding_bag,
    torch.Tensor.__getitem__: _getitem, torch.Tensor.__setitem__: _setitem, F.gaussian_nll_loss: gaussian_nll,
    torch.logcumsumexp: logcumsumexp, torch.Tensor.logcumsumexp: logcumsumexp, F.multi_margin_loss: multi_margin,
    F.multilabel_margin_loss: multi_label_margin, F.ctc_loss: ctc_loss, torch.histc: histc,
    F.soft_margin_loss: soft_margin, torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}  # fmt: skip
