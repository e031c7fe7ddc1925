"""Names the first operation of a captured step whose numbers fp16 does not hold: a run with every result rounded."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from ane_trainer.ane.capture.range.editing import in_update
from ane_trainer.ane.capture.range.eleven import to_eleven_bits
from ane_trainer.ane.capture.range.running import InOrder, in_step
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.mil.program import MAX_FP16
from ane_trainer.ane.stages import Captured

#: What an operation may add to the error of its operands before it counts as the place where numbers depart.
_STEP = 0.02
#: Numbers of this magnitude stand for infinity.
_MASK = 1e8
#: Below this share of the largest gradient one counts as what cancellation left: a bias before a batch norm has 1e-9.
_LEAST = 1e-3
#: Above this error nothing is left of a gradient; operations at most between it and the update that reads it.
_LOST, _BETWEEN = 0.3, 6
#: Error of one product in the accumulator.
_PRODUCT = 2.0**-16 / math.sqrt(12.0)


@dataclass(frozen=True)
class Departure:
    """An operation by source and name, and what happens to its numbers."""

    where: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.op} {self.reason}"


@dataclass(frozen=True)
class Rounded:
    """What runs in rounded arithmetic show: the error of the gradients that eleven bits of any exponent cost, the
    first operation that departs in fp16, with its range, and the parameters of whose gradients rounding leaves nothing.
    """

    gradient_error: float
    first: Departure | None
    lost: frozenset[str] = frozenset()


def run_rounded(captured: Captured, values: Mapping[str, torch.Tensor]) -> Rounded:
    """Run the graph on the values of its ports: exactly, with results of eleven bits, and with fp16 results."""
    inputs = [values[p.name] for p in captured.inputs]
    runs = (Exactly(captured.graph), Eleven(captured.graph), Half(captured.graph))
    return run_all(runs, _gradients(captured), inputs)


def _gradients(captured: Captured) -> list[Node]:
    """What the update reads of the graph in front of it."""
    nodes = captured.graph.graph.nodes
    return [n for n in nodes if n.op != "placeholder" and any(in_update(u) for u in n.users)]


def run_all(
    runs: tuple[Exactly, Eleven, Half], chosen: Sequence[Node], inputs: Sequence[torch.Tensor]
) -> Rounded:
    """Run a graph exactly, with results of eleven bits, and in fp16; the error is that of the chosen nodes.

    The three go node by node, and values are let go after their last reader; the update is left out.
    """
    ends = set(chosen)
    found: dict[Node, _Compared] = {}
    with torch.no_grad():
        for node, (exact, eleven, half) in in_step(runs, inputs):
            if isinstance(exact, torch.Tensor) and exact.is_floating_point() and exact.numel():
                assert isinstance(eleven, torch.Tensor)
                assert isinstance(half, torch.Tensor)
                found[node] = _compared(exact, half, eleven if node in ends else None)
    least = _LEAST * max((item.size for n, item in found.items() if n in ends), default=0.0)
    errors = {n: item.half.relative(least if n in ends else 0.0) for n, item in found.items()}
    departing = (n for n in found if n.op == "call_function" and _departs(n, errors))
    first = next(departing, None)
    worst = max((item.eleven.relative(least) for n, item in found.items() if n in ends), default=0.0)
    lost = {n for n, item in found.items() if n in ends and item.eleven.relative(0.0, empty=math.inf) > _LOST}
    names = frozenset(name for n in lost for name in _updated_by(n))
    return Rounded(worst, None if first is None else _described(first, found[first]), names)


def _updated_by(gradient: Node) -> set[str]:
    """Parameters whose update reads this gradient, scaled and clipped in between."""
    names, near = set(), {gradient}
    for _ in range(_BETWEEN):
        near = {u for n in near for u in n.users if in_update(u) and _shape(u) == _shape(gradient)}
        sources = [str(n.meta.get(META_KEY)) for n in near]
        names |= {
            s.rpartition(" (")[2][:-1] for s in sources if s.startswith("optimizer ") and s.endswith(")")
        }
        near = {n for n in near if not str(n.meta.get(META_KEY)).startswith("optimizer ")}
    return names


def _shape(node: Node) -> object:
    return getattr(node.meta.get("val"), "shape", None)


def rounding_error(captured: Captured, values: Mapping[str, torch.Tensor], seeds: Sequence[int]) -> float:
    """The largest error of the gradients where each result is rounded to eleven bits, up or down at random.

    Which of two near entries a max pool takes, or whether a ReLU is open, is decided by the rounding.
    """
    inputs = [values[p.name] for p in captured.inputs]
    roundings = [Eleven(captured.graph, seed) for seed in seeds]
    return error_of(Exactly(captured.graph), roundings, _gradients(captured), inputs)


def error_of(
    exactly: Exactly, roundings: Sequence[Eleven], chosen: Sequence[Node], inputs: Sequence[torch.Tensor]
) -> float:
    """The largest error of the chosen nodes in any of the roundings of a graph."""
    ends, found = set(chosen), dict[Node, list[_Error]]()
    with torch.no_grad():
        for node, (exact, *rounded) in in_step((exactly, *roundings), inputs):
            if (
                node in ends
                and isinstance(exact, torch.Tensor)
                and exact.is_floating_point()
                and exact.numel()
            ):
                found[node] = [_error(r, exact) for r in rounded if isinstance(r, torch.Tensor)]
    least = _LEAST * max((e.size for errors in found.values() for e in errors), default=0.0)
    return max((e.relative(least) for errors in found.values() for e in errors), default=0.0)


@dataclass(frozen=True)
class _Error:
    """Norm of an error, and of what it is an error of."""

    error: float
    size: float

    def relative(self, least: float, empty: float = 0.0) -> float:
        """The error relative to the size, or to `least` if that is larger; `empty` where there is no size."""
        return self.error / max(self.size, least) if self.size else empty


@dataclass(frozen=True)
class _Compared:
    """A value of the exact run beside the others: errors, and the largest magnitudes, exact and in fp16; `size` is its
    norm, where eleven bits are compared.
    """

    size: float
    half: _Error
    eleven: _Error
    peak: float
    half_peak: float


def _compared(exact: torch.Tensor, half: torch.Tensor, eleven: torch.Tensor | None) -> _Compared:
    peaks = (float(exact.abs().amax()), float(half.abs().amax()))
    other = _Error(0.0, 0.0) if eleven is None else _error(eleven, exact)
    size = 0.0 if eleven is None else _finite_norm(exact)
    return _Compared(size, _error(half, exact), other, *peaks)


def _finite_norm(value: torch.Tensor) -> float:
    norm = float(value.double().norm())
    return norm if math.isfinite(norm) else 0.0


def without_masks(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with 0 where they stand for infinity."""
    if not want.numel() or not largest(want) >= _MASK:
        return got, want
    masks = (want.abs() >= _MASK) & (got.abs() >= MAX_FP16)
    return (got.masked_fill(masks, 0.0), want.masked_fill(masks, 0.0)) if bool(masks.any()) else (got, want)


def largest(value: torch.Tensor) -> float:
    """The largest magnitude; infinite for nan."""
    least, most = (float(end) for end in value.aminmax())
    return math.inf if math.isnan(most) else max(-least, most)


def _error(got: torch.Tensor, want: torch.Tensor) -> _Error:
    """The error of a value; numbers that stand for minus infinity are as they should be if they are beyond fp16."""
    got, want = without_masks(got, want)
    size = _finite_norm(want)
    return _Error(float((got - want).double().norm()) if size else 0.0, size)


def _departs(node: Node, errors: Mapping[Node, float]) -> bool:
    before = max((errors.get(a, 0.0) for a in node.all_input_nodes), default=0.0)
    return errors[node] > _STEP + 2.0 * before


def _described(node: Node, found: _Compared) -> Departure:
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    where = str(node.meta.get(META_KEY, node.name))
    peak = found.peak
    if found.half_peak >= MAX_FP16:
        reason = f"reaches {peak:.3g}, beyond what fp16 holds; divide what goes in"
    elif peak < 2.0**-10:
        reason = f"is {peak:.3g} at most, too small for fp16; multiply what goes in"
    else:
        reason = "loses its small entries, or the difference of near numbers; subtract or normalise earlier"
        if _behind_exponential(node):
            reason = "loses the small ones of exponentials; softmax, log_softmax or logsumexp in their place keep them"
    return Departure(where, str(node.target).removeprefix("aten.").partition(".")[0], reason)


def _behind_exponential(node: Node) -> bool:
    """Whether an exponential is at most four operations in front of the node."""
    nodes = {node}
    for _ in range(5):
        if any(n.target is torch.ops.aten.exp.default for n in nodes):
            return True
        nodes = {source for n in nodes for source in n.all_input_nodes}
    return False


class Exactly(InOrder):
    """Runs a graph, and lets a subclass change each result in front of the update."""

    def run_node(self, n: Node) -> object:
        """Run one node; the result that the next nodes see."""
        return self.changed(n, super().run_node(n))

    def changed(self, n: Node, result: object) -> object:
        """The result that the next nodes see."""
        return result


class Rounding(Exactly):
    """Rounds each result in front of the update.

    Where that gives the same number each time, what comes in, a model's weights above all, is rounded where it is read
    and not held twice, and a view of a rounded result is left as it is.
    """

    again = True

    def run_node(self, n: Node) -> object:
        """Run one node; the result that the next nodes see, of an input as it is."""
        if self.again and n.op == "placeholder":
            return InOrder.run_node(self, n)
        return super().run_node(n)

    def value(self, node: Node) -> object:
        """What the next nodes see of one."""
        held = super().value(node)
        return self.changed(node, held) if self.again and node.op == "placeholder" else held

    def map_nodes_to_values(self, args: Argument, n: Node) -> Argument:
        """Operands as they are read."""
        return map_arg(args, lambda node: cast(Argument, self.value(node)))

    def changed(self, n: Node, result: object) -> object:
        """The rounded result."""
        if in_update(n) or not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        return result if self.again and self._is_view(n, result) else self.rounded(n, result)

    def _is_view(self, n: Node, result: torch.Tensor) -> bool:
        place = result.untyped_storage().data_ptr()
        sources = [self.env.get(source) for source in n.all_input_nodes if source.op != "placeholder"]
        return any(
            isinstance(s, torch.Tensor)
            and s.dtype == result.dtype
            and s.untyped_storage().data_ptr() == place
            for s in sources
        )

    def rounded(self, n: Node, result: torch.Tensor) -> torch.Tensor:
        """A result of this node rounded."""
        raise NotImplementedError


class Eleven(Rounding):
    """Rounds each result to eleven significant bits, of any exponent; with a seed up or down at random."""

    def __init__(self, module: torch.fx.GraphModule, seed: int | None = None) -> None:
        super().__init__(module)
        self._draws = None if seed is None else torch.Generator().manual_seed(seed)
        self.again = seed is None

    def rounded(self, n: Node, result: torch.Tensor) -> torch.Tensor:
        """The rounded result."""
        return to_eleven_bits(result, self._draws)


class Half(Rounding):
    """Rounds each result to fp16; products below the accumulator's step vanish, sums beyond its range overflow."""

    def rounded(self, n: Node, result: torch.Tensor) -> torch.Tensor:
        """The rounded result."""
        name = str(n.target)
        if n.op == "call_function" and ("mm" in name or "convolution" in name):
            result = torch.where(result.abs() < _PRODUCT, 0.0, result)
            result = torch.where(result.abs() >= 32768.0, result.sign() * MAX_FP16 * 1.0005, result)
        return result.clamp(-65536.0, 65536.0).half().float()
