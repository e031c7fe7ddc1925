"""Find inputs whose rounding to fp16 matters in full: large times and positions under a sine, or truncated to integers.

fp16 has 11 bits. A number of the batch above 2048 is rounded by up to half a unit and more; a loss or a layer bears
that as every rounding, an angle in radians or a remainder does not. Nor does a small number that is multiplied before
(positions in -1 ... 1 times 2^9 pi, as radiance fields encode them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from ane_trainer.ane.compiler.lower.indices.codes import MOVES
from ane_trainer.ane.compiler.lower.indices.ranges import constant_of, integral, packet_name
from ane_trainer.ane.stages import Captured

#: Half a step of fp16, relative.
_ROUNDING = 2.0**-12
#: The largest error that an op with a period or steps of about 1 bears.
_BEARABLE = {
    **dict.fromkeys("sin cos tan".split(), 0.1),
    **dict.fromkeys("floor ceil round frac trunc fmod remainder".split(), 0.25),
}
_SCALED = ("mul", "div", "mm", "bmm", "matmul", "outer", "ger")
_LINEAR = ("_to_copy", "add", "sub", "neg", "index", "index_select", "repeat_interleave", *_SCALED)


def exposed(captured: Captured, least: float, most: float) -> Iterator[tuple[Node, str, float]]:
    """(op, place in the batch, largest error of its argument) for the example's numbers that fp16 rounds too much.

    Of inputs whose largest number is above `least` and at most `most`; a port has bounds only if fp16 rounds some.
    """
    placeholders = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    for node, port in zip(placeholders, captured.inputs, strict=True):
        if port.role == "batch" and port.bounds is not None:
            largest = max(-port.bounds[0], port.bounds[1])
            if least < largest <= most:
                for op, size in sensitive(captured.graph, node, largest * port.scale):
                    if size * _ROUNDING > _BEARABLE[packet_name(op)]:
                        yield op, port.target or port.name, size * _ROUNDING


def largest_borne(graph: GraphModule, node: Node) -> float:
    """The largest magnitude of an input's numbers whose rounding all ops with a period or steps bear."""
    found = ((packet_name(op), size) for op, size in sensitive(graph, node, 1.0))
    return min((_BEARABLE[name] / (size * _ROUNDING) for name, size in found), default=math.inf)


def sensitive(graph: GraphModule, node: Node, largest: float) -> Iterator[tuple[Node, float]]:
    """(op with a period or steps, largest magnitude of its argument) that floats of an input reach by linear ops."""
    pending, seen = [(node, largest)], set()
    while pending:
        source, size = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        for user in source.users:
            name = packet_name(user)
            if name in _BEARABLE and not integral(user.meta.get("val")):
                yield user, size
            elif name in _SCALED:
                pending.append((user, size * _factor(graph, user, source)))
            elif ((name in MOVES or name in _LINEAR) and not integral(user.meta.get("val"))) or name in MOVES:
                pending.append((user, size))


def _factor(graph: GraphModule, user: Node, source: Node) -> float:
    """The largest constant that the source is multiplied by; 1 for one that is not known."""
    others: list[object] = [a for a in user.args[:2] if a is not source]
    if not others:
        return 1.0
    other = constant_of(graph, others[0]) if isinstance(others[0], Node) else others[0]
    if isinstance(other, torch.Tensor):
        other = float(other.detach().abs().amax()) if other.numel() else 1.0
    if not isinstance(other, (int, float)) or not other:
        return 1.0
    return 1.0 / abs(other) if packet_name(user) == "div" else abs(float(other))
