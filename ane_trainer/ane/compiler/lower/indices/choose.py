"""Choose the encoding of each integer: plain, coded, or split in two numbers.

fp16 holds integers up to 2048. Batch integers that look up a longer table are sent as codes (`codes.py`) where
nothing but look-ups and equality reads them; integers that are computed with and leave that range, those of the batch
and those that follow from them, go as remainder and quotient (`split.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Node

from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS, MOVES, most_rows
from ane_trainer.ane.compiler.lower.indices.phases import largest_borne
from ane_trainer.ane.compiler.lower.indices.ranges import (
    Bounds,
    bounds_of,
    integral,
    packet_name,
    read_exactly,
    too_large,
)
from ane_trainer.ane.mil.program import MAX_FP16
from ane_trainer.ane.stages import PAIR, Captured, Chosen, Port

#: Integers in two numbers are below this in magnitude.
MOST_ROWS = PAIR * EXACT_INTEGERS
#: Integers of a batch of which no example is known and that nothing looks up.
UNKNOWN = 2.0**17
#: Rows that computed floats, rounded to fp16, may look up.
_FEW = 128
#: Bits by which batches may pass the example; fewer where the integers that follow leave two numbers.
_SLACKS = (2, 0, -1)
_SUMS = ("add", "sub")
_CHOICES = ("_to_copy", "where", "masked_fill")
_EQUALITY = ("eq", "ne")
_WRAPPED = frozenset("add sub rsub mul neg pow bitwise_left_shift __lshift__ bitwise_not".split())
#: Nodes that give all integers on as they are; what moves only some of them keeps labels labels.
_WHOLE = frozenset(
    "view _unsafe_view reshape _reshape_alias unsqueeze squeeze permute transpose t expand clone alias detach "
    "lift_fresh_copy _to_copy".split()
)
_PARTS = frozenset(("slice", "constant_pad_nd"))
#: Nodes that take no more than a shape of them.
_SHAPES = frozenset(
    "full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split()
)


@dataclass(frozen=True)
class Integers:
    """`inputs`: the encoding of each integer batch input. `split`: nodes whose results travel in two numbers.

    `bounds`: of each integer node, where known. `rounded`: inputs that only turn into floats, with the largest numbers
    whose rounding is borne.
    `floats`: inputs of floats that turn into integers which need two numbers, and travel in two for them.
    """

    inputs: Mapping[Node, str] = field(default_factory=dict)
    split: frozenset[Node] = frozenset()
    bounds: Mapping[Node, Bounds] = field(default_factory=dict)
    rounded: Mapping[Node, float] = field(default_factory=dict)
    floats: frozenset[Node] = frozenset()

    def taken(self, node: Node) -> Bounds | None:
        """What the port of an integer input takes."""
        if node in self.floats:
            return None
        most = self.rounded.get(node)
        return self.bounds[node] if most is None else (-most, most)


def choose(captured: Captured, dtype: str) -> Integers:
    """The encodings in a program of this float type; only fp16 needs any."""
    if dtype != "fp16":
        return Integers()
    placeholders = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    ports = dict(zip(placeholders, captured.inputs, strict=True))
    batch = {n: p for n, p in ports.items() if p.role == "batch" and integral(n.meta["val"])}
    exact = read_exactly(captured.graph, _exact_results(captured))
    inputs = {node: _encoding(node, port, node in exact) for node, port in batch.items()}
    turned = dict(_turned(exact, ports))
    found = {n: _turned_bounds(n) for n in turned}
    found |= {n: b for n in exact - turned.keys() if (b := _cut_bounds(n)) is not None}
    sent = {n: p for n, p in ports.items() if p.target.startswith("random/") or p.role == "scalar"}
    drawn = {n: p.bounds for n, p in sent.items() if p.bounds is not None}
    for slack in _SLACKS:
        bounds = bounds_of(
            captured.graph,
            {n: _of_type(n, _input_bounds(n, ports[n], e, slack)) for n, e in inputs.items()} | drawn | found,
        )
        split = {n for n, b in bounds.items() if too_large(b) and n in exact and n.op == "call_function"}
        if all(max(-bounds[n][0], bounds[n][1]) < MOST_ROWS for n in split):
            break
    borne = {n: largest_borne(captured.graph, n) for n, e in inputs.items() if e == "none" and n not in exact}
    rounded = {n: min(most, MAX_FP16) for n, most in borne.items() if most > EXACT_INTEGERS}
    floats = frozenset(turned[n] for n in split if n in turned)
    inputs |= dict.fromkeys(floats, "split")
    return Integers(inputs, frozenset(split), bounds, rounded, floats)


def _exact_results(captured: Captured) -> list[Node]:
    """The results of integers that may leave in two numbers."""
    results = cast("Sequence[object]", captured.graph.graph.output_node().args[0])
    return [
        n
        for n, port in zip(results, captured.outputs, strict=True)
        if isinstance(n, Node) and port.index_encoding == "split" and integral(n.meta.get("val"))
    ]


def float_source(node: Node) -> tuple[Node, float] | None:
    """The input whose floats, moved at most, a node turns into integers, and the constant that they are multiplied
    by; None for any other node.
    """
    if packet_name(node) != "_to_copy" or not integral(node.meta.get("val")):
        return None
    source, factor = cast("Node", node.args[0]), 1.0
    while len(source.all_input_nodes) == 1:
        if packet_name(source) == "mul" and isinstance(source.args[1], float):
            factor *= source.args[1]
        elif packet_name(source) not in MOVES:
            break
        source = source.all_input_nodes[0]
    value = source.meta.get("val")
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return (source, factor) if source.op == "placeholder" and floating else None


def _turned(exact: Iterable[Node], ports: Mapping[Node, Port]) -> Iterator[tuple[Node, Node]]:
    """(integers, the batch input of floats that they are)"""
    for node in exact:
        source, factor = float_source(node) or (node, 0.0)
        port = ports.get(source)
        if port is not None and port.role == "batch" and factor * port.scale == 1.0:
            yield node, source


def _turned_bounds(node: Node) -> Bounds:
    """Floats as integers: the rows that they look up, else all that fp16 reaches."""
    found = list(_looked_up(node))
    if not found:
        return (-MAX_FP16, MAX_FP16)
    rows = max(2 * rows if summed else rows for rows, summed in found)
    return (-float(EXACT_INTEGERS), float(min(rows, MOST_ROWS) - 1))


def _cut_bounds(node: Node) -> Bounds | None:
    """Computed floats as integers, where all that reads them are look-ups in few rows, or bounds on both sides.

    fp16 cuts one in a hundred of computed floats to another integer near 100; a batch's own floats it does not.
    """
    source = node.args[0] if packet_name(node) == "_to_copy" and node.args else None
    value = source.meta.get("val") if isinstance(source, Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    most = EXACT_INTEGERS if _given(cast("Node", source)) else _FEW
    rows = [2 * rows if summed else rows for rows, summed in _looked_up(node)]
    if max(rows, default=0) > most or _computed_with(node, bounded=most):
        return None
    return (-float(EXACT_INTEGERS), float(EXACT_INTEGERS))


def _given(node: Node) -> bool:
    """Whether floats are a batch's, or constants, moved and chosen at most."""
    if node.op == "placeholder" or packet_name(node) in ("full", "scalar_tensor"):
        return True
    moved = packet_name(node) == "where" or packet_name(node) in MOVES
    sources = node.all_input_nodes[packet_name(node) == "where" :]
    return moved and all(map(_given, sources))


def _encoding(node: Node, port: Port, exact: bool) -> str:
    found = list(_looked_up(node))
    if any(rows > (EXACT_INTEGERS if summed else most_rows("fp16")) for rows, summed in found):
        return "split"
    only_looked_up = bool(found) and not _computed_with(node)
    large = exact and (not only_looked_up if port.bounds is None else too_large(port.bounds))
    coded = any(rows > EXACT_INTEGERS + 1 for rows, _ in found)
    if not coded and not large:
        return "none"
    beyond = port.bounds is not None and not _coded(port.bounds) and not coded
    return "split" if beyond or _computed_with(node) else "coded"


def _coded(bounds: Bounds) -> bool:
    """Whether every integer within the bounds has a code."""
    return bounds[0] >= -EXACT_INTEGERS and bounds[1] < most_rows("fp16")


def _input_bounds(node: Node, port: Port, encoding: str, slack: int) -> Bounds:
    """What the integers of a port are held to: fp16, the codes, the rows that they look up, or the example's range.

    Labels and padding that are looked up may be as low as fp16 holds them. The example's largest is raised to a
    power of two and `slack` bits more; as it is for a negative `slack`.
    """
    if encoding == "coded":
        return (-float(EXACT_INTEGERS), float(most_rows("fp16") - 1))
    if encoding == "none":
        return (-float(EXACT_INTEGERS), float(EXACT_INTEGERS))
    found = list(_looked_up(node))
    if found:
        rows = max(2 * rows if summed else rows for rows, summed in found)
        return (-float(EXACT_INTEGERS), float(min(rows, MOST_ROWS) - 1))
    if port.bounds is None:
        return (-UNKNOWN, UNKNOWN)
    low, high = port.bounds
    most = max(-low, high)
    if slack >= 0:
        most = min(2.0 ** (math.ceil(math.log2(most + 1)) + slack), MOST_ROWS) - 1
    return (-most if low < 0 else 0.0, most)


def type_bounds(node: Node) -> Bounds | None:
    """What integers of 8 and 16 bits reach before PyTorch's arithmetic wraps; None for larger ones."""
    dtype = node.meta["val"].dtype if isinstance(node.meta.get("val"), torch.Tensor) else torch.int64
    if dtype not in (torch.uint8, torch.int8, torch.int16):
        return None
    return (float(torch.iinfo(dtype).min), float(torch.iinfo(dtype).max))


def _of_type(node: Node, bounds: Bounds) -> Bounds:
    """The bounds within those of the integers' type."""
    ends = type_bounds(node)
    return bounds if ends is None else (max(bounds[0], ends[0]), min(bounds[1], ends[1]))


def wrapping(captured: Captured, integers: Integers) -> Iterator[tuple[Node, Bounds]]:
    """Sums and products of integers of 8 and 16 bits that may leave their type, where PyTorch wraps them."""
    nodes = [n for n in captured.graph.graph.nodes if n.op == "call_function" and packet_name(n) in _WRAPPED]
    if not any(type_bounds(n) for n in nodes):
        return
    placeholders = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    examples = {
        n: p.bounds for n, p in zip(placeholders, captured.inputs, strict=True) if p.bounds is not None
    }
    inputs = {n: examples.get(n, integers.bounds[n]) for n in integers.inputs if n in integers.bounds}
    found = bounds_of(captured.graph, inputs)
    for node in nodes:
        ends, bounds = type_bounds(node), found.get(node)
        if ends is not None and bounds is not None and (bounds[0] < ends[0] or bounds[1] > ends[1]):
            yield node, ends


def _computed_with(node: Node, bounded: int = 0) -> bool:
    """Whether anything but movement, look-ups, equality with small numbers and shapes reads the integers.

    With `bounded`, a clamp within it does no harm either, nor do results.
    """
    pending, seen = [node], set()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        for user in source.users:
            name = packet_name(user)
            whole = integral(user.meta.get("val"))
            if name in MOVES or (name in _CHOICES and whole):
                pending.append(user)
            elif bounded and (user.op == "output" or _clamped(user, name, bounded)):
                continue
            elif (
                rows_of(user, source, name) is None and name not in _SHAPES and not _equals_small(user, name)
            ):
                return True
    return False


def _clamped(user: Node, name: str, most: int) -> bool:
    numbers = [a for a in user.args[1:] if isinstance(a, (int, float)) and abs(a) <= most]
    return name == "clamp" and len(numbers) == 2


def _equals_small(user: Node, name: str) -> bool:
    numbers = [a for a in user.args if isinstance(a, (int, float))]
    return name in _EQUALITY and all(abs(n) <= EXACT_INTEGERS for n in numbers)


def _looked_up(node: Node) -> Iterator[tuple[int, bool]]:
    """(rows of the table, whether constants were added on the way) for every look-up by the input."""
    pending, seen = [(node, False)], set()
    while pending:
        source, summed = pending.pop()
        if (source, summed) in seen:
            continue
        seen.add((source, summed))
        for user in source.users:
            name = packet_name(user)
            rows = rows_of(user, source, name)
            if rows is not None:
                yield rows, summed
            elif not integral(user.meta.get("val")):
                continue
            elif name in _SUMS and isinstance(user.args[1], (int, Node)):
                pending.append((user, True))
            elif name in MOVES or name in _CHOICES:
                pending.append((user, summed))


def chosen_by(node: Node) -> Chosen | None:
    """What an integer input chooses by number, by the narrowest of its look-ups; PyTorch refuses other numbers.

    An input of which only parts are looked up is held to that where those are class numbers.
    """
    found: list[Chosen] = []
    pending = [(node, True)]
    for source, whole in pending:
        for user in source.users:
            name = packet_name(user)
            rows = rows_of(user, source, name)
            if rows is not None:
                least = -rows if "index" in name and name != "index_select" else 0
                classes = name.startswith("nll_loss")
                if classes:
                    found.append(Chosen(0, rows - 1, True, int(user.args[5 if "backward" in name else 4])))  # type: ignore[arg-type]
                elif whole:
                    found.append(Chosen(least, rows - 1))
            elif whole and name == "eq" and (one_hot := _one_hot_classes(user)):
                found.append(Chosen(0, one_hot - 1, True))
            elif (name in _WHOLE or name in _PARTS) and integral(user.meta.get("val")):
                pending.append((user, whole and name in _WHOLE))
    return min(found, key=lambda c: (c.most, -c.least), default=None)


def _one_hot_classes(equal: Node) -> int:
    """How many classes an equality of `F.one_hot` is with, see `capture.rewrites.criteria`; 0 for any other."""
    numbers = equal.args[1]
    known = isinstance(numbers, Node) and packet_name(numbers) == "flip"
    source: Any = numbers.args[0] if known and isinstance(numbers, Node) else None
    return len(source.meta["val"]) if isinstance(source, Node) and packet_name(source) == "arange" else 0


def rows_of(user: Node, index: Node, name: str) -> int | None:
    """How many rows or classes a look-up by `index` distinguishes; None if the node is none."""
    args: Any = user.args
    if name == "embedding" and args[1] is index:
        return int(args[0].meta["val"].shape[0])
    if name == "embedding_dense_backward" and args[1] is index:
        return int(args[2])
    if name.startswith("nll_loss") and index in args[1:3]:
        scores = args[1] if "backward" in name else args[0]
        return int(scores.meta["val"].shape[1 if scores.meta["val"].dim() > 1 else 0])
    if name in ("gather", "index_select", "scatter_add", "scatter") and args[2] is index:
        return int((args[0].meta["val"].shape or (1,))[args[1]])
    if name in ("index", "index_put", "_unsafe_index", "_unsafe_index_put") and index in args[1]:
        return int(args[0].meta["val"].shape[args[1].index(index)])
    return None
