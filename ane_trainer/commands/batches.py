"""How many examples of a model this machine runs quickly, or holds at all, by one forward pass of a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.utils import format_bytes, memory_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ane_trainer.commands.subjects import Request

    Inputs = torch.Tensor | tuple[torch.Tensor, ...]

#: The least that a large model gets: batch norms need two.
FEWEST = 2
#: Multiply-accumulates and numbers of a forward pass up to which a batch counts as one that is quickly run.
_MACS, _NUMBERS = 4e9, 3e7
#: Numbers of four bytes that a step holds for each of a forward pass.
_COPIES = 3


def fitting(model: nn.Module, x: Inputs, most: int, work: float = 1.0) -> int:
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


def each_bytes(model: nn.Module, few: Inputs, more: Inputs) -> int:
    """The bytes that a step holds for one example more: the numbers of its inputs and of a forward pass, which backward
    needs, each as it is, as its gradient, and rounded. Weights and their views are in both passes, and fall out.
    """
    numbers, sizes = [], []
    for x in (few, more):
        inputs = x if isinstance(x, tuple) else (x,)
        numbers.append(_forward_work(model, inputs)[1] + sum(part.numel() for part in inputs))
        sizes.append(len(inputs[0]))
    return max(4 * _COPIES * (numbers[1] - numbers[0]) // (sizes[1] - sizes[0]), 1)


def check_memory(
    request: Request, name: str, model: nn.Module, usual: int, make: Callable[[int], Inputs]
) -> None:
    """Refuse a batch beyond the `usual` that this machine's memory does not hold, before any of it is made.

    `make`: makes examples. A model that takes one size of batch alone is judged by its inputs.
    """
    import torch

    from ane_trainer.ane.capture.calibrate import module_mode

    if request.batch <= usual:
        return
    memory = memory_bytes()
    try:
        with torch.random.fork_rng(devices=[]), module_mode(model, training=False):
            each = each_bytes(model, make(FEWEST), make(2 * FEWEST))
    except DataError:
        each = 4 * max(sum(math.prod(shape) for shape in request.shapes), 1)
    if request.batch > (most := memory // each):
        raise UsageError(
            f"{request.where}: --batch needs at most {most:,} examples of {name} here, each of which takes about "
            f"{format_bytes(each)} of this machine's {format_bytes(memory)}; got {request.batch:,}. Take fewer.",
            code="ANE104",
        )


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
