"""Enable rewrites of the range pass one by one: for the debugger, which measures what each one mends.

All are made unless a block says otherwise:

    with limited_to({NORMS}) as made: ...      # no powers of two; `made` fills with what was rewritten
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

NORMS, POWERS = "norms", "powers"
#: A factor that fp16 does not hold, as two; always made, also where the powers come from elsewhere.
CONSTANTS = "constants"
#: Name of a rewrite -> what it does.
REWRITES = {
    NORMS: "each row is brought near 1 by a power of two before it is squared",
    POWERS: "values out of range are carried with a power of two",
}


@dataclass(frozen=True)
class Made:
    """One rewrite: its name, the place (module and line), the operation whose numbers it changes, how, and why."""

    rewrite: str
    where: str
    op: str
    change: str = ""
    reason: str = ""


_allowed: ContextVar[frozenset[str]] = ContextVar("allowed", default=frozenset(REWRITES))
_made: ContextVar[list[Made] | None] = ContextVar("made", default=None)


@contextlib.contextmanager
def limited_to(names: Collection[str]) -> Iterator[list[Made]]:
    """Within the block only these rewrites are made; the list fills with them."""
    found: list[Made] = []
    tokens = _allowed.set(frozenset(names)), _made.set(found)
    try:
        yield found
    finally:
        _allowed.reset(tokens[0])
        _made.reset(tokens[1])


def is_watched() -> bool:
    """Whether this is such a block: what is captured here is of no use elsewhere."""
    return _made.get() is not None


def is_allowed(name: str) -> bool:
    """Whether the rewrite is made here."""
    return name in _allowed.get()


def note(name: str, where: str, op: str, change: str = "", reason: str = "") -> None:
    """Tell of a rewrite to whoever asked; the arguments are those of `Made`."""
    found = _made.get()
    if found is not None:
        found.append(Made(name, where, op, change, reason))
