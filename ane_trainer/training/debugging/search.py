"""Finds the ops that a step's agreement breaks at: each suspect in double precision, the rest on the engine.

An op is to blame if the result heals once it, and what cannot hold its true values, runs in double precision. Suspects
are the ops that lose numbers by themselves; where they do not explain it all, the earliest op is bisected from which on
double precision no longer helps. Every question is one run of the program, and there are at most MOST_RUNS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ane_trainer.ane.mil.program import Op
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.verify.accuracy import Accuracy, OpAccuracy
from ane_trainer.ane.verify.faults import RULES, TOLERATED, Fault, fault_of
from ane_trainer.ane.verify.lockstep import Lockstep, Unit
from ane_trainer.ane.verify.profiling import distance
from ane_trainer.training.debugging.scores import Score

#: Runs of the program that a search takes at most.
MOST_RUNS = 16
#: So many steps back lies what a difference of near numbers shows.
ANCESTORS = 4
#: An op whose operands are off by more shows what others on its line did.
MISLED = 0.25
#: By this factor a score has to fall to count as better.
BETTER = 0.7

Criterion = Callable[[dict[str, Array], dict[str, Array]], Score]


@dataclass(frozen=True)
class Suspect:
    """Ops of one source line and direction that lose numbers; `op` is the first, with the fault it shows, `more` the
    other modules that have it.
    """

    op: OpAccuracy
    fault: Fault
    units: frozenset[str]
    phase: str
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Culprit:
    """A suspect with what became of the result when it alone ran in double precision (with those before it, where
    several are to blame; None: double precision itself has no number here); `alone`: whether that healed it.
    """

    suspect: Suspect
    before: Score
    after: Score | None
    alone: bool


class Search:
    """One program's search. `phase_of` tells an op's direction."""

    def __init__(
        self, run: Lockstep, accuracy: Accuracy, criterion: Criterion, phase_of: Callable[[Op], str]
    ) -> None:
        self.run, self.accuracy, self.criterion, self.phase_of = run, accuracy, criterion, phase_of
        self.runs = 0
        exact = accuracy.outcome.exact
        self.before, self.best = criterion(accuracy.outcome.engine, exact), criterion(exact, exact)
        self._by_value = {op.name: op for op in accuracy.ops}
        self._units = {v.name: unit for unit in run.units for v in unit.results}

    def score(self, exactly: frozenset[str]) -> Score:
        """The result with these units in double precision."""
        self.runs += 1
        outputs, _ = self.run.hybrid(lambda unit: unit.name in exactly)
        return self.criterion(outputs, self.accuracy.outcome.exact)

    def heals(self, score: Score) -> bool:
        """Whether it is as good as can be: it agrees, or is next to what double precision makes of the program."""
        return score.agrees or (not self.best.agrees and score.worst <= 1.3 * self.best.worst)

    def culprits(self) -> tuple[Culprit, ...]:
        """Who is to blame; nobody where the result agrees as it is, or the program's own numbers are."""
        if self.before.agrees:
            return ()
        undefined = [s for s in self.suspects() if s.fault.rule == "undefined"]
        if undefined:
            return (Culprit(undefined[0], self.before, None, False),)
        if self.heals(self.before):
            return ()
        best: tuple[Culprit, ...] = ()
        for tolerated in (TOLERATED, TOLERATED / 8):
            suspects = self.suspects(tolerated)
            found = self._one_by_one(suspects)
            if found and self.heals(found[-1].after or self.before):
                return tuple(found)
            together = self._together(suspects) if len(suspects) > 1 else ()
            if together:
                return together
            best = best or tuple(found)
        return best or self._bisected()

    def inputs(self, names: Collection[str]) -> tuple[tuple[str, Score], ...]:
        """Those of the inputs whose rounding alone makes the result depart, worst first, with the score it leaves."""
        everything = lambda unit: True  # noqa: E731
        found = []
        for value in self.run.function.inputs:
            known = value.name in names and value.name in (self.run.given_exact or {})
            if value.type.dtype != "fp16" or not known:
                continue
            feed, exact = self.run.feed(value.name), self.run.exact_feed(value.name)
            if distance(feed, exact).relative > 1e-4 and self.runs < MOST_RUNS:
                self.runs += 1
                outputs, _ = self.run.hybrid(everything, wide=False, rounded={value.name})
                score = self.criterion(outputs, self.accuracy.outcome.exact)
                departs = score.worst > 1.0 or score.note != self.best.note
                if departs and not self.heals(score):
                    found.append((value.name, score))
        return tuple(sorted(found, key=lambda pair: -pair[1].worst))

    def _one_by_one(self, suspects: Sequence[Suspect]) -> list[Culprit]:
        """In order, those that make it better, with those before them."""
        found: list[Culprit] = []
        exactly: frozenset[str] = frozenset()
        now = self.before
        for suspect in suspects[: MOST_RUNS // 2]:
            after = self.score(exactly | suspect.units)
            if self.heals(after) or after.worst < BETTER * now.worst:
                found.append(Culprit(suspect, now, after, self.heals(after) and not exactly))
                exactly, now = exactly | suspect.units, after
            if self.heals(now):
                break
        return found

    def _together(self, suspects: Sequence[Suspect]) -> tuple[Culprit, ...]:
        """Where it takes several at once: all that cannot be left out."""
        kept = list(suspects)
        after = self.score(_all_of(kept))
        if not self.heals(after):
            return ()
        for suspect in reversed(suspects):
            rest = [s for s in kept if s is not suspect]
            if self.runs < MOST_RUNS and rest and self.heals(self.score(_all_of(rest))):
                kept = rest
        return tuple(Culprit(s, self.before, after, len(kept) == 1) for s in kept)

    def suspects(self, tolerated: float = TOLERATED) -> list[Suspect]:
        """The ops that lose numbers, by source line and direction, in order of the program."""
        groups: dict[tuple[str, str], list[tuple[OpAccuracy, Fault, Unit]]] = {}
        for unit in self.run.units:
            for op in unit.own:
                for value in op.results:
                    fault = fault_of(self._by_value[value.name], self._largest_operand(op), tolerated)
                    if fault is not None:
                        key = (_line(op), self.phase_of(op))
                        groups.setdefault(key, []).append((self._by_value[value.name], fault, unit))
        return [self._suspect(phase, members) for (_, phase), members in groups.items()]

    def _suspect(self, phase: str, members: Sequence[tuple[OpAccuracy, Fault, Unit]]) -> Suspect:
        order = list(RULES)
        causes = [m for m in members if not m[0].before > MISLED] or members
        op, fault, _ = min(causes, key=lambda m: order.index(m[1].rule))
        units = {unit.name for _, _, unit in members}
        for _, each, unit in members:
            if each.rule == "cancellation":  # what rounding left in its operands is what it shows
                units |= self._ancestors(unit)
        places = dict.fromkeys(m[0].profile.source or m[0].name for m in members)
        more = tuple(place for place in places if place != (op.profile.source or op.name))
        return Suspect(op, fault, frozenset(units), phase, more)

    def _ancestors(self, unit: Unit) -> set[str]:
        """The units that made its operands, some steps back."""
        found, last = set[str](), [unit]
        for _ in range(ANCESTORS):
            last = [self._units[v.name] for each in last for v in each.reads if v.name in self._units]
            found |= {each.name for each in last}
        return found

    def _largest_operand(self, op: Op) -> float:
        known = [self._by_value[v.name] for v in op.operands() if v.name in self._by_value]
        return max((max(abs(k.profile.low or 0.0), abs(k.profile.high or 0.0)) for k in known), default=0.0)

    def _bisected(self) -> tuple[Culprit, ...]:
        """The op where it tips: all before it in double precision does not heal, it as well does."""
        names = [unit.name for unit in self.run.units]
        low, high, after = 0, len(names), self.score(frozenset(names))
        while high - low > 1 and self.runs < MOST_RUNS + len(names).bit_length():
            middle = (low + high) // 2
            score = self.score(frozenset(names[:middle]))
            if self.heals(score):
                high, after = middle, score
            else:
                low = middle
        if not self.heals(after):
            return ()
        unit = self._units[names[high - 1]]
        op = self._by_value[unit.name]
        facts = f"its result is off by {100 * op.profile.total.relative:.2g} %, its operands by {100 * op.before:.2g} %"
        fault = fault_of(op) or Fault("rounding", facts, op.profile.total.relative)
        suspect = Suspect(op, fault, frozenset([unit.name]), self.phase_of(unit.own[-1]))
        return (Culprit(suspect, self.before, after, False),)


def _line(op: Op) -> str:
    """The user's line that an op comes from, else its place."""
    source = op.source or op.name
    return source.rpartition("(")[2] if source.endswith(")") else source


def _all_of(suspects: Sequence[Suspect]) -> frozenset[str]:
    return frozenset().union(*(s.units for s in suspects))
