"""The answer of `check` as values: problems with place, evidence and fix, one verdict a chip, text, JSON and SARIF."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ane_trainer.__version__ import __version__
from ane_trainer.commands.options import table

Level = Literal["error", "warning", "note"]
#: Worst first. `departs`: nothing refuses it, but its numbers are not fp32's.
VERDICTS = ("does not train", "departs", "unproven", "trains")

_PLACE = re.compile(r"([^\s()]+\.py):(\d+)")
_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass(frozen=True)
class Problem:
    """One thing found: `rule` names its kind, `evidence` says whence it is known, `fix` what heals it (may be empty).

    An error keeps the model from training on the chip, a warning leaves it unproven or wrong, a note does neither.
    """

    rule: str
    level: Level
    where: str
    op: str
    reason: str
    fix: str = ""
    evidence: str = ""

    def __str__(self) -> str:
        known = f" [{self.evidence}]" if self.evidence and self.evidence not in self.reason else ""
        return f"{self.where}: {self.op}: {self.reason}{known} {self.fix}".rstrip()


@dataclass(frozen=True)
class OpCheck:
    """One op of the step: its place, what the chip's tables say of it, and by which evidence."""

    name: str
    op: str
    where: str
    status: str
    evidence: str


@dataclass(frozen=True)
class Rewrite:
    """What was changed to keep an op, or an input, in the engine's range: its place, how, and why."""

    where: str
    op: str
    change: str
    reason: str


@dataclass(frozen=True)
class ChipVerdict:
    """What was found of one chip. `budgets` are sizes of the program beside what is known of the chip.

    `agreement` is the first step against fp32 in words, empty where it was not run. `program`: the subject was one, so
    that the text says "runs" for "trains".
    """

    chip: str
    title: str
    problems: tuple[Problem, ...]
    checked: tuple[OpCheck, ...] = field(default=(), repr=False)
    rewrites: tuple[Rewrite, ...] = ()
    budgets: Mapping[str, object] = field(default_factory=dict)
    agreement: str = ""
    program: bool = False

    @property
    def fits(self) -> bool:
        """Whether the step trains as far as is known: neither refused nor away from fp32."""
        return self.verdict in ("trains", "unproven")

    @property
    def verdict(self) -> str:
        """One of VERDICTS, by the worst problem alone."""
        rules = {problem.rule for problem in self.problems if problem.level != "note"}
        if any(problem.level == "error" for problem in self.problems):
            return "does not train"
        if rules & {"agreement"}:
            return "departs"
        return "unproven" if rules else "trains"

    @property
    def ops(self) -> dict[str, int]:
        """Ops by what the chip's tables say of them."""
        return dict(Counter(op.status for op in self.checked))


@dataclass(frozen=True)
class Verdict:
    """The answer of `check` for several chips; `sampled` says what of the batch was looked at."""

    model: str
    chips: tuple[ChipVerdict, ...]
    sampled: str = ""

    @property
    def fits(self) -> bool:
        """True if the step trains, as far as is known, on every chip asked about."""
        return all(chip.fits for chip in self.chips)

    def to_json(self) -> dict[str, object]:
        """The same for machines."""
        chips = [
            {
                **asdict(chip), "ops": chip.ops, "fits": chip.fits, "verdict": chip.verdict,
                "refused": [asdict(p) for p in chip.problems if p.level == "error"],
                "notes": [asdict(p) for p in chip.problems if p.level != "error"],
            }
            for chip in self.chips
        ]  # fmt: skip
        return {"model": self.model, "fits": self.fits, "sampled": self.sampled, "chips": chips}

    def as_text(self) -> str:
        """A line a chip, then every problem with its place, the evidence and the way out."""
        rows = [("chip", "verdict", "ops", "first step against fp32")]
        for chip in self.chips:
            counted = ", ".join(f"{count} {status}" for status, count in sorted(chip.ops.items()))
            word = chip.verdict.replace("train", "run") if chip.program else chip.verdict
            rows.append(
                (chip.title, word, counted or "-", chip.agreement.replace(" with fp32", "") or "not run")
            )
        lines = [*table(rows, range(4)), *([self.sampled] if self.sampled else [])]
        reasons: dict[Problem, list[str]] = {}
        for chip in self.chips:
            for problem in chip.problems:
                reasons.setdefault(problem, []).append(chip.chip)
        ordered = sorted(reasons.items(), key=lambda item: ("error", "warning", "note").index(item[0].level))
        for number, (problem, chips) in enumerate(ordered, 1):
            lines.append(f"{number:>3}  {problem.level:<8}[{', '.join(chips)}] {problem}")
        lines += _rewrites_text(self.chips)
        for chip in self.chips:
            if chip.budgets:
                lines.append(
                    f"{chip.title}: " + "; ".join(f"{name} {value}" for name, value in chip.budgets.items())
                )
        return "\n".join(lines)

    def to_sarif(self, sources: Iterable[Path] = ()) -> dict[str, object]:
        """SARIF 2.1.0; places in `sources`, the user's files, keep their paths and lines."""
        paths = {path.name: path for path in sources}
        results = [
            _result(problem, chip, paths)
            for chip in self.chips
            for problem in chip.problems
            if problem.level != "note"
        ]
        rules = sorted({problem.rule for chip in self.chips for problem in chip.problems})
        driver = {
            "name": "ane-trainer check", "version": __version__,
            "rules": [{"id": rule, "shortDescription": {"text": RULES[rule]}} for rule in rules],
        }  # fmt: skip
        return {
            "$schema": _SARIF,
            "version": "2.1.0",
            "runs": [{"tool": {"driver": driver}, "results": results}],
        }


def _rewrites_text(chips: Iterable[ChipVerdict]) -> list[str]:
    """The rewrites, once for chips that take the same, by what is done: the places, and the first reason."""
    alike: dict[tuple[Rewrite, ...], list[str]] = {}
    for chip in chips:
        if chip.rewrites:
            alike.setdefault(chip.rewrites, []).append(chip.title)
    lines = []
    for rewrites, titles in alike.items():
        places: dict[str, list[Rewrite]] = {}
        for rewrite in rewrites:
            places.setdefault(rewrite.where, []).append(rewrite)
        ways: dict[tuple[str, str, str, int], list[str]] = {}
        for where, members in places.items():
            first = min(members, key=lambda m: (m.op != "norm", m.reason == FOLLOWS))
            ways.setdefault((first.op, first.change, first.reason, len(members) - 1), []).append(where)
        lines.append(f"{', '.join(titles)}: {len(rewrites)} rewritten to stay in range:")
        for (op, change, reason, more), wheres in list(ways.items())[:_WAYS]:
            others = f" and {len(wheres) - 1} places like it" if len(wheres) > 1 else ""
            values = f", and {more} more of its values" if more else ""
            lines.append(f"       {wheres[0]}{others}: {op}: {change} ({reason}){values}")
        if len(ways) > _WAYS:
            rest = sum(len(wheres) for wheres in list(ways.values())[_WAYS:])
            lines.append(f"       and at {rest} more places: --json has all")
    return lines


#: Kinds of rewrites that are shown.
_WAYS = 12
#: The reason of a value that carries a power of two because another does.
FOLLOWS = "what it is made of carries one"

#: Kinds of problems.
RULES = {
    "refused": "The chip, or its compiler, does not take this.",
    "unsupported": "There is no form of this for the engine.",
    "unknown-op": "No source says whether the chip runs this op.",
    "program-size": "The program is larger than any that is known to compile.",
    "clamped-slice": "Large values become infinite in this slice on this chip.",
    "agreement": "The first step departs from fp32 by more than fp16 costs.",
    "overflow": "Numbers become infinite here.",
    "near-limit": "Numbers come near the largest that the engine holds here.",
    "dead-products": "Products below the engine's least step vanish here.",
    "table-end": "Operands lie beyond the end of the engine's table.",
    "working-set": "An operand exceeds what stays on the chip.",
}


def _result(problem: Problem, chip: ChipVerdict, paths: Mapping[str, Path]) -> dict[str, object]:
    found: dict[str, object] = {
        "ruleId": problem.rule,
        "level": problem.level,
        "message": {"text": f"{chip.title}: {problem.op}: {problem.reason} {problem.fix}".rstrip()},
    }
    match = _PLACE.search(problem.where)
    shown = Path(match[1]) if match else next(iter(paths.values()), None)
    if shown is not None:
        path = paths.get(shown.name, shown)
        uri = path.as_uri() if path.is_absolute() else quote(path.as_posix())
        location: dict[str, object] = {"artifactLocation": {"uri": uri}}
        location["region"] = {"startLine": int(match[2]) if match else 1}
        found["locations"] = [{"physicalLocation": location}]
    return found
