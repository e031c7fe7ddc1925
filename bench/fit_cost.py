"""Fit the cost model's rates to published measurements and say how well they predict rows they did not see.

    python bench/fit_cost.py MEASUREMENTS.csv     distil, fit, write both tables of the package, report
    python bench/fit_cost.py                      refit from the package's own distilled table

MEASUREMENTS has columns source, chip, workload, shape, metric, value, unit, path, notes. Rows whose program
is fully described by their text are kept (`cost_calibration.csv`). A quarter of the rows, by a hash of their
text, is held out of the fit, except in classes with under three rows on a chip. The loss is the sum of
absolute log errors.
"""

from __future__ import annotations

import csv
import math
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

from cost_workloads import Row, distil, load, program

from ane_trainer.ane.chips import cost
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.mil.program import Program

DATA = Path(cost.__file__).parent / "data"
SOURCE = "ANEForge 0.4.0 published results"


# --- fit -------------------------------------------------------------------------------------------------

FITTED = ("dispatch_us", "large_io_us", "read_gb_s", "write_gb_s", "weight_gb_s", "large_weight_gb_s",
          "mac_efficiency", "starved_efficiency", "softmax_gelem_s", "norm_gelem_s")  # fmt: skip
ENERGY = ("pj_per_mac", "pj_per_io_byte", "pj_per_weight_byte", "static_w", "elementwise_w")
#: Engine-side rates that are not fitted: M6 notes (one engine), scaled by clock elsewhere.
M6_RATES = {"pe_gelem_s": 61.0, "pe_two_input_gelem_s": 28.5, "spill_gb_s": 36.0}
TASK_US = 0.34
PULL = 0.03
RESTARTS = 3
WINOGRAD = {True: 1.45, False: 1.0}


def start(chip: str) -> dict[str, float]:
    scale = get_chip(chip).clock_ghz / get_chip("m6").clock_ghz
    values = {
        "dispatch_us": get_chip(chip).dispatch_floor_us or 100.0,
        "read_gb_s": 15.0,
        "write_gb_s": 8.0,
        "weight_gb_s": 60.0,
    }
    values |= {"large_weight_gb_s": 60.0, "large_io_us": 5.0}
    values |= {"mac_efficiency": 0.95, "starved_efficiency": 1.0, "softmax_gelem_s": 5.0, "norm_gelem_s": 1.0}
    values |= {name: value * scale for name, value in M6_RATES.items()}
    return values | {"task_us": TASK_US, "winograd_gain": WINOGRAD[get_chip(chip).winograd]}


def predict(row: Row, values: dict[str, float], chip: str | None = None) -> float:
    """Latency in us of a row's program with the given rates."""
    return _predict(row.workload, chip or row.chip, cost.Rates(**values))[0]  # type: ignore[arg-type]


def _predict(workload: str, chip_name: str, values: cost.Rates) -> tuple[float, float | None]:
    chip, function = get_chip(chip_name), PROGRAMS[workload].main
    ops = tuple(cost._op_costs(function, chip, values))
    latency = cost._dispatch(function, chip, "e5rt", values)[0] + sum(op.latency_us for op in ops)
    return latency, cost._energy_uj(function, ops, values, chip, latency)


def fit(rows: list[Row], values: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Coordinate search in log space on the sum of absolute log errors, with a weak pull to the start."""

    def loss(trial: dict[str, float]) -> float:
        away = {name: abs(math.log(trial[name] / values[name])) for name in names}
        pull = PULL * sum(away.values()) + away["dispatch_us"]  # the dispatch floor is published
        return sum(abs(math.log(predict(row, trial) / row.latency_us)) for row in rows) + pull

    return _search(loss, values, names, {"mac_efficiency": 1.0})


def fit_energy(rows: list[Row], values: dict[str, float]) -> dict[str, float]:
    """The same search on energy (engine power x loop time) of the rows with a published engine power."""
    seed = values | {"pj_per_mac": 1.4, "pj_per_io_byte": 10.0, "pj_per_weight_byte": 10.0, "static_w": 0.5}
    seed["elementwise_w"] = 0.9

    def loss(trial: dict[str, float]) -> float:
        pull = PULL * sum(abs(math.log(trial[name] / seed[name])) for name in ENERGY)
        return pull + sum(abs(math.log((energy(row, trial) or 1e-9) / (row.energy_uj or 1))) for row in rows)

    return _search(loss, seed, ENERGY, {})


def energy(row: Row, values: dict[str, float]) -> float | None:
    """Energy in uJ of a row's program with the given rates."""
    return _predict(row.workload, row.chip, cost.Rates(**values))[1]  # type: ignore[arg-type]


def _search(
    loss: Callable[[dict[str, float]], float],
    values: dict[str, float],
    names: tuple[str, ...],
    ceiling: dict[str, float],
) -> dict[str, float]:
    """The best of several descents, from the start and from seeded random places around it."""
    chance = random.Random(0)
    starts = [values]
    for _ in range(RESTARTS):
        away = {name: values[name] * math.exp(chance.uniform(-1.0, 1.0)) for name in names}
        starts.append(values | {name: min(value, ceiling.get(name, value)) for name, value in away.items()})
    return min((_descend(loss, place, names, ceiling) for place in starts), key=loss)


def _descend(
    loss: Callable[[dict[str, float]], float],
    values: dict[str, float],
    names: tuple[str, ...],
    ceiling: dict[str, float],
) -> dict[str, float]:
    best, step = loss(values), 0.5
    while step > 0.004:
        improved = False
        for name in names:
            for factor in (math.exp(step), math.exp(-step)):
                trial = values | {name: min(values[name] * factor, ceiling.get(name, math.inf))}
                if (score := loss(trial)) < best - 1e-9:
                    values, best, improved = trial, score, True
        if not improved:
            step /= 2
    return values


def carry(values: dict[str, float], source: str, chip: str, facts: dict[str, float]) -> dict[str, float]:
    """Rates of a chip without measurements: engine-side rates scaled by clock, the dispatch time as it is."""
    scale = get_chip(chip).clock_ghz / get_chip(source).clock_ghz
    moved = {k: v * scale for k, v in values.items() if k.endswith("_s")}
    kept = {
        k: values[k]
        for k in ("dispatch_us", "large_io_us", "mac_efficiency", "starved_efficiency", "task_us")
    }
    return kept | moved | {"winograd_gain": WINOGRAD[get_chip(chip).winograd]} | facts


#: chip -> (chip whose rates it takes, rates known from elsewhere, their source).
CARRIED: dict[str, tuple[str, dict[str, float], str]] = {
    "m1-pro": ("m1-max", {}, ""),
    "m2": ("m2-pro", {}, ""),
    "m2-max": ("m2-pro", {}, ""),
    "m3": ("m4", {}, ""),
    "m3-pro": ("m4", {"dispatch_us": 240.0}, "dispatch from ANE-Training"),
    "m3-max": ("m4", {}, ""),
    "m4-pro": ("m4", {}, ""),
    "m4-max": ("m4", {}, ""),
    "m5": ("m5-pro", {"read_gb_s": 20.0, "write_gb_s": 20.0}, "transfer rate from ANEForge roofline summary"),
    "m5-max": ("m5-pro", {}, ""),
    "m6": ("m5-pro", {"weight_gb_s": 150.0, "read_gb_s": 37.5, "write_gb_s": 37.5, "dispatch_us": 160.0,
                      **M6_RATES}, "transfers, elementwise unit and Core ML dispatch from M6 notes"),
}  # fmt: skip


# --- report ----------------------------------------------------------------------------------------------


def errors(rows: list[Row], values: dict[str, float]) -> list[float]:
    return [abs(predict(row, values) / row.latency_us - 1) for row in rows]


def leave_one_out(rows: list[Row]) -> list[float]:
    """Errors on each row of a chip by rates fitted to its other rows; for chips with few rows."""
    gaps = []
    for left in rows:
        values = fit([row for row in rows if row is not left], start(left.chip), FITTED)
        gaps += errors([left], values)
    print(
        f"{rows[0].chip:8} leave-one-out, {len(gaps)} rows: median {median(gaps):.1%}, worst {max(gaps):.1%}"
    )
    return gaps


def report(rows: list[Row], fits: dict[str, dict[str, float]]) -> None:
    print(f"{'chip':8} {'class':18} {'fit':>4} {'median':>7} {'held':>5} {'median':>7} {'worst':>7}")
    for chip, values in fits.items():
        mine = [row for row in rows if row.chip == chip]
        for kind in [*sorted({row.kind for row in mine}), "all"]:
            seen = errors([r for r in mine if not r.held_out and kind in (r.kind, "all")], values)
            held = errors([r for r in mine if r.held_out and kind in (r.kind, "all")], values)
            cells = [f"{median(e):7.1%}" if e else "      -" for e in (seen, held)]
            worst = f"{max(held):7.1%}" if held else "      -"
            print(f"{chip:8} {kind:18} {len(seen):4} {cells[0]} {len(held):5} {cells[1]} {worst}")
    for chip, values in fits.items():
        powered = [row for row in rows if row.chip == chip and row.energy_uj and "static_w" in values]
        for held_out in (False, True):
            gaps = [abs((energy(r, values) or 0) / (r.energy_uj or 1) - 1)
                    for r in powered if r.held_out == held_out]  # fmt: skip
            if gaps:
                which = "held" if held_out else "fit "
                print(f"{chip:8} energy {which} rows {len(gaps)} median {median(gaps):.1%}")


def write(rows: list[Row], fits: dict[str, dict[str, float]]) -> None:
    with (DATA / "cost_calibration.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), "latency_us": f"{row.latency_us:.6g}"} for row in rows)
    with (DATA / "cost_rates.csv").open("w", encoding="utf-8", newline="") as file:
        writer_ = csv.writer(file, lineterminator="\n")
        writer_.writerow(["chip", "name", "value", "source"])
        for chip, values in fits.items():
            count = sum(row.chip == chip and not row.held_out for row in rows)
            mine = [row for row in rows if row.chip == chip]
            held = errors([row for row in mine if row.held_out], values)
            held = held if len(held) > 2 else leave_one_out(mine)
            band = sorted(held)[math.ceil(0.9 * len(held)) - 1]
            for name, value in values.items():
                moved = name in FITTED + ENERGY and abs(value / start(chip).get(name, 1e9) - 1) > 0.02
                where = (
                    f"fitted: {SOURCE}" if moved else "presumed: no row decides it; M6 notes or a start value"
                )
                writer_.writerow([chip, name, f"{value:.5g}", where])
            writer_.writerow([chip, "error_band", f"{band:.3g}", "90th percentile on held-out rows"])
            writer_.writerow([chip, "provenance", f"fitted to {count} rows of {SOURCE}", ""])
        for chip, (origin, facts, note) in CARRIED.items():
            for name, value in carry(fits[origin], origin, chip, facts).items():
                source = f"measured: {note}" if name in facts else f"presumed: scaled by clock from {origin}"
                writer_.writerow([chip, name, f"{value:.5g}", source])
            text = f"scaled by clock from {origin}" + (f"; {note}" if note else "")
            writer_.writerow([chip, "provenance", text, ""])


#: Roofs of a chip whose rates are carried over: a check that no fit has seen.
CHECKS = (
    Row("m5", "gemm", "gemm 2048 2048 2048", 2 * 2048**3 / 8.71e6, None, "roofline summary: 8.71 TFLOP/s"),
    Row("m5", "conv", "conv 4 512 64 3 1 1", 77.31e9 / 17.4e6, None, "roofline summary: 17.4 TFLOP/s"),
)


def check_carried(fits: dict[str, dict[str, float]]) -> None:
    for row in CHECKS:
        origin, facts, _ = CARRIED[row.chip]
        PROGRAMS[row.workload] = program(row.workload)
        ratio = predict(row, carry(fits[origin], origin, row.chip, facts)) / row.latency_us
        print(f"{row.chip} as {origin}: {row.workload} predicted {ratio:.2f} x {row.latency_us:.0f} us")


def worst(rows: list[Row], fits: dict[str, dict[str, float]], count: int = 14) -> None:
    gaps = [(predict(row, fits[row.chip]) / row.latency_us, row) for row in rows]
    for ratio, row in sorted(gaps, key=lambda gap: -abs(math.log(gap[0])))[:count]:
        print(f"  {ratio:5.2f} x {row.latency_us:10.1f} us  {row.chip:7} {row.workload}  ({row.source})")


PROGRAMS: dict[str, Program] = {}


def main(arguments: list[str]) -> None:
    rows = distil(Path(arguments[0])) if arguments else load(DATA / "cost_calibration.csv")
    PROGRAMS.update({row.workload: program(row.workload) for row in rows})
    fits = {}
    for chip in dict.fromkeys(row.chip for row in rows):
        seen = [row for row in rows if row.chip == chip and not row.held_out]
        fits[chip] = fit_energy([r for r in seen if r.energy_uj], fit(seen, start(chip), FITTED))
    report(rows, fits)
    worst(rows, fits)
    check_carried(fits)
    write(rows, fits)
    for chip, values in fits.items():
        print(chip, {name: float(f"{value:.4g}") for name, value in values.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
