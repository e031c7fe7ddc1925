"""Turns conformance reports into rows of evidence for `ane/verify/conformance.csv` and docs/fidelity.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.verify.evidence import Row, read_rows, write_rows

#: Devices that reach an engine; a report of any other says nothing about a chip.
ENGINES = ("e5rt", "e5rt-pingpong", "coreai", "coreml")


def rows_of(report: dict[str, Any]) -> tuple[Row, ...]:
    """One row for each case that ran.

    Raises: DataError (DATA114) for a report that is no evidence about a chip: not made on a Mac's engine, or
    on another chip than the one it was compared with.
    """
    machine, device, other = report["machine"], report["device"], report["compared_with"]
    if device["name"] not in ENGINES or machine["chip"] is None:
        raise _no_evidence(f"the device {device['name']} on {machine['system']}")
    if not other["chip"] == device["chip"] == report["machine_chip"]:
        raise _no_evidence(f"{machine['chip']}, compared with the simulator of {other['chip']}")
    mark = hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()[:12]

    def row(case: str, values: int, differences: int, max_ulp: int) -> Row:
        system = f"{machine['system']} {machine['release']}"
        build = machine["build"] or ""
        return Row(
            other["chip"],
            case,
            values,
            differences,
            max_ulp,
            device["name"],
            system,
            build,
            report["suite"],
            mark,
        )

    found = [row(case, values, 0, 0) for case, values in report["equal"].items()]
    for case in dict.fromkeys(entry["case"] for entry in report["different"]):
        entries = [entry for entry in report["different"] if entry["case"] == case]
        count = sum(entry.get("count", entry["values"]) for entry in entries)
        found.append(
            row(case, entries[0]["values"], count, max(entry.get("max_ulp", 0) for entry in entries))
        )
    return tuple(found)


def add_rows(path: Path, rows: Iterable[Row]) -> int:
    """Put rows into a file, each once; how many are new."""
    before = set(read_rows(path))
    after = before | set(rows)
    write_rows(path, after)
    return len(after) - len(before)


def rows_as_text(rows: Iterable[Row]) -> str:
    """The rows for a reader, cases that differ first."""
    lines = []
    for row in sorted(rows, key=lambda row: (not row.differences, row.case)):
        result = (
            f"{row.differences} of {row.values} differ, by up to {row.max_ulp} ulp"
            if row.differences
            else (f"all {row.values} equal")
        )
        lines.append(f"{row.chip:<8}{row.case:<44}{result}")
    return "\n".join(lines)


def _no_evidence(got: str) -> DataError:
    return DataError(
        f"report: needs the engine of a known chip, compared with the simulator of that chip; got {got}. "
        "Run `ane-trainer conformance` on an Apple silicon Mac, without --chip.",
        code="DATA114",
    )
