"""docs/silicon.md is current, and its training runs come out as the table says."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from docs._generate.silicon import document, results
from docs._generate.silicon_runs import RUNS, stored

PAGE = (Path(__file__).parents[2] / "docs" / "silicon.md").read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    assert document() == PAGE, "run: python -m docs._generate.silicon > docs/silicon.md"


def test_there_are_at_least_twelve_published_training_results() -> None:
    assert len({(r.what, r.chip) for r in results()}) >= 12
    assert all(r.source and r.remark for r in results())


def test_onnxsims_mlp_is_within_its_printed_digits() -> None:
    first, *_, last = stored()["mlp"]
    assert (f"{first:.2f}", f"{last:.2f}") == ("0.82", "0.37")
    assert stored()["mlp fp32"][-1] > 0.39  # the engine's fp16 moments matter


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("mlp", 2),
        pytest.param("mlp int8", 3, marks=pytest.mark.slow),
        pytest.param("block", 2, marks=pytest.mark.slow),
    ],
)
def test_the_table_comes_out(name: str, steps: int) -> None:
    _, run = RUNS[name]
    got = [round(value, 6) for value in itertools.islice(run(steps), steps)]
    assert got == stored()[name][:steps]
