"""Magnitudes inside the backward pass: the loss scale must fit all of them, not only the parameters' gradients.

What leaves fp16 on the engine is not noticed there (65536 is an ordinary number, and later products make it small
again), so the scale is chosen from all that the calibration's backward pass computes and the scale will multiply:
numbers that follow from the pass's first by operations that are linear in them. Where another operation is met
(`h.register_hook(lambda g: g.clamp(-1, 1))`), the pass runs a second time, from 2, and what doubles is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ane_trainer.ane.capture.trace.moves import CAST, TAKEN
from ane_trainer.ane.capture.trace.torch_private import (
    Decompositions,
    OpOverload,
    SideTable,
    TorchDispatchMode,
    pytree,
)

aten = torch.ops.aten

#: Linear in the first argument.
_IN_FIRST = CAST | TAKEN | frozenset((
    aten.neg.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.to.dtype,
    aten.div.Tensor, aten.div.Scalar, aten.convolution_backward.default, aten.threshold_backward.default,
    aten.gelu_backward.default, aten._log_softmax_backward_data.default, aten.nll_loss_backward.default,
    aten.nll_loss2d_backward.default, aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d_backward.default, aten.embedding_dense_backward.default,
    aten.upsample_bilinear2d_backward.default,
))  # fmt: skip
#: Linear in each of two arguments.
_IN_EITHER = frozenset((aten.mul.Tensor, aten.mul.Scalar, aten.mm.default, aten.bmm.default))
#: Linear in all arguments together.
_IN_ALL = frozenset((aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.slice_scatter.default,
                     aten.select_scatter.default, aten.where.self))  # fmt: skip


class _Peaks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest entry of every result, with operations decomposed as by capture.

    `linear`: every result that follows from `seed` is proportional to it, those whose place in `peaks` is in `follow`.
    """

    def __init__(self, decompositions: Decompositions, seed: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._table = decompositions
        self.peaks: list[torch.Tensor] = []
        self.linear = True
        self.follow: list[int] = []
        self._following: SideTable[bool] = SideTable()
        self._following[seed] = True

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Any = (), kwargs: dict[str, object] | None = None
    ) -> Any:
        decomposition = self._table.get(func)
        if decomposition is not None:
            with self:
                return decomposition(*args, **(kwargs or {}))
        following = self.linear and self._follows(func, args, kwargs)
        result = func(*args, **(kwargs or {}))
        for leaf in [result] if isinstance(result, torch.Tensor) else pytree.tree_leaves(result):
            if not isinstance(leaf, torch.Tensor):
                continue
            if following:
                self._following[leaf] = True
                self.linear = self.linear and leaf.is_floating_point()
            if leaf.is_floating_point() and leaf.numel() and not leaf.is_sparse:
                if following:
                    self.follow.append(len(self.peaks))
                least, most = torch.aminmax(leaf.detach())
                self.peaks.append(torch.maximum(-least, most).float())
        return result

    def _follows(self, func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object] | None) -> bool:
        """Whether the result follows from the seed; notes an operation that may not be linear in what does."""
        if kwargs and any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(kwargs)):
            self.linear = False
        items = args[0] if args and isinstance(args[0], (list, tuple)) else args  # of `cat`
        known = [self._following.get(item) is True for item in items]
        if func not in _LINEAR:
            leaves = pytree.tree_leaves(args)
            self.linear = self.linear and not any(self._following.get(leaf) is True for leaf in leaves)
            return False
        if not any(known):
            return False
        if func in _IN_ALL:
            self.linear = self.linear and all(
                is_known or _is_zero(func, number, item)
                for number, (item, is_known) in enumerate(zip(items, known, strict=True))
            )
        else:
            self.linear = self.linear and sum(known) == 1 and (func in _IN_EITHER or known[0])
        return True


_LINEAR = _IN_FIRST | _IN_EITHER | _IN_ALL


def _is_zero(func: OpOverload, number: int, argument: object) -> bool:
    """Whether an argument of an operation that is linear in all of them adds nothing; or is a place or a condition."""
    if not isinstance(argument, torch.Tensor):
        return func in (aten.slice_scatter.default, aten.select_scatter.default) and number > 1
    if func is aten.where.self and number == 0:
        return True
    return not torch.count_nonzero(argument)


def gradients_and_largest_intermediate(
    value: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    decompositions: Decompositions,
) -> tuple[tuple[torch.Tensor | None, ...], float]:
    """(gradients of `value`, the largest finite number on the way to them that is proportional to them)."""
    one = torch.ones_like(value)
    once = _Peaks(decompositions, one)
    try:
        with once:
            gradients = torch.autograd.grad(value, parameters, one, retain_graph=True, allow_unused=True)
    except (
        RuntimeError
    ):  # a decomposition that does not take these shapes: whoever records the step will say so
        return torch.autograd.grad(value, parameters, one, allow_unused=True), 0.0
    if not once.peaks:
        return gradients, 0.0
    first = torch.stack(once.peaks)
    if once.linear:
        doubled = torch.zeros(len(first), dtype=torch.bool)
        doubled[once.follow] = torch.isfinite(2.0 * first[once.follow])
    else:
        found = _doubled(first, value, parameters, decompositions)
        if found is None:
            return gradients, 0.0
        doubled = found
    return gradients, float(torch.where(doubled, first, 0.0).amax())


def _doubled(
    first: torch.Tensor,
    value: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    decompositions: Decompositions,
) -> torch.Tensor | None:
    """Which of the numbers double where the pass begins with 2; None if they are not the same numbers."""
    two = torch.full_like(value, 2.0)
    twice = _Peaks(decompositions, two)
    with twice:
        torch.autograd.grad(value, parameters, two, allow_unused=True)
    if len(twice.peaks) != len(first):
        return None
    second = torch.stack(twice.peaks)
    return torch.isfinite(second) & ((second - 2.0 * first).abs() <= 1e-5 * second)
