"""Chip lookup: legality and rates as data, with unit, evidence and source; unknown is None.

The tables are in `chip_data.py` (chips, limits) and `data/op_support.csv` (ops); this file holds the
value types and the look-ups. Sources disagree and the tables keep every row: of the rows that apply,
the strictest holds until a measurement settles it (`limit`), and for ops a measured row wins over a
predicted one (`op_status`).

Paths: `e5rt` (MIL text through Espresso's C interface), `direct` (MIL text through the private
Objective-C classes), `netplist` (network descriptions), `coreml` (public API), `compiler` (limits of the
engine's compiler, which bind every path).
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal, cast

from ane_trainer.ane.chips.table import CHIP_ROWS, LIMIT_ROWS
from ane_trainer.ane.errors import UsageError
from ane_trainer.utils import did_you_mean

Bound = Literal["max", "min", "multiple"]
Status = Literal["native", "reachable", "refused", "unknown"]

#: Paths that `limit` and `op_status` know.
PATHS = ("e5rt", "direct", "netplist", "coreml", "compiler")

#: Strictest first. `reachable` runs, but its values were not checked or it runs only through a detour.
_STRICTNESS: tuple[Status, ...] = ("refused", "unknown", "reachable", "native")


@dataclass(frozen=True)
class Evidence:
    """How a figure is known: measured on silicon, decompiled from Apple's tables, published or presumed."""

    kind: Literal["measured", "decompiled", "published", "presumed"]
    source: str


@dataclass(frozen=True)
class Chip:
    """One chip. Rates are sustained figures in one program, None where no source has them.

    `family` is the compiler's architecture name (H13g), `generation` the name of the engine generation
    in the limit tables (A13 = M1 ... A17 = M5, A18 = M6). `engines` counts whole engines (M6 has two),
    `mac_per_cycle` the fp16 multiply-accumulates of one engine in a cycle (16 cores x 256).
    `width_slice_clamp`: magnitude above which a last-axis slice with non-zero offset gives inf
    (the crop unit computes 16 x value in fp16), None where such slices are exact.
    `evidence` has one entry for each field that is not None.
    """

    name: str
    title: str
    family: str
    generation: str
    clock_ghz: float
    engines: int = 1
    mac_per_cycle: int = 4096
    dram_gb_s: float | None = None
    weight_stream_gb_s: float | None = None
    activation_stream_gb_s: float | None = None
    dispatch_floor_us: float | None = None
    power_fp16_w: float | None = None
    width_slice_clamp: float | None = None
    texture_engine: bool = False
    native_sin_cos: bool = False
    native_topk_sort: bool = False
    native_random: bool = False
    winograd: bool = False
    reduction_transpose_threshold: int = 384
    aliases: tuple[str, ...] = ()
    evidence: tuple[tuple[str, Evidence], ...] = field(default=(), repr=False)

    @property
    def peak_fp16_flops(self) -> float:
        """Floating-point operations a second of all engines: 2 x engines x mac_per_cycle x clock."""
        return 2.0 * self.engines * self.mac_per_cycle * self.clock_ghz * 1e9

    @property
    def generation_number(self) -> int:
        """13 for M1 ... 18 for M6."""
        return int(self.generation[1:])

    def evidence_for(self, name: str) -> Evidence | None:
        """The evidence of one field."""
        return dict(self.evidence).get(name)


@dataclass(frozen=True)
class Limit:
    """One claim of one source. `families`: `*`, or words such as `A13`, `A13-A15`, `A16+`, `m4`.

    `bound` says what the value is: a `max`, a `min`, or a number that sizes must be a `multiple` of.
    """

    name: str
    families: str
    path: str
    value: float
    unit: str
    evidence: Evidence
    bound: Bound = "max"
    note: str = ""


@dataclass(frozen=True)
class OpSupport:
    """Whether an op runs on a chip by a path. `rows` are all claims that apply, the deciding one first."""

    op: str
    status: Status
    evidence: str
    source: str
    rows: tuple[OpSupport, ...] = field(default=(), repr=False)


def get_chip(name: str) -> Chip:
    """The chip called `name` (`m1`, `M1 Max`, `m1_max`, or the architecture name `h13g`).

    Raises: UsageError with the nearest name when there is no such chip.
    """
    key = re.sub(r"[\s_-]+", "-", str(name).strip().lower())
    key = re.sub(r"^apple-", "", key)
    key = re.sub(r"^(m\d+)-?(pro|max)$", r"\1-\2", key)
    table = _by_name()
    if key in table:
        return table[key]
    raise UsageError(f"chip: needs a known one; got {name!r}. {did_you_mean(key, known_chips())}")


def known_chips() -> tuple[str, ...]:
    """All chip names, oldest first."""
    return tuple(chip.name for chip in CHIPS)


def limits(chip: Chip | str, name: str, path: str = "e5rt") -> tuple[Limit, ...]:
    """Every claim about limit `name` that applies to the chip on the path, strictest first; may be empty."""
    return _limits(get_chip(chip) if isinstance(chip, str) else chip, name, path)


@cache
def _limits(chip: Chip, name: str, path: str) -> tuple[Limit, ...]:
    paths = (_path(path), "compiler")
    rows = [row for row in LIMITS if row.name == name and row.path in paths and covers(row.families, chip)]
    return tuple(sorted(rows, key=lambda row: row.value if row.bound == "max" else -row.value))


def limit(chip: Chip | str, name: str, path: str = "e5rt") -> Limit | None:
    """The strictest claim about limit `name`, or None when no source says anything."""
    return next(iter(limits(chip, name, path)), None)


#: Whose longest program that is known to compile stands in where a chip has no row of its own.
_LAYERS_OF = "m4"
_KNOWN_LAYERS_FROM = "measured: maderix (M4, chains of convolutions); nothing is published of this chip"


def known_layers(chip: Chip, path: str = "e5rt") -> tuple[float, str]:
    """Operations of the longest program known to compile, and the evidence; the M4's where none is published."""
    row = limit(chip, "program_layers", path)
    known = row or limit(_LAYERS_OF, "program_layers", path)
    assert known is not None
    return known.value, _KNOWN_LAYERS_FROM if row is None else str(known.evidence.source)


def known_limits() -> tuple[str, ...]:
    """Names of all limits."""
    return tuple(dict.fromkeys(row.name for row in LIMITS))


def op_status(op: str, chip: Chip | str, path: str = "e5rt") -> OpSupport:
    """Whether MIL op `op` runs on the chip by the path; status `unknown` when no source says.

    `op` may name a form, as `gather(static_index)`. Without one, rows of the plain op decide; where there
    are only rows of forms, the strictest of them.
    """
    return _op_status(op, get_chip(chip) if isinstance(chip, str) else chip, path)


@cache
def _op_status(op: str, chip: Chip, path: str) -> OpSupport:
    plain, forms = _op_rows().get(_path(path), ({}, {}))
    found = [row for row in plain.get(op, ()) or forms.get(op, ()) if row.applies(chip) is not None]
    claims = sorted((row.claim(chip) for row in found), key=_rank)
    if not claims:
        return OpSupport(op, "unknown", "no source says anything", "")
    best = claims[0]
    return OpSupport(op, best.status, best.evidence, best.source, tuple(claims))


def known_ops(path: str = "e5rt") -> tuple[str, ...]:
    """Ops that the table knows on a path, forms included, sorted."""
    return tuple(sorted(_op_rows().get(_path(path), ({}, {}))[0]))


def covers(families: str, chip: Chip) -> bool:
    """Whether a families text covers a chip: `*`, `A13`, `A13-A15`, `A16+`, `m4`; blanks separate words."""
    for word in families.split():
        if word in ("*", chip.name):
            return True
        match = re.fullmatch(r"A(\d+)(?:-A(\d+)|(\+))?", word)
        if match:
            low = int(match[1])
            high = 99 if match[3] else int(match[2] or low)
            if low <= chip.generation_number <= high:
                return True
    return False


@dataclass(frozen=True)
class _OpRow:
    """A row of `data/op_support.csv`: measured on `families`, presumed the same on `presumed_on`."""

    op: str
    path: str
    status: Status
    families: str
    presumed_on: str
    evidence: str
    source: str

    def applies(self, chip: Chip) -> bool | None:
        """True when the row is about this chip, False when it is presumed, None when it says nothing."""
        if covers(self.families, chip):
            return True
        return False if covers(self.presumed_on, chip) else None

    def claim(self, chip: Chip) -> OpSupport:
        own = self.applies(chip)
        evidence = self.evidence if own else f"presumed as on {self.families} ({self.evidence})"
        return OpSupport(self.op, self.status, evidence, self.source)


def _rank(claim: OpSupport) -> tuple[bool, int]:
    return not claim.evidence.startswith("measured"), _STRICTNESS.index(claim.status)


def _path(path: str) -> str:
    if path not in PATHS:
        raise UsageError(f"path: needs a known one; got {path!r}. {did_you_mean(path, PATHS)}")
    return path


def _evidence(text: str) -> Evidence:
    kind, source = text.split(": ", 1)
    return Evidence(cast(Any, kind), source)


def _chip(row: tuple[str, str, str, str, tuple[str, ...], dict[str, tuple[object, str]]]) -> Chip:
    name, title, family, generation, aliases, facts = row
    values: dict[str, Any] = {key: value for key, (value, _) in facts.items()}
    evidence = tuple((key, _evidence(text)) for key, (_, text) in facts.items())
    return Chip(name, title, family, generation, aliases=aliases, evidence=evidence, **values)


#: All chips, oldest first.
CHIPS: tuple[Chip, ...] = tuple(_chip(row) for row in CHIP_ROWS)

#: All claims about limits.
LIMITS: tuple[Limit, ...] = tuple(
    Limit(name, families, path, value, unit, _evidence(evidence), cast(Bound, bound), note)
    for name, families, path, bound, value, unit, evidence, note in LIMIT_ROWS
)


@cache
def _by_name() -> dict[str, Chip]:
    table = {alias: chip for chip in CHIPS for alias in chip.aliases}
    table.update({chip.name: chip for chip in CHIPS})
    return table


_OpTable = dict[str, list[_OpRow]]


@cache
def _op_rows() -> dict[str, tuple[_OpTable, _OpTable]]:
    """Per path: rows by full op text, and rows of forms by their op's plain name."""
    tables: dict[str, tuple[_OpTable, _OpTable]] = {}
    text = resources.files("ane_trainer.ane.chips").joinpath("op_support.csv").read_text(encoding="utf-8")
    for record in csv.DictReader(text.splitlines()):
        row = _OpRow(**cast(Any, record))
        plain, forms = tables.setdefault(row.path, ({}, {}))
        plain.setdefault(row.op, []).append(row)
        if re.search(r"[(\[ ]", row.op):
            forms.setdefault(re.split(r"[(\[ ]", row.op)[0], []).append(row)
    return tables
