"""The magnitudes of every value of a captured graph, from runs on examples in full precision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.capture.range.choosing import Choices, parts_of
from ane_trainer.ane.capture.range.editing import TINY, aten, in_update
from ane_trainer.ane.capture.range.running import InOrder, in_step
from ane_trainer.ane.capture.trace.moves import MOVED, TAKEN


@dataclass(frozen=True)
class Magnitude:
    """Of one value: its largest entry, the root mean square of those that are not 0, and their share.

    `finite` is False where full precision itself gives infinities or nan. `part`: only of the entries that a `where`
    takes; others are beyond the range. `masked`: beside entries that stand for infinity. `spread`: `rms` is that of
    small entries which count (`divisors.py`), whatever the rounding of the large ones.
    """

    peak: float
    rms: float
    density: float
    finite: bool = True
    part: bool = False
    masked: bool = False
    spread: bool = False

    def joined(self, other: Magnitude) -> Magnitude:
        """Of both examples: the largest peak, the smallest size."""
        sizes = [m.rms for m in (self, other) if m.rms > 0.0]
        return Magnitude(
            max(self.peak, other.peak),
            min(sizes, default=0.0),
            max(self.density, other.density),
            self.finite and other.finite,
            self.part or other.part,
            self.masked or other.masked,
        )


#: Node name -> magnitude, or those of its results.
Magnitudes = Mapping[str, Magnitude]


def magnitudes(module: GraphModule, examples: Sequence[Sequence[torch.Tensor]]) -> dict[str, Magnitude]:
    """Run the graph on each example (values of its placeholders in order); what all of them show.

    The update of the weights is left out: its numbers are in units of their own (`optimizers/rules.py`).
    """
    found: dict[str, Magnitude] = {}
    parts = parts_of(module.graph)
    for example in examples:
        run = Measured(module, parts)
        with torch.no_grad():
            for _ in in_step([run], example):
                pass
        for node, taken in run.choices.found():
            run.found[node.name] = dataclasses.replace(measure(taken, *run.infinite(node)), part=True)
        found = {name: m.joined(found[name]) if name in found else m for name, m in run.found.items()}
    return found


def calibration_tensors(found: Magnitudes) -> dict[str, torch.Tensor]:
    """Magnitudes as tensors that a state keeps: names, and a row of four numbers for each."""
    rows = [[m.peak, m.rms, m.density, m.finite + 2.0 * m.part + 4.0 * m.masked] for m in found.values()]
    names = torch.tensor(list("\n".join(found).encode()), dtype=torch.uint8)
    return {"names": names, "sizes": torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)}


def calibration_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Magnitude]:
    """The magnitudes that `calibration_tensors` wrote; none for tensors that are not of its kind."""
    names, sizes = tensors.get("names"), tensors.get("sizes")
    if names is None or sizes is None:
        return {}
    words = bytes(names.tolist()).decode(errors="replace").split("\n") if names.numel() else []
    if tuple(sizes.shape) != (len(words), 4):
        return {}
    return {
        word: Magnitude(
            float(peak), float(rms), float(density), *(bool(int(flags) & bit) for bit in (1, 2, 4))
        )
        for word, (peak, rms, density, flags) in zip(words, sizes.tolist(), strict=True)
    }


#: Numbers from here down stand for minus infinity where no other entry comes near them (masks of attention).
_MASK, _GAP = -1e4, 16.0
#: From here down they do whatever else there is (torch.finfo(...).min, -1e9); from here up where it is one number, and
#: no other is beyond the second.
_INFINITE, _ORDINARY = -1e8, 1e4
#: Sums of a fill and ordinary numbers are this close to each other, and its products with such.
_ALIKE, _PRODUCTS_ALIKE = 1.0 - 1e-4, 2.0**-6


def measure(tensor: torch.Tensor, alike: float = _ALIKE, fewest: int = 2) -> Magnitude:
    """The magnitude of a tensor; entries that stand for infinity (masks) do not count.

    Those from above do where there are fewer than `fewest`, or one is less than `alike` of the largest.
    """
    if not tensor.numel():
        return Magnitude(0.0, 0.0, 0.0)
    values = tensor.detach()
    low, high = (float(end) for end in torch.aminmax(values))
    if low <= _MASK:
        if low <= _INFINITE:
            return dataclasses.replace(measure(values[values > _INFINITE]), masked=True)
        others = values[values > _MASK]
        if others.numel() and float(others.abs().amax()) <= -_MASK / _GAP:
            return dataclasses.replace(measure(others), masked=True)
    finite = math.isfinite(low) and math.isfinite(high)
    if values.numel() < 4096:
        values = values.double()
    if not finite:
        values = values[torch.isfinite(values)]
    count = int(torch.count_nonzero(values))
    if not count:
        return Magnitude(0.0, 0.0, 0.0, finite)
    peak = max(-low, high) if finite else float(values.abs().amax())
    if peak >= -_INFINITE:  # a mask from above, as for a minimum: one number in several places
        ordinary, filled = values[values.abs() < -_INFINITE], values[values.abs() >= -_INFINITE]
        one = filled.numel() >= fewest and float(filled.abs().amin()) >= alike * peak
        if one and ordinary.numel() and float(ordinary.abs().amax()) <= _ORDINARY:
            return dataclasses.replace(measure(ordinary), masked=True)
    flat = values.reshape(-1).contiguous()
    if values.numel() >= 4096 and _SQUARABLE < peak < 1 / _SQUARABLE:
        squares = float(torch.dot(flat, flat))
    else:
        squares = peak**2 * float((flat / peak).square().sum(dtype=torch.float64))
    rms = math.sqrt(squares / count)
    return Magnitude(peak, rms, count / tensor.numel(), finite)


#: The mean square of numbers up to here and down to its inverse needs no other unit in float32.
_SQUARABLE = 1e-12

#: Types of which nothing is large.
_SMALL = (torch.bool, torch.uint8, torch.int8, torch.int16)
#: Prefix of the names of computed integers that are noted: those from the second on.
INTEGERS, LEAST_INTEGER = "integers/", 2.0**8


def _fed(node: Node) -> bool:
    """Whether a node is an input, or a part of one in another shape: those are held to the range of their port."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1 and node.target in TAKEN:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


#: Operations that put numbers side by side.
_JOINS = (aten.cat.default, aten.where.self, aten.masked_fill.Scalar, aten.index_put.default)


def _is_fill(size: Magnitude) -> bool:
    """Whether a value is one large number throughout."""
    return size.peak >= -_INFINITE and size.rms >= _ALIKE * size.peak and size.density == 1.0


class Measured(InOrder):
    """Runs a graph and notes the magnitude of each float value in front of the update, and of large integers."""

    def __init__(self, module: GraphModule, parts: frozenset[Node] | None = None) -> None:
        super().__init__(module)
        self.found: dict[str, Magnitude] = {}
        self.choices = Choices(parts_of(module.graph) if parts is None else parts)

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        held = n.meta.get("val") if n.op == "placeholder" else None
        if isinstance(held, torch.Tensor) and held.is_floating_point() and isinstance(result, torch.Tensor):
            result = result.to(held.dtype)  # whole numbers that only floats read
        if (
            not in_update(n)
            and TINY not in n.meta
            and isinstance(result, torch.Tensor)
            and result.is_floating_point()
        ):
            source = n.args[0] if n.target in MOVED else None
            known = self.found.get(source.name) if isinstance(source, Node) else None
            self.found[n.name] = known or measure(result, *self.infinite(n))
            self._fills(n)
        elif isinstance(result, torch.Tensor) and not result.is_complex() and result.numel() and not _fed(n):
            largest = 0 if result.dtype in _SMALL else float(result.double().abs().amax())
            if largest >= LEAST_INTEGER:
                self.found[INTEGERS + n.name] = Magnitude(largest, largest, 1.0)
        self.choices.see(n, self.env, result)
        return result

    def infinite(self, node: Node) -> tuple[float, int]:
        """How near each other, and how many, the largest numbers of a result have to be to stand for infinity."""
        known = [m for a in node.all_input_nodes if (m := self.found.get(a.name)) is not None]
        if node.target is aten.mul.Tensor and any(m.masked for m in known):
            return _PRODUCTS_ALIKE, 1
        return _ALIKE, 1 if node.target in _JOINS and any(map(_is_fill, known)) else 2

    def _fills(self, node: Node) -> None:
        """What stands for infinity in a result does so in the operand that is nothing else."""
        if node.target not in _JOINS or not self.found[node.name].masked:
            return
        for operand in node.all_input_nodes:
            size = self.found.get(operand.name)
            while size is not None and _is_fill(size):
                self.found[operand.name] = Magnitude(0.0, 0.0, 0.0, masked=True)
                if operand.op != "call_function" or operand.target not in TAKEN or len(operand.users) > 1:
                    break
                operand = operand.all_input_nodes[0]
                size = self.found.get(operand.name)
