"""Warn of inputs from which the graph subtracts numbers near them: what is left is mostly fp16's rounding of the input.

`(x - 1.6e9).float()`, x in seconds; `x - x.mean(0)`, x near 100,000 with a deviation of 50
"""

from __future__ import annotations

import warnings

from torch.fx import Node

from ane_trainer.ane.capture.range.editing import aten, in_update, is_float, number
from ane_trainer.ane.capture.range.exponents import Exponents
from ane_trainer.ane.capture.range.norms import centred
from ane_trainer.ane.capture.trace.moves import CAST, TAKEN
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.errors import NumericsWarning
from ane_trainer.ane.stages import Captured, Port

#: Share of a difference that the rounding of an input may be, and of values on the way.
_BORNE, _BORNE_WITHIN = 0.1, 0.2
#: An input below this in magnitude is rounded by less than a training example's own noise, where the step is proved.
_LARGE = 2048.0
#: A step of fp16, relative.
_STEP = 2.0**-11
_SAME = CAST | TAKEN
_DIFFERENCES = ("aten.sub.", "aten.add.", "aten.rsub.")


def tell_of_near_numbers(exponents: Exponents, captured: Captured, exact: bool) -> None:
    """A NumericsWarning for each such input. `exact`: ports without bounds hold numbers that fp16 does not round, and
    what rounding costs is told by the proof of the step.

    Without that proof (`torch.compile`, whose backward takes what the forward kept as it is) small inputs count, and
    so do values on the way that are centred, as norms do.
    """
    nodes = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    if any(n.name.startswith("tangents") for n in nodes):  # of gradients, and of what the forward told
        return
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
            if known is None or (exact and (known.peak <= _LARGE or port.bounds is None)):
                continue
            own = min(noise, _STEP * known.rms)  # the rest is not the input's
            if size.rms < own / _BORNE and port.role == "batch" and port.target not in told:
                told.add(port.target)
                name = port.target if exact else "an input"
                _tell(
                    node, f"takes a number near it from {name} (up to {known.peak:.3g}), and fp16's rounding of it",
                    own / size.rms, "Subtract an origin before you pass it (in the data, in float64).",
                )  # fmt: skip
        source = None if exact or told else centred(node)
        known = None if source is None else exponents.found.get(source.name)
        if known is not None and size.rms < min(noise, _STEP * known.rms) / _BORNE_WITHIN:
            told.add(node.name)
            text = "subtracts a mean from numbers near it, and fp16's rounding of them"
            fix = "Normalise earlier, or leave out a bias that large."
            _tell(node, text, min(noise, _STEP * known.rms) / size.rms, fix)


def _tell(node: Node, text: str, share: float, fix: str) -> None:
    place = node.meta.get(META_KEY, node.name)
    warnings.warn(
        f"{place}: {text} is {min(100 * share, 100.0):.0f} % of what is left. {fix}",
        NumericsWarning,
        stacklevel=3,
    )


def _input(node: Node, ports: dict[Node, Port]) -> Port | None:
    """The port whose numbers, moved or times a number, a node gives."""
    while node.op == "call_function" and (
        node.target in _SAME or (node.target is aten.mul.Tensor and number(node.args[1]) is not None)
    ):
        node = node.all_input_nodes[0]
    return ports.get(node)
