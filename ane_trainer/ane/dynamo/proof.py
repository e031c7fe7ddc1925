"""Compare a call of torch.compile's programs with the same graph in full precision."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.capture.range.calibration import Measured
from ane_trainer.ane.capture.range.departure import Eleven, Exactly, Half, error_of, run_all, without_masks
from ane_trainer.ane.capture.range.running import InOrder
from ane_trainer.ane.capture.trace.moves import RESHAPED
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.compiler.lower.registry import ACCEPTS
from ane_trainer.ane.mil.program import MAX_FP16

#: Relative difference from full precision up to which a result agrees; beyond, it may be this multiple of what rounding
#: to eleven bits costs, counted up to the third. Results count as the fourth share of the largest at least.
_TOLERATED, _OWN_ERRORS, _LARGEST_OWN, _LEAST_RESULT = 0.03, 3.0, 0.1, 1e-3
#: What the engine's rounding and tables leave of a sum that cancels, as a share of its terms without their signs.
_CANCELLED = 2.0**-8
#: Runs rounded up or down at random, where no operation departs: of ReLUs and max pools that rounding decides.
_ROUNDINGS = 4
#: Its third result is a bias's gradient.
_WITH_BIAS = torch.ops.aten.convolution_backward.default
_SUMS = (torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList)


@dataclass(frozen=True)
class Departed:
    """How far a result is from full precision, relative and as a norm."""

    relative: float
    norm: float


def departures(pairs: Mapping[Node, tuple[torch.Tensor, torch.Tensor]]) -> dict[Node, Departed]:
    """The errors of results (got, in full precision) that are beyond what always agrees."""
    pairs = {node: _without_fills(got, want) for node, (got, want) in pairs.items()}
    sizes = {node: float(want.norm()) for node, (_, want) in pairs.items()}
    least = _LEAST_RESULT * max(sizes.values(), default=0.0)
    found = {}
    for node, (got, want) in pairs.items():
        norm, size = float((got - want).norm()), sizes[node]
        relative = norm / max(size, least, 1e-30)
        if not relative <= _TOLERATED and math.isfinite(size):
            found[node] = Departed(relative, norm)
    return found


def _without_fills(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both without what stands for infinity, if the engine's ends where fp16 does: other numbers are in a unit."""
    peak = float(got.abs().amax())
    return without_masks(got, want) if peak in (MAX_FP16, MAX_FP16 + 32.0, math.inf) else (got, want)


@dataclass(frozen=True)
class Call:
    """A graph, what it took, and by number what came of it; `expected`: all results in full precision, if known."""

    graph: GraphModule
    values: Sequence[torch.Tensor]
    results: Mapping[int, torch.Tensor]
    expected: Sequence[torch.Tensor] = ()

    def in_words(self, role: str) -> str:
        """What departs, and first; empty if rounding to fp16 explains it."""
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        values = [v.detach().to(n.meta["val"].dtype) for n, v in zip(inputs, self.values, strict=True)]
        nodes = cast("Sequence[Node]", self.graph.graph.output_node().args[0])
        with torch.no_grad():
            expected = self.expected or ExactGraph(self.graph).run(*values)
        far = departures({nodes[i]: (got, expected[i].double()) for i, got in self.results.items()})
        return _in_words(self.graph, values, far, role) if far else ""


def _in_words(
    graph: GraphModule, values: Sequence[torch.Tensor], far: Mapping[Node, Departed], role: str
) -> str:
    """What departs, and first; empty if rounding to fp16, to nearest or at random, explains it.

    A sum whose terms cancel is what their rounding leaves: the gradient of a bias that is 0 by algebra.
    """
    runs = ExactGraph(graph), ElevenGraph(graph), HalfGraph(graph)
    run = run_all(runs, list(far), values)
    errors = {n: d.relative for n, d in far.items() if d.norm > _CANCELLED * runs[0].terms_of(n)}
    worst = max(errors, key=lambda node: errors[node], default=None)
    own, seeds = run.gradient_error, iter(range(_ROUNDINGS))
    while worst is not None and errors[worst] > _OWN_ERRORS * min(own, _LARGEST_OWN):
        seed = next(seeds, None) if run.first is None else None
        if seed is None:
            break
        with torch.no_grad():
            own = max(own, error_of(ExactGraph(graph), [ElevenGraph(graph, seed)], list(far), values))
    else:
        return ""
    place = f" First {run.first}." if run.first is not None else ""
    return (
        f"{worst.meta.get(META_KEY) or worst.name} ({role}): departs from fp32 by {100 * errors[worst]:.3g} %; "
        f"rounding to fp16 alone costs {100 * own:.1f} %.{place}"
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
    """In full precision; notes what the terms of sums come to without their signs."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._terms: dict[Node, float] = {}

    def changed(self, n: Node, result: object) -> object:
        """The result as it is."""
        biased = n.target is _WITH_BIAS
        source = self.env[n.all_input_nodes[0]] if biased or n.target in _SUMS else None
        if isinstance(source, torch.Tensor) and source.is_floating_point():
            dims = ([d for d in range(source.dim()) if d != 1],) if biased else n.args[1:]
            self._terms[n] = float(source.abs().sum(*dims).double().norm())
        return result

    def terms_of(self, node: Node) -> float:
        """The norm of the sums of magnitudes, for a sum in any shape; 0 for other nodes."""
        while node.op == "call_function" and node.target in RESHAPED:
            node = node.all_input_nodes[0]
        if node.target is operator.getitem and node.args[1] == 2:
            node = node.all_input_nodes[0]
        return self._terms.get(node, 0.0)


class ElevenGraph(Eleven, WholeGraph):
    """With results of eleven bits."""


class HalfGraph(Half, WholeGraph):
    """With results in fp16."""
