"""The table of lowering rules: one function per ATen overload, registered with `@lowering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Rule = Callable[..., object]
F = TypeVar("F", bound=Rule)

#: ATen overload (`aten.add.Tensor`) -> rule `(ctx, *args, **kwargs) -> result or tuple of results`.
RULES: dict[str, Rule] = {}

#: Overloads by a kind of operand that only some rules take: "absent", left out by another rule (`operands.Absent`), or
#: "encoded", integers beyond fp16 (`operands.Encoded`).
ACCEPTS: dict[str, set[str]] = {"absent": set(), "encoded": set()}


class Refusal(Exception):
    """Raised by a rule that cannot express its op; `lower` turns it into a `Finding` with the
    node's place.
    """

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


def lowering(overloads: str, *, accepts: str = "") -> Callable[[F], F]:
    """Register a rule for the space-separated ATen overloads, written without the leading `aten.`.

    `accepts` names kinds of operands that other rules do not take (`ACCEPTS`).
    """

    def register(function: F) -> F:
        for overload in overloads.split():
            name = f"aten.{overload}"
            if name in RULES:
                raise ValueError(f"lowering rule for {name} is registered twice")
            RULES[name] = function
            for kind in accepts.split():
                ACCEPTS[kind].add(name)
        return function

    return register


def known_overloads() -> tuple[str, ...]:
    """Every ATen overload that has a rule, sorted."""
    return tuple(sorted(RULES))
