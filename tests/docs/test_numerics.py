"""docs/training-numerics.md is current, keeps its bounds, and the study behind it runs."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from bench.study.__main__ import Row, read_rows, train
from bench.study.arms import ARMS
from bench.study.tasks import TASKS
from docs._generate.numerics import LEAST_SEEDS, PAGE, PICTURES, differences, document, pictures

ROWS = read_rows()


def test_the_page_and_its_pictures_are_current() -> None:
    assert document(ROWS) == PAGE.read_text(encoding="utf-8"), "run: python -m docs._generate.numerics"
    for name, svg in pictures(ROWS).items():
        assert svg == (PICTURES / f"{name}.svg").read_text(encoding="utf-8")


def test_tasks_of_enough_seeds_keep_their_bounds() -> None:
    """The stored rows: the mean difference of exact training to fp32."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in ROWS:
        found.setdefault((row.task, row.arm), {})[row.seed] = row
    for name, task in TASKS.items():
        exact = differences(found, task, "exact") if (name, "fp32") in found else []
        assert len(exact) < LEAST_SEEDS or abs(mean(exact)) <= task.bound, name


def test_the_study_in_short() -> None:
    """One epoch of digits: exact training is fp32's, and a weight of one fp16 number keeps less of an update."""
    task = replace(TASKS["digits-mlp"], epochs=1)
    fp32, exact, single = (train(task, ARMS[arm], 0) for arm in ("fp32", "exact", "one-term"))
    assert exact.accuracy == pytest.approx(fp32.accuracy, abs=0.6)
    assert exact.loss == pytest.approx(fp32.loss, rel=0.005)
    assert exact.lost > 0.005 > single.lost  # changes that one number would lose; there they are gone already
