"""docs/ops.md is current and says of every rule what it does."""

from __future__ import annotations

from pathlib import Path

from ane_trainer.ane.compiler.lower import RULES
from docs._generate.ops import document

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    assert document() == PAGE, "run: python -m docs._generate.ops > docs/ops.md"


def test_every_overload_is_listed_with_a_form() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    for name in RULES:
        (row,) = (r for r in rows if f"`{name.removeprefix('aten.')}`" in r.split(" | ")[0])
        assert row.split(" | ")[1].strip(), name


def test_chips_that_refuse_an_op_are_named() -> None:
    (row,) = (r for r in PAGE.splitlines() if r.startswith("| `cos.default`"))
    assert "m1 (cos)" in row
    assert "m5" not in row.split(" | ")[-1]
