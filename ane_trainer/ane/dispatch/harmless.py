"""Names of Python state whose changes had no effect on a program: after a few they are not compared any more."""

from __future__ import annotations

from collections.abc import Iterable

#: So many changes without an effect make a name harmless.
_ENOUGH = 3


class Harmless:
    """Counts, by name, the changes that gave the same program; what a forward stores for others to look at is such."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def note(self, differences: Iterable[str]) -> bool:
        """Count these (`Guards.differences`), which had no effect; whether a name became harmless by it."""
        before = self.names
        for name in (text.partition(": ")[0] for text in differences):
            self._counts[name] = self._counts.get(name, 0) + 1
        return self.names != before

    @property
    def names(self) -> frozenset[str]:
        """Those that do not count any more."""
        return frozenset(name for name, count in self._counts.items() if count >= _ENOUGH)
