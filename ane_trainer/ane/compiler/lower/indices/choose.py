"""The pass that chooses how the integers of each batch port travel: as they are, as codes, or in two numbers.

fp16 holds integers up to 2048. Integers that look up a longer table are sent as codes (`codes.py`) where nothing but
look-ups and comparisons reads them, else as remainder and quotient (`split.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS, MOVES, most_rows
from ane_trainer.ane.stages import Captured

_SUMS = ("add", "sub")
_CHOICES = ("_to_copy", "where", "masked_fill")


def encodings(captured: Captured, dtype: str) -> dict[Node, str]:
    """The encoding of each integer batch input of a program of this float type: "none", "coded" or "split"."""
    placeholders = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    ports = zip(placeholders, captured.inputs, strict=True)
    batch = [n for n, p in ports if p.role == "batch" and integral(n.meta["val"])]
    return {node: _encoding(node) if dtype == "fp16" else "none" for node in batch}


def integral(value: Any) -> bool:
    """Whether a (fake) tensor, or the first of several, holds integers."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    dtype = getattr(first, "dtype", None)
    return (
        dtype is not None
        and not dtype.is_floating_point
        and not dtype.is_complex
        and str(dtype) != "torch.bool"
    )


def packet_name(node: Node) -> str:
    """The ATen name without namespace and overload."""
    if node.target is operator.getitem:
        return "getitem"
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _encoding(node: Node) -> str:
    found = list(_looked_up(node))
    if any(rows > (EXACT_INTEGERS if summed else most_rows("fp16")) for rows, summed in found):
        return "split"
    return "coded" if any(rows > EXACT_INTEGERS + 1 for rows, _ in found) else "none"


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


def rows_of(user: Node, index: Node, name: str) -> int | None:
    """How many rows or classes a look-up by `index` tells apart; None if the node is none."""
    args: Any = user.args
    if name == "embedding" and args[1] is index:
        return int(args[0].meta["val"].shape[0])
    if name == "embedding_dense_backward" and args[1] is index:
        return int(args[2])
    if name.startswith("nll_loss") and index in args[1:3]:
        scores = args[1] if "backward" in name else args[0]
        return int(scores.meta["val"].shape[1 if scores.meta["val"].dim() > 1 else 0])
    if name == "gather" and args[2] is index:
        return int(args[0].meta["val"].shape[args[1]])
    return None
