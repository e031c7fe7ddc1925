"""`doctor`: what this machine can do, and the table of chips, each figure with its evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from ane_trainer.ane.chips.lookup import CHIPS, Chip, known_limits, limit
from ane_trainer.commands.options import Output

#: Column -> what a chip shows in it.
_COLUMNS: dict[str, Callable[[Chip], str]] = {
    "chip": lambda c: c.title,
    "family": lambda c: c.family,
    "generation": lambda c: c.generation,
    "engines": lambda c: str(c.engines),
    "GHz": lambda c: f"{c.clock_ghz:g}",
    "peak TFLOPS": lambda c: f"{c.peak_fp16_flops / 1e12:.1f}",
    "DRAM GB/s": lambda c: _figure(c.dram_gb_s),
    "floor us": lambda c: _figure(c.dispatch_floor_us),
    "power W": lambda c: _figure(c.power_fp16_w),
    "slice clamp": lambda c: "none" if c.width_slice_clamp is None else f"{c.width_slice_clamp:g}",
    "widest": lambda c: _figure(_limit(c, "width")),
    "sin/cos": lambda c: _word(c.native_sin_cos),
    "topk/sort": lambda c: _word(c.native_topk_sort),
    "Winograd": lambda c: _word(c.winograd),
}


def doctor(
    chips: Annotated[bool, typer.Option("--chips", help="Print the table of chips instead.")] = False,
) -> Output:
    """Show what this machine can do, what is missing, and what brings it.

    Exit code 1: training is not possible here; 2: it is, but something is degraded.
    """
    if chips:
        return Output({"chips": chip_values()}, chip_table())
    from ane_trainer.commands import examination

    checks = examination.examine()
    return Output(examination.as_json(checks), examination.as_text(checks), examination.exit_code(checks))


def chip_table() -> str:
    """One line for each chip, oldest first; `?` where no source has the figure."""
    rows = [list(_COLUMNS), *([show(chip) for show in _COLUMNS.values()] for chip in CHIPS)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += [
        "",
        "peak: fp16, both operations of a multiply-accumulate, from clock and units. floor: least time of a dispatch.",
        "slice clamp: a last-axis slice that does not begin at 0 gives inf above it. widest: elements of an axis.",
        "The source of each figure: ane-trainer doctor --chips --json",
    ]
    return "\n".join(lines)


def chip_values() -> list[dict[str, object]]:
    """Every figure of every chip with evidence and source, and the strictest limit of each name on e5rt."""
    return [_values(chip) for chip in CHIPS]


def _values(chip: Chip) -> dict[str, object]:
    evidence = {name: asdict(found) for name, found in chip.evidence}
    found = {name: limit(chip, name) for name in known_limits()}
    limits = {name: asdict(row) for name, row in found.items() if row is not None}
    return {
        **asdict(chip), "evidence": evidence, "peak_fp16_flops": chip.peak_fp16_flops, "limits": limits
    }  # fmt: skip


def _limit(chip: Chip, name: str) -> float | None:
    row = limit(chip, name)
    return None if row is None else row.value


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"


def _word(value: bool) -> str:
    return "yes" if value else "no"
