"""docs/fidelity.md is current, and every published figure comes out as the book says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ane_trainer.ane.simulator import KERNELS
from docs._generate.fidelity import SLOW_SECONDS, document, figure_row, measured
from docs._generate.published import FIGURES, Figure

BOOK = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text(encoding="utf-8")


def printed(figure: Figure) -> str:
    """The simulated column as the file has it."""
    (line,) = (
        line
        for line in BOOK.splitlines()
        if line.startswith(figure_row(figure, "").split(" |  | ")[0] + " | ")
    )
    return line.split(" | ")[3]


def test_the_book_is_current_but_for_its_measured_column() -> None:
    assert document(printed) == BOOK, "run: python -m docs._generate.fidelity > docs/fidelity.md"


@pytest.mark.parametrize(
    "figure",
    [pytest.param(f, marks=pytest.mark.slow if f.seconds > SLOW_SECONDS else ()) for f in FIGURES],
    ids=lambda f: f"{f.name} {f.chips[0]}"[:60],
)
def test_published_against_simulated(figure: Figure) -> None:
    """A figure that claims its digits gives them on every chip; any figure gives what the book prints."""
    value = measured(figure)
    assert value == printed(figure)
    assert (value == figure.published) == (not figure.note)


def test_kernels_say_how_sure_they_are() -> None:
    for kind, kernel in KERNELS.items():
        assert kernel.evidence, kind
        assert kernel.bound or kernel.level != "bounded", kind
    assert all(word in BOOK for word in KERNELS)
