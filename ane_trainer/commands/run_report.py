"""What `run` found, as tables for the terminal and as JSON: ports, distances from fp64, ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ane_trainer.commands.options import table

if TYPE_CHECKING:  # the command imports the simulator, and PyTorch with it, only when it runs
    from ane_trainer.ane.mil.weights import Array
    from ane_trainer.ane.verify.profiling import Distance, OpProfile, OutputError, Profile


#: Rows of the profile's table; a longer program shows the ops that matter.
TABLE_ROWS = 40


@dataclass(frozen=True)
class Port:
    """An input, output or state of a run: name, type, the range of its numbers, and where they come from or
    are.
    """

    name: str
    type: str
    low: float | None
    high: float | None
    mean: float | None
    place: str


@dataclass(frozen=True)
class ProgramRun:
    """What `run` found. `profile` and `errors` (of outputs against double precision) where asked for."""

    program: str
    function: str
    ops: int
    where: str
    steps: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[Port, ...]
    profile: Profile | None = None
    errors: tuple[OutputError, ...] | None = None

    def to_json(self) -> dict[str, object]:
        """The same for machines."""
        found = asdict(self)
        if self.profile is None:
            del found["profile"]
        if self.errors is None:
            del found["errors"]
        return found

    def as_text(self) -> str:
        """Ports first, then the comparison, then the ops."""
        steps = "" if self.steps == 1 else f", {self.steps} steps"
        lines = [
            f"{self.program}: function {self.function}, {self.ops} ops{steps}, on the {self.where}",
            *_ports("inputs", self.inputs),
            *_ports("outputs", self.outputs),
            *_ports("states", self.states),
        ]
        if self.errors is not None:
            lines += _error_lines(self.errors)
        if self.profile is not None:
            lines += _profile_lines(self.profile)
        return "\n".join(lines)


def port_of(name: str, type_: str, array: Array, place: str) -> Port:
    """A port's line; the range is that of its finite numbers."""
    wide = array.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    if not finite.size:
        return Port(name, type_, None, None, None, place)
    return Port(name, type_, float(finite.min()), float(finite.max()), float(finite.mean()), place)


def _ports(title: str, ports: Sequence[Port]) -> list[str]:
    """A table of ports; nothing where there are none."""
    if not ports:
        return []
    rows: list[tuple[str, ...]] = [(title, "type", "min", "max", "mean", "")]
    rows += [(p.name, p.type, *map(_number, (p.low, p.high, p.mean)), p.place) for p in ports]
    return ["", *table(rows, left=(0, 1, 5))]


def _error_lines(errors: Sequence[OutputError]) -> list[str]:
    rows = [("against fp64", "type", "largest error", "relative", "rms relative", "inf", "as rounded")]
    for e in errors:
        d = e.distance
        numbers = (_number(d.largest), _number(d.largest_relative), _number(d.relative))
        rows.append((e.name, e.type, *numbers, str(e.infinities), f"{e.same:.1%}"))
    return ["", *table(rows, left=(0, 1))]


def _profile_lines(found: Profile) -> list[str]:
    """The table of ops, the worst marked, and what to know of them."""
    worst = found.worst()
    shown = found.ops
    if len(shown) > TABLE_ROWS:
        heaviest = sorted(found.ops, key=lambda op: -(op.time_us or 0))[:10]
        chosen = {op.name for op in (*found.worst(TABLE_ROWS - 10), *heaviest)}
        shown = tuple(op for op in found.ops if op.name in chosen)
    head = ("op", "kind", "min", "max", "to inf", "to 0", "own error", "own rms", "in all", "us", "")
    rows = [head, *(_op_row(op, worst) for op in shown)]
    lines = ["", *table(rows, left=(0, 1, 10))]
    if len(shown) < len(found.ops):
        lines.append(f"{len(shown)} of {len(found.ops)} ops: the worst and the slowest; --json has all")
    overflows, underflows = sum(op.overflows for op in found.ops), sum(op.underflows for op in found.ops)
    lines += [
        "",
        f"{overflows} overflows to inf, {underflows} underflows to zero; one run {found.time_us:,.0f} us here",
    ]
    if worst:
        lines.append("worst:")
        lines += [f"  {number}. {_reason(op)}" for number, op in enumerate(worst, 1)]
    return lines


def _op_row(op: OpProfile, worst: Sequence[OpProfile]) -> tuple[str, ...]:
    mark = "<-" if op in worst else ""
    time_us = "" if op.time_us is None else f"{op.time_us:.1f}"
    return (
        op.name, op.kind, _number(op.low), _number(op.high), str(op.overflows or ""), str(op.underflows or ""),
        _number(op.own.largest), _number(op.own.relative), _number(op.total.relative), time_us, mark,
    )  # fmt: skip


def _reason(op: OpProfile) -> str:
    """One bad op in words: its place, and what is wrong with it."""
    place = f" at {op.source}" if op.source else ""
    harm = [f"{op.overflows} results overflow to inf"] if op.overflows else []
    harm += [f"{op.underflows} underflow to zero"] if op.underflows else []
    harm.append(f"adds {_error(op.own)}, in all {_error(op.total)}")
    return f"{op.name} = {op.kind} {op.type}{place}: {', '.join(harm)}"


def _error(d: Distance) -> str:
    return f"{_number(d.relative)} rms relative (largest {_number(d.largest)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
