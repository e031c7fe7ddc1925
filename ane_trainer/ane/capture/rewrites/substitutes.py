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
from torch.utils import checkpoint

from ane_trainer.ane.capture.rewrites import logits, packed
from ane_trainer.ane.capture.rewrites.bags import embedding_bag
from ane_trainer.ane.capture.rewrites.criteria import (
    gaussian_nll,
    logcumsumexp,
    multi_label_margin,
    multi_margin,
    one_hot,
)
from ane_trainer.ane.capture.rewrites.ctc import ctc_loss
from ane_trainer.ane.capture.rewrites.experts import histc

Function = Callable[..., Any]


class RewriteMode(TorchFunctionMode):
    """Replaces the functions of `REWRITES` by their replacements."""

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        replacement = _PACKED.get(name) or REWRITES.get(func)
        if replacement is not None:
            return replacement(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if args and packed.is_rows(args[0]):
            packed.check_use(name)
            packed.rows_of(result)
        return result


@contextlib.contextmanager
def rewriting() -> Iterator[None]:
    """`RewriteMode`, and what changes torch otherwise while the block runs.

    `torch.distributions` does not look at its parameters' and samples' values (programs have no exceptions), and
    checkpointed parts run once: the program recomputes nothing, and their dropouts are drawn once.
    """
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    halves = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction
    checkpoint._checkpoint_without_reentrant_generator = _run_once
    checkpoint.CheckpointFunction = _RunOnce  # type: ignore[misc,assignment]
    try:
        with RewriteMode():
            yield
    finally:
        Distribution.set_default_validate_args(checks)
        checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction = halves  # type: ignore[misc]


def _run_once(*_: Any, **__: Any) -> Iterator[None]:
    yield


class _RunOnce:
    """Stands for the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Function, _preserve: bool, *args: Any) -> Any:
        return function(*args)


def _all_true(tensor: torch.Tensor) -> torch.Tensor:
    """What a distribution made before, with its checks on, asks of samples; the rehearsal answered for the example."""
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


def _is_scalar_index(part: Any) -> bool:
    return (
        isinstance(part, torch.Tensor)
        and part.dim() == 0
        and part.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
    )


def _axes(part: Any) -> int:
    """How many axes of the tensor a part of an index takes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1


REWRITES: dict[Function, Function] = {
    F.one_hot: one_hot, torch._is_all_true: _all_true, F.embedding: _embedding, F.embedding_bag: embedding_bag,
    torch.Tensor.__getitem__: _getitem, F.gaussian_nll_loss: gaussian_nll, torch.logcumsumexp: logcumsumexp,
    torch.Tensor.logcumsumexp: logcumsumexp, F.multi_margin_loss: multi_margin,
    F.multilabel_margin_loss: multi_label_margin, F.ctc_loss: ctc_loss, torch.histc: histc, **logits.REWRITES,
}  # fmt: skip
#: By name: these have no function object of their own in Python.
_PACKED: dict[str, Function] = {"_pack_padded_sequence": packed.pack, "_pad_packed_sequence": packed.pad}
