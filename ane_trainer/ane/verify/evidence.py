"""Rows of evidence that conformance reports gave: which case came out bit for bit on which chip.

They are kept in `ane/verify/conformance.csv`, written by `ane-trainer conformance-read --into`, and shown in
docs/fidelity.md.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from importlib import resources
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One case of one report. `differences` of `values` results differ from the simulator's, by up to
    `max_ulp` units in the last place; `report` is the report's fingerprint.
    """

    chip: str
    case: str
    values: int
    differences: int
    max_ulp: int
    device: str
    os: str
    build: str
    suite: int
    report: str


def stored_rows() -> tuple[Row, ...]:
    """The rows that the package carries."""
    return read_rows(Path(str(resources.files("ane_trainer.ane.verify") / "conformance.csv")))


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a file; none if it does not exist."""
    if not path.exists():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(_row(entry) for entry in csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All rows, sorted, each once."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(sorted({astuple(row) for row in rows}))


def _row(entry: dict[str, str]) -> Row:
    whole = {"values", "differences", "max_ulp", "suite"}
    return Row(**{name: int(text) if name in whole else text for name, text in entry.items()})  # type: ignore[arg-type]
