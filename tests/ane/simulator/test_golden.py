"""Every published hardware vector, put as a MIL program through `simulate` and compared bit for bit.

A row of `tests/data/golden_vectors.csv` is found by its `inputs` text; a row without a program fails, so
that a new row cannot go unnoticed.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.verify.vectors import DIGITS, PROGRAMS, Run, matmul_cliff, sum_of_integers, width_slice

GOLDEN = Path(__file__).parents[2] / "data" / "golden_vectors.csv"
ROWS = list(csv.DictReader(GOLDEN.read_text(encoding="utf-8").splitlines()))


def program_of(row: dict[str, str]) -> tuple[str, Run] | None:
    for key in (f"{row['op']}: {row['inputs']}", row["inputs"]):
        if key in PROGRAMS:
            return key, PROGRAMS[key]
    return None


def chips_of(row: dict[str, str]) -> list[str]:
    """The chips a row names; `M1..M5 Pro` is every chip in between."""
    if ".." in row["chips"]:
        return ["m1", "m1-max", "m2-pro", "m4", "m5", "m5-pro"]
    return [get_chip(name).name for name in row["chips"].split(";")]


@pytest.mark.parametrize("row", ROWS, ids=[f"{r['path']}-{r['op']}-{r['inputs']}"[:70] for r in ROWS])
def test_published_vector(row: dict[str, str]) -> None:
    found = program_of(row)
    assert found is not None, f"no program for {row['op']}: {row['inputs']}"
    key, run = found
    for chip in chips_of(row):
        results = np.ravel(run(chip)).astype(np.float64)
        expected = row["expected_ane_output"]
        if ".." in expected:
            assert results.tolist() == [float(v) for v in expected.split("..")], chip
        elif key in DIGITS:
            shown = DIGITS[key]
            assert {shown(v) for v in results} == {shown(float(expected))}, (chip, results)
        else:
            bits = (
                {v.tobytes() for v in np.abs(results)}
                if key == "|v|>4094 -> inf"
                else {v.tobytes() for v in results}
            )
            assert bits == {np.float64(expected).tobytes()}, (chip, results)


def test_every_program_belongs_to_a_row() -> None:
    used = {found[0] for row in ROWS if (found := program_of(row))}
    assert used == set(PROGRAMS)


@pytest.mark.parametrize("chip", ["m1", "m1-max", "m2-pro", "m4", "m5", "m5-pro"])
def test_numeric_cliffs_of_six_chips(chip: str) -> None:
    """ANEForge numeric_cliffs: matmul to 32758.8, the slice clamp before A16 only, sums to 2048."""
    assert matmul_cliff(chip).tolist() == [32758.8]
    finite = np.isfinite(width_slice(60000)(chip).item())
    assert finite == (chip in ("m4", "m5", "m5-pro"))
    if not finite:
        assert np.isfinite(width_slice(4094)(chip).item())
        assert not np.isfinite(width_slice(4096)(chip).item())
    first_wrong = next(t for t in range(2040, 2080) if sum_of_integers(t)(chip).item() != t)
    assert (first_wrong, sum_of_integers(first_wrong)(chip).item()) == (2049, 2050.0)
