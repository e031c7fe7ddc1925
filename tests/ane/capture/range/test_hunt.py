"""A stretch of the hunt: none of the drawn models is wrong without a word."""

from __future__ import annotations

from tests.hunt import hunt

#: Draws of the stretch; `make hunt` goes on to 5,000.
DRAWS = range(20_000, 20_008)


def test_no_draw_is_silent_or_raw() -> None:
    counts = hunt(DRAWS)
    assert counts["silent"] == counts["raw"] == 0
    assert counts["announced"] <= 0.15 * len(DRAWS)
