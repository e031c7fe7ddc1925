"""Warn of inputs from which the graph subtracts numbers near them: what is left is mostly fp16's rounding of the input.

`(x - 1.6e9).float()`, x in seconds; `x - x.mean(0)`, x near 100,000 with a deviation of 50
"""

from __future__ import annotations

import warnings

from torch.fx import Node

from ane_trainer.ane.capture.range.editing import aten, in_update, is_float, number
from ane_trainer.ane.capture.range.exponents import Exponents
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.errors import NumericsWarning
from ane_trainer.ane.stages import Captured, Port

#: Share of a difference that the rounding of an input may be.
_BORNE = 0.1
#: An input below this in magnitude is rounded by less than a training example's own noise.
_LARGE = 2048.0
#: A step of fp16, relative.
_STEP = 2.0**-11
_SAME = (aten._to_copy.default, aten.view.default, aten.unsqueeze.default, aten.expand.default,
         aten.permute.default, aten.slice.Tensor, aten.select.int, aten.clone.default)  # fmt: skip
_DIFFERENCES = ("aten.sub.", "aten.add.", "aten.rsub.")


def tell_of_near_numbers(exponents: Exponents, captured: Captured, exact: bool) -> None:
    """A NumericsWarning for each such input. `exact`: ports without bounds hold numbers that fp16 does not round."""
    nodes = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    ports = dict(zip(nodes, captured.inputs, strict=True))
    told: set[str] = set()
    for node in captured.graph.graph.nodes:
        if not str(node.target).startswith(_DIFFERENCES) or in_update(node) or not is_float(node):
            continue
        size, noise = exponents.found.get(node.name), exponents.noise.get(node, 0.0)
        if size is None or not 0.0 < size.rms < noise / _BORNE:
            continue
        for port in filter(None, (_input(source, ports) for source in node.all_input_nodes)):
            known = exponents.found.get(port.name)
            if known is None or known.peak <= _LARGE or (exact and port.bounds is None):
                continue
            own = min(noise, _STEP * known.rms)  # the rest is not the input's
            if size.rms < own / _BORNE and port.role == "batch" and port.target not in told:
                told.add(port.target)
                place, name = node.meta.get(META_KEY, node.name), port.target or port.name
                share = f"{100 * own / size.rms:.0f} %"
                warnings.warn(
                    f"{place}: takes a number near it from {name} (up to {known.peak:.3g}), and fp16's rounding of it "
                    f"is {share} of what is left. Subtract an origin before you pass it (in the data, in float64).",
                    NumericsWarning,
                    stacklevel=2,
                )


def _input(node: Node, ports: dict[Node, Port]) -> Port | None:
    """The port whose numbers, moved or times a number, a node gives."""
    while node.op == "call_function" and (
        node.target in _SAME or (node.target is aten.mul.Tensor and number(node.args[1]) is not None)
    ):
        node = node.all_input_nodes[0]
    return ports.get(node)
