"""How large the numbers of a backward pass get: a loss scale must fit all of them, not only the parameters' gradients.

What leaves fp16 on the engine is not noticed there (65536 is an ordinary number, and later products make it small
again), so the scale is chosen from all that the calibration's backward pass computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ane_trainer.ane.capture.trace.torch_private import Decompositions, OpOverload, TorchDispatchMode, pytree


class _Peaks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest entry of every result, with operations decomposed as by capture."""

    def __init__(self, decompositions: Decompositions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._table = decompositions
        self.peaks: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Any = (), kwargs: dict[str, object] | None = None
    ) -> Any:
        decomposition = self._table.get(func)
        if decomposition is not None:
            with self:
                return decomposition(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.is_floating_point()
                and leaf.numel()
                and not leaf.is_sparse
            ):
                least, most = torch.aminmax(leaf.detach())
                self.peaks.append(torch.maximum(-least, most).float())
        return result


def gradients_and_largest_intermediate(
    value: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    decompositions: Decompositions,
) -> tuple[tuple[torch.Tensor | None, ...], float]:
    """(gradients of `value`, the largest finite number on the way to them that is proportional to them).

    The backward pass runs twice, from 1 and from 2: what doubles will be multiplied by the loss scale.
    """
    once, twice = _Peaks(decompositions), _Peaks(decompositions)
    one, two = torch.ones_like(value), torch.full_like(value, 2.0)
    try:
        with once:
            gradients = torch.autograd.grad(value, parameters, one, retain_graph=True, allow_unused=True)
    except (
        RuntimeError
    ):  # a decomposition that does not take these shapes: whoever records the step will say so
        return torch.autograd.grad(value, parameters, one, allow_unused=True), 0.0
    with twice:
        torch.autograd.grad(value, parameters, two, allow_unused=True)
    if not once.peaks or len(once.peaks) != len(twice.peaks):
        return gradients, 0.0
    first, second = torch.stack(once.peaks), torch.stack(twice.peaks)
    doubled = torch.isfinite(second) & ((second - 2.0 * first).abs() <= 1e-5 * second)
    return gradients, float(torch.where(doubled, first, 0.0).amax())
