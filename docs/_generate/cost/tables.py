"""Write and read the tables that a fit and its cross-validation leave: the package's constants and intervals, and
every left-out value beside its estimate."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ane_trainer.ane.chips import cost
from ane_trainer.ane.chips.lookup import known_chips
from ane_trainer.ane.chips.work import function_work
from docs._generate.cost.distil import Row, load
from docs._generate.cost.evaluate import SCHEMES, Left, intervals, leave_out, scored
from docs._generate.cost.fit import DERIVED, ENERGY, NAMES, Fit, fit
from docs._generate.cost.solve import PATHS
from docs._generate.cost.workloads import program

_PACKAGE = Path(cost.__file__).parent
LEFT_OUT = Path(__file__).with_name("left_out.csv")
#: Published programs that make a chip on a path measured.
_LEAST_ROWS = 8
#: Deviation of a log up to which rows decide a constant.
_DECIDED = 0.2


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


def _source(name: str, count: int, roofs: int, deviation: float) -> str:
    if name == "dispatch_us":  # says whose constants they are, for the whole chip and path
        if count >= _LEAST_ROWS:
            return f"fitted to {count} published values of this chip and path"
        known = f"{roofs} published roofs of this chip and path and " if roofs else ""
        return f"carried over: {known}the trend over the other chips"
    if (count or roofs) and deviation <= _DECIDED:
        return "rows of this chip decide"
    return "trend over the other chips, shrunk"


def write_constants(known: Fit, rows: Sequence[Row]) -> None:
    """The package's table of constants: every chip on every path, with the deviation of each log and its source."""
    counts = Counter((row.chip, row.path) for row in scored(rows) if row.quantity == "latency")
    roofs = Counter((row.chip, row.path) for row in rows if row.family == "roof")
    lines = []
    for chip in known_chips():
        for path in PATHS:
            deviations = dict(zip(NAMES, known.time.deviations(chip, path).tolist(), strict=True))
            deviations |= {
                name: float(np.hypot(deviations[name], deviations[base])) for name, base in DERIVED.items()
            }
            deviations |= dict(zip(ENERGY, known.power.deviations(chip, path).tolist(), strict=True))
            for name, value in known.rates(chip, path).items():
                source = _source(name, counts[chip, path], roofs[chip, path], deviations[name])
                lines.append((chip, path, name, f"{value:.5g}", f"{deviations[name]:.2g}", source))
    _write(_PACKAGE / "cost_rates.csv", ("chip", "path", "name", "value", "deviation", "source"), lines)


def write_intervals(left: dict[str, list[Left]]) -> None:
    """The package's table of intervals, as factors on an estimate."""
    rows = [(*row[:4], f"{row[4]:.4g}", f"{row[5]:.4g}", row[6]) for row in intervals(left)]
    _write(
        _PACKAGE / "cost_intervals.csv", ("path", "kind", "basis", "quantity", "low", "high", "rows"), rows
    )


def write_left_out(left: dict[str, list[Left]]) -> None:
    """Every scored value with its estimate by a fit without its program, its chip, its family."""
    found: dict[Row, dict[str, float]] = {}
    for scheme, items in left.items():
        for item in items:
            found.setdefault(item.row, {})[scheme] = item.estimate
    lines = [
        (row.chip, row.path, row.family, row.workload, row.quantity, row.value, row.source,
         *(f"{estimates[scheme]:.5g}" for scheme in SCHEMES))
        for row, estimates in sorted(found.items())
    ]  # fmt: skip
    head = ("chip", "path", "family", "workload", "quantity", "value", "source", *map(_column, SCHEMES))
    _write(LEFT_OUT, head, lines)


def read_left_out() -> dict[str, list[Left]]:
    """Left-out values by scheme."""
    found: dict[str, list[Left]] = {scheme: [] for scheme in SCHEMES}
    with LEFT_OUT.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            estimates = {scheme: float(record.pop(_column(scheme))) for scheme in SCHEMES}
            row = Row(**{**record, "value": float(record["value"])})  # type: ignore[arg-type]
            kind = cost.program_kind(function_work(program(row.workload).main))
            for scheme, value in estimates.items():
                found[scheme].append(Left(row, value, kind))
    return found


def _column(scheme: str) -> str:
    return f"without_{scheme}"


def refit() -> None:
    """Fit, cross-validate, and write both tables. Takes minutes."""
    rows = load()
    write_constants(fit(rows), rows)
    left = {scheme: leave_out(rows, scheme) for scheme in SCHEMES}
    write_left_out(left)
