"""The proof of a call of torch.compile's: its results against those of its graph in full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.capture.range.calibration import Measured
from ane_trainer.ane.capture.range.departure import Eleven, Exactly, Half, run_all
from ane_trainer.ane.capture.range.running import InOrder
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.compiler.lower.registry import ACCEPTS

#: Relative difference from full precision up to which a result agrees; beyond, it may be this multiple of what rounding
#: to eleven bits costs, counted up to the third. Results count as the fourth share of the largest at least.
_TOLERATED, _OWN_ERRORS, _LARGEST_OWN, _LEAST_RESULT = 0.03, 3.0, 0.1, 1e-3


def departures(pairs: Mapping[Node, tuple[torch.Tensor, torch.Tensor]]) -> dict[Node, float]:
    """The relative errors of results (got, in full precision) that are beyond what always agrees."""
    sizes = {node: float(want.norm()) for node, (_, want) in pairs.items()}
    least = _LEAST_RESULT * max(sizes.values(), default=0.0)
    errors = {n: float((got - want).norm()) / max(sizes[n], least, 1e-30) for n, (got, want) in pairs.items()}
    return {n: error for n, error in errors.items() if not error <= _TOLERATED and math.isfinite(sizes[n])}


def in_words(
    graph: GraphModule, values: Sequence[torch.Tensor], errors: Mapping[Node, float], role: str
) -> str:
    """What departs, and first; empty if rounding to fp16 explains it."""
    runs = ExactGraph(graph), ElevenGraph(graph), HalfGraph(graph)
    run = run_all(runs, list(errors), values)
    worst = max(errors, key=lambda node: errors[node])
    if errors[worst] <= _OWN_ERRORS * min(run.gradient_error, _LARGEST_OWN):
        return ""
    place = f" First {run.first}." if run.first is not None else ""
    return (
        f"{worst.meta.get(META_KEY) or worst.name} ({role}): departs from fp32 by {100 * errors[worst]:.3g} %; "
        f"rounding to fp16 alone costs {100 * run.gradient_error:.1f} %.{place}"
    )


class WholeGraph(InOrder):
    """A graph with the operands that `graphs.partition` left out computed again."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """One operation."""
        if str(target) in ACCEPTS["absent"] and "backward" in str(target):
            name = str(target).split(".")[1].removesuffix("_backward")
            forward = getattr(torch.ops.aten, f"{name}_forward" if "nll_loss" in name else name)
            spatial = 3 if "3d" in name else 2
            extents = [list(args[0].shape[-spatial:])] if "adaptive" in name else []
            args = (*args[:-1], forward(*args[1:-1], *extents)[1])
        return super().call_function(target, args, kwargs)


class MeasuredGraph(Measured, WholeGraph):
    """Notes the magnitude of each value."""


class ExactGraph(Exactly, WholeGraph):
    """In full precision."""


class ElevenGraph(Eleven, WholeGraph):
    """With results of eleven bits."""


class HalfGraph(Half, WholeGraph):
    """With results in fp16."""
