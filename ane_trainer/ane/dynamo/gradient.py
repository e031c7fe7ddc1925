"""The backward program, and the power of two that keeps its gradients within fp16.

A backward graph is linear in the gradients that come in, so they are multiplied by a power of two, the
program runs, and what comes out is divided by it in fp32. The power follows the gradients: Q15.16 products
below 2^-17 vanish (M6 notes/numerics.md), sums from 32768 on overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ane_trainer.ane.dynamo.options import Options
from ane_trainer.ane.dynamo.programs import GraphFunction
from ane_trainer.ane.dynamo.torch_private import make_boxed_func

#: A gradient of this magnitude or more counts as an overflow.
OVERFLOW = 32768.0
#: Wanted range of the largest gradient that comes out.
LOW, HIGH = 512.0, 8192.0
#: Bounds of the largest gradient that goes in, as powers of two.
SMALLEST_POWER, LARGEST_POWER = -14, 12


def backward_function(
    module: GraphModule, example_inputs: Sequence[object], options: Options
) -> Callable[..., object]:
    """The compiler that AOTAutograd calls for backward graphs."""
    del example_inputs
    return make_boxed_func(Backward(module, options))


class Backward:
    """A backward graph as a function; `power` is that of two to which the largest incoming one is brought."""

    def __init__(self, module: GraphModule, options: Options) -> None:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._tangents = [i for i, node in enumerate(placeholders) if node.name.startswith("tangents")]
        self._function = GraphFunction(module, options, "backward")
        self.power = 6

    def __call__(self, *inputs: Any) -> list[object]:
        """The gradients in fp32; nan everywhere if one that comes in is not finite, as PyTorch would spread it."""
        values = list(inputs)
        peak = max((float(values[i].abs().amax()) for i in self._tangents if values[i].numel()), default=0.0)
        finite = math.isfinite(peak)
        while True:
            scale = 2.0 ** (self.power - math.frexp(peak)[1]) if finite and peak else 1.0
            for i in self._tangents:
                values[i] = inputs[i] * scale if finite else torch.zeros_like(inputs[i])
            results = self._function(values, 1 << 30)
            largest = max((float(r.abs().amax()) for r in results if _gradient(r)), default=0.0)
            if largest < OVERFLOW or self.power <= SMALLEST_POWER:
                break
            self.power -= 4
        if largest > HIGH:
            self.power -= 1
        elif 0.0 < largest < LOW and self.power < LARGEST_POWER:
            self.power += 1
        factor = 1.0 / scale if finite else math.nan
        return [r * factor if _gradient(r) else r for r in results]


def _gradient(result: object) -> bool:
    return isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel() > 0
