"""What the command line calls: examine this machine's engine, and read reports of others."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.dispatch.devices.machine import known_chip
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.verify.evidence import Row
from ane_trainer.commands.conformance.engines import DeviceEngine
from ane_trainer.commands.conformance.evidence import add_rows, rows_of
from ane_trainer.commands.conformance.report import examine, headline, read_report, write_report
from ane_trainer.training.report import Reporter

_SECONDS_BETWEEN_LINES = 5.0


def run(
    device: str = "e5rt",
    chip: str | None = None,
    fidelity: str = "exact",
    threads: int | None = None,
    *,
    only: str = "",
    out: Path | None = None,
    report: Reporter | None = None,
) -> tuple[dict[str, Any], Path]:
    """Compare `device` with the exact simulator of `chip` (this Mac's, else M4); the report and its file.

    Raises: EnvironmentFault where the device is not, UsageError when `only` chooses no case.
    """
    name = get_chip(chip).name if chip else known_chip() or "m4"
    say = report or Reporter()
    shown = [0.0]

    def progress(case: str, number: int, count: int) -> None:
        now = time.perf_counter()
        if now - shown[0] > _SECONDS_BETWEEN_LINES:
            shown[0] = now
            say.note("case", f"{number}/{count}  {case}")

    engine = DeviceEngine(device, name, fidelity, threads)
    found = examine(engine, DeviceEngine("sim", name, "exact", threads), only, progress)
    if not found["cases"]:
        raise UsageError(f"--only: needs part of a case's family or name; got {only!r}. E.g. --only matmul.")
    path = write_report(found, out or Path(f"conformance-{name}-{device}.json"))
    say.note("result", headline(found))
    return found, path


def read(paths: Iterable[Path], into: Path | None = None) -> tuple[tuple[Row, ...], int]:
    """Rows of the reports, and how many were new in the file `into`."""
    rows = tuple(row for path in paths for row in rows_of(read_report(path)))
    return rows, add_rows(into, rows) if into is not None else 0
