"""Whether the first step of an optimizer is a later one on a state of known content.

`m = zeros_like(p)` and then what every step does to `m`: the two traces are the same when `m` stands for zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ane_trainer.ane.capture.user_optimizer.following import Atom, Trace


@dataclass
class Binding:
    """Slot -> what the first step has in its place; leaf of the later trace -> leaf of the first."""

    slots: dict[tuple[int, str], Atom] = field(default_factory=dict)
    leaves: dict[int, int] = field(default_factory=dict)


def matched(first: Trace, later: Trace) -> Binding | None:
    """How `later` becomes `first`; None if it does not.

    A slot may stand for a number, a weight or a gradient.
    """
    binding = Binding()
    if len(first.events) != len(later.events) or set(first.slots) != set(later.slots):
        return None
    for a, b in zip(first.events, later.events, strict=True):
        if a.name != b.name or len(a.args) != len(b.args):
            return None
        pairs = zip(a.args, b.args, strict=True)
        if not all(x[0] == y[0] and _same(x[1], y[1], binding) for x, y in pairs):
            return None
    ends = [(first.weights[i], later.weights[i]) for i in later.weights]
    ends += [(first.slots[s], later.slots[s]) for s in later.slots]
    if not all(_same(a, b, binding) for a, b in ends):
        return None
    return binding


def _same(a: Any, b: Any, binding: Binding) -> bool:
    if isinstance(b, tuple) and b and b[0] == "slot":
        if not isinstance(a, tuple) or not a or a[0] not in ("fill", "weight", "gradient"):
            return False
        return binding.slots.setdefault((b[1], b[2]), a) == a
    if not isinstance(a, tuple) or not isinstance(b, tuple) or len(a) != len(b):
        return bool(a == b)
    if b and b[0] in ("number", "fill"):
        return a[0] == b[0] and a[2:] == b[2:] and binding.leaves.setdefault(b[1], a[1]) == a[1]
    return all(_same(x, y, binding) for x, y in zip(a, b, strict=True))
