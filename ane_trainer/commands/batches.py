"""How many examples of a model this machine runs quickly, by the work of one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

#: The least that a large model gets: batch norms need two.
FEWEST = 2
#: Multiply-accumulates and numbers of a forward pass up to which a batch counts as one that is quickly run.
_MACS, _NUMBERS = 4e9, 3e7


def fitting(
    model: nn.Module, x: torch.Tensor | tuple[torch.Tensor, ...], most: int, work: float = 1.0
) -> int:
    """The largest power of two of examples, up to `most`, that is quickly run; FEWEST at least (`most` if less).

    By the multiply-accumulates and the numbers of a forward pass over `x`; `work`: the share of them that is quick.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    macs, numbers = _forward_work(model, inputs)
    share = max(macs / _MACS, numbers / _NUMBERS) / work / max(len(inputs[0]), 1)
    size = most
    while size > FEWEST and size * share > 1:
        size = max(size // 2, FEWEST)
    return size


def _forward_work(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    """Multiply-accumulates of products and convolutions of a forward pass, and the numbers of all its results."""
    import torch

    from ane_trainer.ane.capture.trace.torch_private import TorchDispatchMode

    aten = torch.ops.aten
    factors = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}
    found = [0, 0]

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: object, args: Any = (), kwargs: dict[str, object] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                found[1] += result.numel()
                if func in factors:
                    found[0] += result.numel() * args[factors[func]].shape[-1]
                elif func is aten.convolution.default:
                    found[0] += result.numel() * args[1][0].numel()
            return result

    with torch.enable_grad(), Count():  # type: ignore[no-untyped-call]
        model(*(part.clone() for part in inputs))
    return found[0], found[1]
