"""The table of lowering rules: one function per ATen overload, registered with `@lowering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Rule = Callable[..., Any]
F = TypeVar("F", bound=Rule)

#: ATen overload (`aten.add.Tensor`) -> rule `(ctx, *args, **kwargs) -> result or tuple of results`.
RULES: dict[str, Rule] = {}

#: Overloads whose rules ignore an operand that another rule left out (see `context.Absent`).
ACCEPTS_ABSENT: set[str] = set()


class Refusal(Exception):
    """Raised by a rule that cannot express its op; `lower` turns it into a `Finding` with the
    node's place.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


def lowering(overloads: str, *, accepts_absent: bool = False) -> Callable[[F], F]:
    """Register a rule for the space-separated ATen overloads, written without the leading `aten.`."""

    def register(function: F) -> F:
        for overload in overloads.split():
            name = f"aten.{overload}"
            if name in RULES:
                raise ValueError(f"lowering rule for {name} is registered twice")
            RULES[name] = function
            if accepts_absent:
                ACCEPTS_ABSENT.add(name)
        return function

    return register


def known_overloads() -> tuple[str, ...]:
    """Every ATen overload that has a rule, sorted."""
    return tuple(sorted(RULES))
