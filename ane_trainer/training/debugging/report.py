"""The answer of `debug`: verdict, faults with place and remedies, what rewrites heal, and every op's numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from ane_trainer.ane.errors import Finding
from ane_trainer.ane.verify.accuracy import OpAccuracy
from ane_trainer.ane.verify.faults import HELP
from ane_trainer.training.debugging.scores import Score

#: Directions of a step, in order; a program that is no step has none.
PHASES = ("forward", "loss", "backward", "optimizer")

_LINE = re.compile(r"^(.*?)\s*\(([^()]+:\d+)\)$")


@dataclass(frozen=True)
class Place:
    """Where an op comes from: the module's path, and the user's `file.py:line`; each may be empty."""

    module: str
    line: str = ""

    @classmethod
    def of(cls, source: str | None, name: str) -> Place:
        """From the text that capture records; `name` of the op where there is none."""
        match = _LINE.match(source or "")
        return cls(match[1], match[2]) if match else cls(source or name)

    def __str__(self) -> str:
        return f"{self.module} ({self.line})" if self.line else self.module


@dataclass(frozen=True)
class OpLine:
    """One result of one op with its place and direction."""

    place: Place
    phase: str
    accuracy: OpAccuracy

    def to_json(self) -> dict[str, object]:
        """Its numbers, flat."""
        found, profile = self.accuracy, self.accuracy.profile
        return {
            "name": profile.name, "op": profile.kind, "module": self.place.module, "line": self.place.line,
            "phase": self.phase, "type": profile.type, "own_error": profile.own.relative,
            "total_error": profile.total.relative, "overflows": profile.overflows, "infinities": profile.infinities,
            "underflow": found.flushed, "dead_products": found.dead, "low": profile.low, "high": profile.high,
            "peak": found.peak, "evidence": profile.fidelity,
        }  # fmt: skip


@dataclass(frozen=True)
class Remedy:
    """Something that was tried: how a user does it, and the score before and after, measured."""

    name: str
    how: str
    before: Score
    after: Score

    @property
    def heals(self) -> bool:
        """Whether the result agrees with it."""
        return self.after.agrees

    def __str__(self) -> str:
        return f"{self.how}. Measured: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Fault:
    """An op to blame. `rule` is one of `faults.RULES` or "refused"; `exactly`: the score with this op (and what
    follows until its numbers are in range) in double precision, None where that was not asked; `more`: other places
    of the same line with the same fault.
    """

    op: str
    name: str
    place: Place
    phase: str
    rule: str
    facts: str
    before: Score
    exactly: Score | None = None
    alone: bool = False
    more: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    advice: str = ""

    @property
    def advice_is(self) -> str:
        """What the advice is: what usually helps, which was not tried here, or what is known of this one."""
        return "untried" if self.advice == HELP.get(self.rule) else "advice"

    @property
    def remedy(self) -> Remedy | None:
        """The first remedy that heals."""
        return next((r for r in self.remedies if r.heals), None)

    @classmethod
    def of_finding(cls, finding: Finding, score: Score, remedies: Sequence[Remedy] = ()) -> Fault:
        """What refused the model as a fault."""
        return cls(
            finding.op, finding.op, Place.of(finding.where, finding.op), "", "refused", finding.reason, score,
            remedies=tuple(remedies), advice=finding.fix,
        )  # fmt: skip

    def to_json(self) -> dict[str, object]:
        """The same for machines."""
        remedies = [{**asdict(r), "heals": r.heals} for r in self.remedies]
        return {**asdict(self), "where": str(self.place), "remedies": remedies}


@dataclass(frozen=True)
class Report:
    """What `debug` found of a step or program.

    verdict  "agrees" (with fp32, as far as fp16 goes), "departs", or "refused" (there is no step to look at)
    faults   the ops to blame, in order; empty where it agrees
    healed   faults that the rewrites of the range pass heal: without them the step departs
    costs    faults of a step that agrees, where fp16's own rounding costs more than usual
    lost     ops of a step that agrees which lose numbers that its loss and updates do not need today
    ops      every op's numbers, in order of work; empty where refused
    """

    subject: str
    chip: str
    verdict: str
    score: Score
    against: str
    faults: tuple[Fault, ...] = ()
    healed: tuple[Fault, ...] = ()
    costs: tuple[Fault, ...] = ()
    lost: tuple[Fault, ...] = ()
    ops: tuple[OpLine, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    seconds_step: float = 0.0
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether nothing is to blame."""
        return self.verdict == "agrees"

    def to_json(self) -> dict[str, object]:
        """The same for machines; histograms are in the page only."""
        return {
            "subject": self.subject, "chip": self.chip, "verdict": self.verdict, "agrees": self.agrees,
            "against": self.against, "score": asdict(self.score), "faults": [f.to_json() for f in self.faults],
            "healed": [f.to_json() for f in self.healed],
            "costs": [f.to_json() for f in self.costs], "lost": [f.to_json() for f in self.lost],
            "notes": list(self.notes),
            "seconds_step": self.seconds_step, "seconds": self.seconds, "ops": [op.to_json() for op in self.ops],
        }  # fmt: skip

    def as_text(self) -> str:
        """Verdict and faults, then a tree of modules and ops, 80 columns wide."""
        from ane_trainer.training.debugging.tree import as_text

        return as_text(self)

    def as_html(self) -> str:
        """One page without links to other files, with histograms of magnitudes."""
        from ane_trainer.training.debugging.html import page

        return page(self)

    def __str__(self) -> str:
        return self.as_text()
