"""Cross-validation: each published value estimated by a fit that has not seen its program, or chip, or family."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ane_trainer.ane.chips.cost import leaves_engine, program_kind
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.chips.work import function_work
from docs._generate.cost.conformal import interval_of
from docs._generate.cost.distil import Row
from docs._generate.cost.fit import Fit, fit, fitted_to
from docs._generate.cost.workloads import program

FOLDS = 10


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


#: Basis of intervals -> what is left out of the fit for its values, and together when the intervals are tried.
BASES: dict[str, tuple[str, Callable[[Left], str]]] = {
    "measured": ("program", lambda item: item.row.workload),
    "carried": ("chip", lambda item: item.row.chip),
    "unseen": ("family", lambda item: item.row.family),
}


def intervals(left: Mapping[str, Sequence[Left]]) -> list[tuple[str, str, str, str, float, float, int]]:
    """Rows of the table of intervals: path, kind, basis, quantity, low, high, programs.

    Of a kind that no chip has rows of, `any`, a known chip's interval is made of families left out.
    """
    found = []
    for basis in ("measured", "carried"):
        for quantity in ("latency", "energy"):
            mine, unseen = (
                [item for item in left[BASES[name][0]] if item.row.quantity == quantity]
                for name in (basis, "unseen" if basis == "measured" else basis)
            )
            keys = {(item.row.path, item.kind) for item in mine} | {(item.row.path, "any") for item in mine}
            for path, kind in sorted({*keys, ("any", "any")}):
                seen = unseen if kind == "any" else mine
                found.append((path, kind, basis, quantity, *interval_of(seen, path, kind, basis)))
    return found


def held(left: Sequence[Left], basis: str) -> list[bool]:
    """Whether each value of one quantity lies in an interval made without its program, or chip, or family."""
    unit, known = BASES[basis][1], dict[tuple[str, str, str], tuple[float, float, int]]()
    for item in left:
        key = unit(item), item.row.path, item.kind
        if key not in known:
            rest = [other for other in left if unit(other) != key[0]]
            known[key] = interval_of(rest, *_printed_for(rest, item, basis))
    limits = [known[unit(item), item.row.path, item.kind] for item in left]
    return [low <= item.factor <= high for item, (low, high, _) in zip(left, limits, strict=True)]


def _printed_for(seen: Sequence[Left], item: Left, basis: str) -> tuple[str, str, str]:
    """Path, kind and basis of the interval that is printed for a program when `seen` is all that is known."""
    if basis != "unseen":
        return item.row.path, item.kind, basis
    return item.row.path if any(i.row.path == item.row.path for i in seen) else "any", "any", "measured"


def printed(left: Sequence[Left], basis: str) -> list[bool]:
    """Whether each value of one quantity lies in the interval that is printed for its path and kind."""
    keys = {(item.row.path, item.kind) for item in left}
    limits = {key: interval_of(left, *key, basis) for key in keys}
    pairs = [(item.factor, limits[item.row.path, item.kind]) for item in left]
    return [low <= factor <= high for factor, (low, high, _) in pairs]
