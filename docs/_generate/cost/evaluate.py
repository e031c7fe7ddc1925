"""Cross-validation: every published value estimated by a fit that has not seen its program, or its chip, or its family.

Intervals are conformal: quantiles of published over estimated of the left-out values of one kind of program,
where values of one program on one chip count as one.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ane_trainer.ane.chips.cost import leaves_engine, program_kind
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.chips.work import function_work
from docs._generate.cost.distil import Row
from docs._generate.cost.fit import Fit, fit, fitted_to
from docs._generate.cost.workloads import program

FOLDS = 10
#: Share of values outside an interval, half on each side.
OUTSIDE = 0.10
#: Programs below which a kind's interval is widened to that of all programs of its path.
FEW = 20
#: Kinds of programs by what bounds them: those of one group err alike.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("norm", "softmax", "reduction", "elementwise"),
    ("product", "convolution", "chain", "matrix-vector", "compressed"),
    ("block", "decode", "model", "training step"),
)
#: Chips below which a kind's interval for an unseen one is made symmetric.
FEW_CHIPS = 5


@dataclass(frozen=True)
class Left:
    """A value that a fit had not seen: the row, the estimate, and the kind of its program."""

    row: Row
    estimate: float
    kind: str

    @property
    def factor(self) -> float:
        """Published over estimated."""
        return self.row.value / self.estimate

    @property
    def error(self) -> float:
        return abs(self.estimate / self.row.value - 1)


def _fold(text: str, folds: int = FOLDS) -> str:
    return str(hashlib.sha256(text.encode()).digest()[0] % folds)


#: Name -> what is left out together. Roofs of a left-out chip stay: they are known of every chip that is tried.
SCHEMES: dict[str, Callable[[Row], str]] = {
    "program": lambda row: _fold(row.workload.removesuffix(" int8").removesuffix(" int4")),
    "chip": lambda row: row.chip,
    "family": lambda row: row.family,
}


def scored(rows: Sequence[Row]) -> list[Row]:
    """The rows that errors are told of: those that the fit takes and powers; roofs only anchor."""
    return [row for row in rows if row.family != "roof" and (row.quantity == "energy" or fitted_to(row))]


def leave_out(rows: Sequence[Row], scheme: str) -> list[Left]:
    """Each scored row estimated by a fit without its group."""
    split, found = SCHEMES[scheme], list[Left]()
    for group in sorted({split(row) for row in scored(rows)}):
        rest = [row for row in rows if split(row) != group or row.family == "roof"]
        found += _left(fit(rest), [row for row in scored(rows) if split(row) == group])
    return found


def _left(known: Fit, rows: Sequence[Row]) -> Iterator[Left]:
    for row, value in zip(rows, known.predict(rows).tolist(), strict=True):
        work = function_work(program(row.workload).main)
        if not leaves_engine(work, get_chip(row.chip)):
            yield Left(row, value, program_kind(work))


def groups(left: Sequence[Left], key: Callable[[Left], str]) -> dict[str, list[Left]]:
    """Left-out values by a key, sorted."""
    found: dict[str, list[Left]] = defaultdict(list)
    for item in left:
        found[key(item)].append(item)
    return dict(sorted(found.items()))


def bounds(left: Sequence[Left]) -> tuple[float, float, int]:
    """Factors on an estimate between which nine of ten values lie, and how many programs that rests on.

    Conformal: with n programs the (n + 1)(1 - alpha)-th value bounds from above, the largest where n is small.
    """
    by_program: dict[tuple[str, str], list[float]] = defaultdict(list)
    for item in left:
        by_program[item.row.chip, item.row.workload].append(item.factor)
    factors = np.sort([factor for values in by_program.values() for factor in (min(values), max(values))])
    count = len(factors)
    rank = max(math.floor((count + 1) * OUTSIDE / 2) - 1, 0)
    return float(factors[rank]), float(factors[count - 1 - rank]), len(by_program)


def interval_of(
    left: Sequence[Left], everything: Sequence[Left], basis: str = "measured", kind: str = "any"
) -> tuple[float, float, int]:
    """The bounds of one kind of program; where it has few programs, widened.

    They then hold the bounds of its GROUPS and of `everything` as well, and their logs are stretched by one over the
    number of distinct workloads and one: what few workloads show of an error is less than what the next will have. Of
    chips left out whole (`carried`) the chip is the unit: where there are few, the bounds are as far on one side as on
    the other, since whether the next chip is above the trend or below is chance.
    """
    low, high, programs = bounds(left) if left else (math.inf, 0.0, 0)
    if basis == "carried" and programs and len({item.row.chip for item in left}) < FEW_CHIPS:
        low, high = min(low, 1 / high), max(high, 1 / low)
    if programs >= FEW or not everything:
        return low, high, programs
    group = next((group for group in GROUPS if kind in group), ())
    kin = [item for item in everything if item.kind in group]
    for wider in (kin, everything):
        if wider:
            wide_low, wide_high, _ = bounds(wider)
            low, high = min(low, wide_low), max(high, wide_high)
    stretch = 1 + 1 / (1 + len({item.row.workload for item in left}))
    return min(low, low**stretch), max(high, high**stretch), programs


def intervals(
    known: Sequence[Left], carried: Sequence[Left]
) -> list[tuple[str, str, str, str, float, float, int]]:
    """Rows of the table of intervals: path, kind, basis, quantity, low, high, programs."""
    found = []
    for basis, left in (("measured", known), ("carried", carried)):
        for quantity in ("latency", "energy"):
            mine = [item for item in left if item.row.quantity == quantity]
            keys = {(item.row.path, item.kind) for item in mine} | {(item.row.path, "any") for item in mine}
            for path, kind in sorted({*keys, ("any", "any")}):
                on_path = [m for m in mine if path in (m.row.path, "any")]
                members = [m for m in on_path if kind in (m.kind, "any")]
                found.append((path, kind, basis, quantity, *interval_of(members, on_path, basis, kind)))
    return found


#: Basis of intervals -> what is left out together when they are tried.
UNITS: dict[str, Callable[[Left], str]] = {
    "measured": lambda item: item.row.workload,
    "carried": lambda item: item.row.chip,
}


def coverage(left: Sequence[Left], everything: Sequence[Left], basis: str) -> float:
    """Share of values of one kind and path that lie in an interval made without their program, or without their chip.

    `everything` holds all values of the path.
    """
    inside, total, unit = 0, 0, UNITS[basis]
    for name, items in groups(left, unit).items():
        others = [item for item in left if unit(item) != name]
        rest = [item for item in everything if unit(item) != name]
        low, high, _ = interval_of(others, rest, basis, items[0].kind)
        inside += sum(low <= item.factor <= high for item in items)
        total += len(items)
    return inside / total
