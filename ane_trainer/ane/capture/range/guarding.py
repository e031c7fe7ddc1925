"""Guard values of the step that a later batch may push out of fp16, so that no such number reaches the weights.

Backward: what is stored larger than it is, or becomes smaller on its way, comes back as an ordinary number if it
leaves fp16, which no gradient shows. Forward: of each module the largest value, where the example brings it near the
end of the range. Both are among the gradients that have to fit; the step is skipped, and the forward's magnitudes stand
at the end of the health result, so that the host can name the module (a step that is divided at its gradients skips,
and counts, without). Programs of torch.compile have no health result: there the magnitudes are results of their own.

A step costs 9 ops more of 511 in a CNN with batch norm whose inputs are of 600, where two modules are watched, and none
where no value of the example is above 256. Test: `test_guarding.py`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch.fx import Graph, Node

from ane_trainer.ane.capture.range.bands import ALIGNED, BOUNDED, CONTRACTIONS, LINEAR, PRODUCTS, reads_number
from ane_trainer.ane.capture.range.calibration import INTEGERS
from ane_trainer.ane.capture.range.editing import aten, in_update, is_float, number, shape_of
from ane_trainer.ane.capture.range.exponents import Exponents
from ane_trainer.ane.capture.range.norms import REDUCTIONS, is_square
from ane_trainer.ane.capture.range.rows import DONE
from ane_trainer.ane.capture.scaling import HEALTH, OVERFLOW, STATISTICS
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.stages import Captured

#: From this magnitude on, as stored in the example, a value is watched (of the backward pass of a step: from the second
#: on); one of the backward pass if no gradient that is made of it is as large as the third share of it.
WATCHED, WATCHED_IN_STEPS, SHOWN = 2.0**8, 2.0**9, 0.5
#: A product of the forward pass whose factors are made of the same values (`x @ x.T`, scores of attention, a square)
#: grows twice as fast; one that is stored larger than it is, is watched: weights near 0 do not stay so. Squares of
#: what the model computes from the second on, of which no loss tells; each place has its value nearest to its limit.
WATCHED_TWICE, WATCHED_SQUARES, _ALWAYS = 2.0**5, 1.0, 2.0**-30
#: What goes into a buffer is watched from this magnitude on, through operations that begin with these; a mean of
#: squares always, as data a few hundred times larger than the example leave fp16 in a variance and nowhere else: of one
#: that is smaller in the example it is told, and the update, which does not read it, is kept.
WATCHED_IN_BUFFERS = 2.0**4
_JOINS = tuple(f"aten.{name}." for name in ("where", "add", "sub", "mul", "div", "maximum", "minimum"))
#: Functions that do not grow with their argument.
_SHRINK = BOUNDED | {"aten.rsqrt.default", "aten.reciprocal.default"}
#: The most values of the backward pass that are watched, the largest of each place.
MOST_WATCHED = 8
#: Numbers from here down stand for minus infinity.
_MASK = -1e4


def guard(
    exponents: Exponents, captured: Captured, scales: Sequence[Node], buffers: Collection[str] = ()
) -> tuple[str, ...]:
    """Add the guards to the graph, in place; returns the places of the forward pass that the health result tells of.

    `buffers`: targets of the state that the forward pass writes.
    """
    backward = set(scales)
    checks = []
    for node in exponents.graph.nodes:
        if not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
        if node.target is aten.lt.Scalar and node.args[1] == OVERFLOW and node in backward:
            checks.append(node)
    if not checks:
        return ()
    stored = [v for v in exponents.stored_larger() if v in backward and is_float(v) and not in_update(v)]
    stored = list(dict.fromkeys((*stored, *_vanishing(exponents, backward, WATCHED_IN_STEPS))))
    forward = list(_forward(exponents, captured, backward))
    chosen = {node for _, node in forward}
    forward += [pair for pair in _into_buffers(exponents, captured, buffers) if pair[1] not in chosen]
    if not stored and not forward:
        return ()
    exponents.here = checks[0]
    peaks = [_peak(exponents, node) for node in stored]
    seen = [_peak(exponents, node) for _, node in forward]
    peaks += [peak for (place, _), peak in zip(forward, seen, strict=True) if not place.endswith(STATISTICS)]
    together = exponents.emit(
        aten.amax.default, exponents.emit(aten.cat.default, [checks[0].args[0], *peaks])
    )
    checks[0].update_arg(0, exponents.emit(aten.view.default, together, [1]))
    health = _health(captured)
    if seen and health is not None:
        exponents.here = output = exponents.graph.output_node()
        longer = exponents.emit(aten.cat.default, [health, *seen])
        longer.meta[META_KEY] = health.meta.get(META_KEY, HEALTH)
        results = list(cast("Sequence[Node]", output.args[0]))
        output.args = ([longer if node is health else node for node in results],)
        exponents.changed = True
    return tuple(place for place, _ in forward) if health is not None else ()


def watch(exponents: Exponents, captured: Captured) -> list[tuple[Node, Node]]:
    """What `guard` watches, in a graph without a health result; each with its largest magnitude as stored, [1].

    The backward's values are those that depend on the gradients that come in.
    """
    backward: set[Node] = set()
    for node in exponents.graph.nodes:
        if node.name.startswith("tangents") or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
    stored = (v for v in exponents.stored_larger() if v in backward and is_float(v))
    forward = (value for _, value in _forward(exponents, captured, backward))
    exponents.here = exponents.graph.output_node()
    found = dict.fromkeys((*stored, *_vanishing(exponents, backward, WATCHED), *forward))
    return [(node, _peak(exponents, node)) for node in found]


def _vanishing(exponents: Exponents, backward: Collection[Node], least: float) -> Iterator[Node]:
    """Values on the way of the gradients that reach `least` in the example, and of which no gradient as large is made.

    The gradient in front of a norm is divided by the norm's size: saturated it gives gradients of ordinary size.
    """
    shown: dict[Node, float] = {}
    sizes: dict[Node, float] = {}
    for node in reversed(exponents.graph.nodes):
        if node in backward and not in_update(node):
            size = exponents.found.get(node.name)
            sizes[node] = 0.0 if size is None else size.peak * 2.0 ** -exponents.of.get(node, 0)
            ends = any(u.op == "output" or in_update(u) for u in node.users)
            shown[node] = max((sizes[node] if ends else 0.0, *(shown.get(u, 0.0) for u in node.users)))
    near = [n for n, size in sizes.items() if size >= least and shown[n] < SHOWN * size
            and is_float(n) and _amplifies(n) and exponents.found[n.name].finite]  # fmt: skip
    places: dict[str, Node] = {}
    for node in sorted(near, key=lambda n: -sizes[n]):
        places.setdefault(str(node.meta.get(META_KEY, node.name)), node)
    yield from list(places.values())[:MOST_WATCHED]


def _amplifies(node: Node) -> bool:
    """Whether an operation's result grows with weights, or with what the forward pass made."""
    if node.target is operator.getitem:
        source, place = cast("tuple[Node, int]", node.args)
        return source.target is aten.convolution_backward.default and place == 0
    return _makes(node) and all(number(a) is None for a in node.args)


def _health(captured: Captured) -> Node | None:
    results = cast("Sequence[Node]", captured.graph.graph.output_node().args[0])
    found = (n for n, p in zip(results, captured.outputs, strict=True) if p.target == HEALTH)
    return next(found, None)


def _peak(exponents: Exponents, node: Node) -> Node:
    """[1]: the largest magnitude; half of it where fp16 is the limit, since the accumulator ends at half of fp16."""
    node = node if is_float(node) else exponents.emit(aten.mul.Tensor, node, 1.0)
    largest = exponents.emit(aten.amax.default, exponents.emit(aten.abs.default, node))
    peak = exponents.emit(aten.view.default, largest, [1])
    summed = str(node.target) in CONTRACTIONS
    return peak if summed else exponents.emit(aten.mul.Tensor, peak, 0.5)


def _forward(
    exponents: Exponents, captured: Captured, backward: Collection[Node]
) -> Iterator[tuple[str, Node]]:
    """By place, the value of the forward pass that is nearest to its limit, and copies that are stored larger."""
    masked, twice = _masked(captured), _made_twice(captured.graph.graph, backward)

    def counts(node: Node) -> bool:
        size = exponents.found.get(node.name)
        return (
            size is not None
            and not size.part
            and size.finite  # where full precision gives infinities, too, nothing takes them
            and node not in backward
            and node not in masked
            and node not in exponents.masked
            and not in_update(node)
            and is_float(node)
        )

    for value, copy in exponents.raised():
        if copy.users and counts(value) and not in_update(copy):
            yield str(copy.meta.get(META_KEY, copy.name)), copy
    yield from _integers(exponents)
    best: dict[str, tuple[float, Node]] = {}
    for node in captured.graph.graph.nodes:
        if node.op != "call_function" or not counts(node) or not shape_of(node) or not _makes(node):
            continue
        size = exponents.found[node.name]
        stored = (
            size.peak * 2.0 ** -exponents.of.get(node, 0) * (2.0 if str(node.target) in CONTRACTIONS else 1.0)
        )
        place = str(node.meta.get(META_KEY, node.name))
        share = stored / (
            _ALWAYS if node in twice and exponents.of.get(node, 0) < 0 else twice.get(node, WATCHED)
        )
        if share >= 1.0 and share > best.get(place, (0.0, node))[0]:
            best[place] = share, node
    yield from ((place, node) for place, (_, node) in best.items())


def _made_twice(graph: Graph, backward: Collection[Node]) -> dict[Node, float]:
    """Products both of whose factors grow with the same inputs or weights, and powers, none of a norm's own; each with
    the magnitude from which on it is watched."""
    found: dict[Node, float] = {}
    inputs: dict[Node, int] = {}  # a bit for each input that a value grows with
    for place, node in enumerate(graph.nodes):
        name = str(node.target)
        if node.op == "placeholder" and is_float(node):
            inputs[node] = 1 << place
        elif node.op == "call_function" and node not in backward and is_float(node) and name not in _SHRINK:
            of = [inputs.get(a, 0) for a in node.all_input_nodes]
            of = of[:1] if name == "aten.div.Tensor" else of
            inputs[node] = functools.reduce(operator.or_, of, 0)
            power = number(node.args[1]) if name == "aten.pow.Tensor_Scalar" else None
            if is_square(node) or (power or 0.0) > 1.0:
                in_loss = str(node.meta.get(META_KEY, "")).startswith("loss")
                found[node] = WATCHED_TWICE if in_loss else WATCHED_SQUARES
            elif _share(node, inputs):
                found[node] = WATCHED_TWICE
    return {node: least for node, least in found.items() if DONE not in node.meta}


def _share(node: Node, inputs: Mapping[Node, int]) -> bool:
    """Whether the two factors of a product grow with a common input."""
    name = str(node.target)
    places = CONTRACTIONS[name][1:] if name in CONTRACTIONS else (0, 1) if name == "aten.mul.Tensor" else ()
    factors = [node.args[place] for place in places]
    a, b = (inputs.get(f, 0) if isinstance(f, Node) else 0 for f in factors) if factors else (0, 0)
    return bool(a & b)


def _integers(exponents: Exponents) -> Iterator[tuple[str, Node]]:
    """By place, integers that are computed and read as floats."""
    for node in exponents.graph.nodes:
        size = exponents.found.get(INTEGERS + node.name)
        if size is None or size.peak < WATCHED:
            continue
        scaled = (
            str(node.target).startswith("aten.sum.") and len(node.users) == 1
        )  # with its factor one op of 32 bits
        if not scaled and any(is_float(user) and reads_number(user, node) for user in node.users):
            yield str(node.meta.get(META_KEY, node.name)), node


def _into_buffers(
    exponents: Exponents, captured: Captured, buffers: Collection[str]
) -> Iterator[tuple[str, Node]]:
    """By place, of what each new buffer is made of, the value nearest to its limit: a variance is a square."""
    results = cast("Sequence[Node]", captured.graph.graph.output_node().args[0])
    held = {p.target: p.name for p in captured.inputs if p.role == "state"}
    for port, new in zip(captured.outputs, results, strict=True):
        if port.role != "state" or port.target not in buffers or not isinstance(new, Node):
            continue
        best, found, statistic = (
            WATCHED_IN_BUFFERS,
            None,
            _statistic(exponents, new, held.get(port.target, "")),
        )
        for node in _joined(new) if statistic is None else [statistic]:
            size = exponents.found.get(node.name)
            stored = 0.0 if size is None else size.peak * 2.0 ** -exponents.of.get(node, 0)
            if stored > best and _makes(node) and size is not None and size.finite and not size.part:
                best, found = stored, node
        if found is not None or statistic is not None:
            watched = cast(Node, statistic or found)
            place = str(watched.meta.get(META_KEY, watched.name))
            yield place if found is not None else place + STATISTICS, watched


def _joined(new: Node) -> list[Node]:
    """What a buffer's new value is made of by element: what is nearest to it first, so the last of several factors."""
    found, count = [new], math.prod(shape_of(new))
    for node in found:
        if str(node.target).startswith(_JOINS) or node.target is aten.view.default:
            found += [n for n in node.all_input_nodes if n not in found and math.prod(shape_of(n)) == count]
    return found


def _statistic(exponents: Exponents, new: Node, held: str) -> Node | None:
    """The mean of squares of a batch that goes into a buffer (held: its placeholder), before its share is taken."""
    parts = _joined(new)
    squares: set[Node] = set()
    old: set[Node] = set()
    for node in exponents.graph.nodes:
        if node in parts:
            operand = node.args[0] if node.target in REDUCTIONS else None
            if (isinstance(operand, Node) and is_square(operand)) or not squares.isdisjoint(
                node.all_input_nodes
            ):
                squares.add(node)
            if node.name == held or not old.isdisjoint(node.all_input_nodes):
                old.add(node)
    for node in parts:
        size, shares = exponents.found.get(node.name), [number(a) for a in node.args]
        if node in squares - old and _makes(node) and not any(s is not None and abs(s) < 1.0 for s in shares):
            return node if size is not None and size.finite else None
    return None


def _makes(node: Node) -> bool:
    """Whether an operation makes new numbers that may be larger than its operands'."""
    name = str(node.target)
    return (
        name in CONTRACTIONS
        or name in PRODUCTS
        or name.startswith(("aten.add.", "aten.sub.", "aten.sum.", "aten.exp.", "aten.pow.", "aten.cumsum."))
    )


def _masked(captured: Captured) -> set[Node]:
    """Values in which numbers may stand for minus infinity: attention masks and what they are added to."""
    found: set[Node] = set()
    nodes = captured.graph.graph.nodes
    bounds = {port.name: port.bounds for port in captured.inputs}
    for node in nodes:
        name = str(node.target)
        low = bounds.get(node.name) if node.op == "placeholder" else None
        tensor = getattr(captured.graph, name, None) if node.op == "get_attr" else None
        constants = [number(a) for a in node.args] if node.op == "call_function" else []
        if (
            (low is not None and low[0] <= _MASK)
            or (
                isinstance(tensor, torch.Tensor)
                and tensor.is_floating_point()
                and tensor.numel()
                and float(tensor.min()) <= _MASK
            )
            or any(c is not None and c <= _MASK for c in constants)
            or (
                (name in ALIGNED or name in LINEAR or name in PRODUCTS)
                and not found.isdisjoint(node.all_input_nodes)
            )
        ):
            found.add(node)
    return found
