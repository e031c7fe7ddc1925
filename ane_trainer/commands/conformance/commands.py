"""`conformance`, `conformance-read`: examine this machine's engine, and read reports of others."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.options import Fidelity, Output, Threads
from ane_trainer.training.reporting.report import ConsoleReporter, Reporter

if TYPE_CHECKING:  # PyTorch is imported only by what runs
    from ane_trainer.ane.verify.evidence import Row

_SECONDS_BETWEEN_LINES = 5.0


def conformance(
    device: Annotated[str, typer.Option(help="e5rt, e5rt-pingpong, coreai or sim.", metavar="NAME")] = "e5rt",
    chip: Annotated[
        str | None, typer.Option(help="m1 ... m6 (default: this Mac's, else m4).", metavar="NAME")
    ] = None,
    fidelity: Fidelity = "exact",
    threads: Threads = None,
    only: Annotated[
        str,
        typer.Option(help="Only cases whose family or name holds this.", metavar="TEXT", show_default=False),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Report (default: conformance-CHIP-DEVICE.json).", metavar="FILE")
    ] = None,
) -> Output:
    """Compare the engine with the simulator, bit for bit: run a fixed set of programs on both, write a report."""
    from ane_trainer.commands.conformance.report import as_text

    found, path = run(device, chip, fidelity, threads, only=only, out=out, report=ConsoleReporter(sys.stderr))
    send = "" if device == "sim" else "   (one line; send it in an issue of the project)"
    return Output(found, f"{as_text(found)}\nreport   {path}{send}")


def conformance_read(
    reports: Annotated[
        list[Path], typer.Argument(help="Files that `conformance` wrote.", metavar="REPORT...")
    ],
    into: Annotated[
        Path | None,
        typer.Option(help="CSV to add the rows to: ane_trainer/ane/verify/conformance.csv.", metavar="FILE"),
    ] = None,
) -> Output:
    """Turn conformance reports into rows of evidence: which case came out bit for bit on which chip."""
    from ane_trainer.commands.conformance.evidence import rows_as_text

    rows, added = read(reports, into)
    text = rows_as_text(rows)
    if into is not None:
        text += f"\n{added} new rows in {into}; then: python -m docs._generate.fidelity > docs/fidelity.md"
    return Output({"rows": [asdict(row) for row in rows], "added": added}, text)


def run(
    device: str = "e5rt",
    chip: str | None = None,
    fidelity: str = "exact",
    threads: int | None = None,
    *,
    only: str = "",
    out: Path | None = None,
    report: Reporter | None = None,
) -> tuple[dict[str, object], Path]:
    """Compare `device` with the exact simulator of `chip` (this Mac's, else M4); the report and its file.

    Raises: EnvironmentFault where the device is not, UsageError when `only` chooses no case.
    """
    from ane_trainer.ane.chips.lookup import get_chip
    from ane_trainer.ane.dispatch.devices.machine import known_chip
    from ane_trainer.commands.conformance.engines import DeviceEngine
    from ane_trainer.commands.conformance.report import examine, write_report

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
    return found, write_report(found, out or Path(f"conformance-{name}-{device}.json"))


def read(paths: Iterable[Path], into: Path | None = None) -> tuple[tuple[Row, ...], int]:
    """Rows of the reports, and how many were new in the file `into`."""
    from ane_trainer.commands.conformance.evidence import add_rows, rows_of
    from ane_trainer.commands.conformance.report import read_report

    rows = tuple(row for path in paths for row in rows_of(read_report(path)))
    return rows, add_rows(into, rows) if into is not None else 0
