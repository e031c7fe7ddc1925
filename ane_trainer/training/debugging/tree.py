"""A report as text: the verdict, faults with remedies, and a tree of modules and ops, at most 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ane_trainer.ane.verify.faults import TOLERATED
from ane_trainer.training.debugging.report import PHASES, Fault, OpLine, Report
from ane_trainer.training.debugging.scores import share

WIDTH = 80
#: Ops shown of one module, and modules shown in all; the worst come first, the rest is counted.
_OPS, _MODULES = 4, 12


@dataclass
class Node:
    """A module: its ops, and the modules in it."""

    name: str
    ops: list[OpLine] = field(default_factory=list)
    parts: dict[str, Node] = field(default_factory=dict)

    def all_ops(self) -> Iterable[OpLine]:
        """Its own ops and those of all modules in it."""
        yield from self.ops
        for part in self.parts.values():
            yield from part.all_ops()


def badness(op: OpLine) -> float:
    """How bad an op is: by numbers that became infinite, then by its own error."""
    profile = op.accuracy.profile
    return (10.0 if profile.overflows else 0.0) + min(profile.own.relative, 5.0)


def tree_of(ops: Sequence[OpLine]) -> Node:
    """The ops by module."""
    root = Node("")
    for op in ops:
        node = root
        for part in _path(op):
            node = node.parts.setdefault(part, Node(part))
        node.ops.append(op)
    return root


def _path(op: OpLine) -> list[str]:
    module = op.place.module
    if op.phase == "optimizer" or " " in module:
        return [module]
    return module.split(".")


def as_text(report: Report) -> str:
    """The whole report."""
    lines = [*_headline(report)]
    for number, fault in enumerate(report.faults, 1):
        lines += ["", *_fault(fault, f"{number}. ")]
    if report.costs:
        lines += ["", "As good as rounding to fp16 allows, which costs most here:"]
        for fault in report.costs:
            lines += _fault(fault, "   ")
    if report.healed:
        lines += ["", "Healed by the range pass (without its rewrites the step departs):"]
        for fault in report.healed:
            lines += _fault(fault, "   ")
    if report.lost:
        lines += ["", "Lost on the way, though loss and updates agree:"]
        for fault in report.lost:
            lines += _fault(fault, "   ")
    for note in report.notes:
        lines += _wrapped(note, "note: ")
    if report.ops:
        lines += ["", *_tree(report)]
    return "\n".join(line.rstrip() for line in lines)


def _headline(report: Report) -> list[str]:
    words = {
        "agrees": "agrees with", "departs": "DEPARTS from", "refused": "is REFUSED; compared with",
    }[report.verdict]  # fmt: skip
    lines = _wrapped(f"{report.subject} on {report.chip} {words} {report.against}: {report.score}.", "")
    if report.seconds_step:
        ratio = f" ({report.seconds / report.seconds_step:.0f} steps)" if report.seconds_step > 1.0 else ""
        times = f"{len(report.ops):,} results; one exact step takes {report.seconds_step:.2g} s, this took "
        lines += _wrapped(f"{times}{report.seconds:.3g} s{ratio}.", "")
    return lines


def _fault(fault: Fault, start: str) -> list[str]:
    pad = " " * len(start)
    title = f"{start}{fault.place}: {fault.op}"
    lines = _wrapped(f"{title}{', ' + fault.phase if fault.phase else ''}: {fault.rule}", "", pad)
    if fault.more:
        shown = ", ".join(fault.more[:4]) + (
            f" and {len(fault.more) - 4} more" if len(fault.more) > 4 else ""
        )
        lines += _wrapped(f"also in {shown}", pad)
    lines += _wrapped(fault.facts, f"{pad}what     ")
    if fault.exactly is not None:
        verb = "heals" if fault.exactly.agrees else "helps"
        lines += _wrapped(
            f"in double precision here it {verb}: {fault.before} -> {fault.exactly}", f"{pad}proof    "
        )
    healing = [r for r in fault.remedies if r.heals]
    for remedy in healing[:3]:
        lines += _wrapped(f"{remedy.how}: {remedy.before} -> {remedy.after}", f"{pad}heals    ")
    if not healing:
        for remedy in fault.remedies[:2]:
            lines += _wrapped(f"{remedy.how}: {remedy.before} -> {remedy.after}", f"{pad}tried    ")
    if fault.advice:
        lines += _wrapped(fault.advice, f"{pad}{fault.advice_is:<9}")
    return lines


def _wrapped(text: str, start: str, pad: str | None = None) -> list[str]:
    inner = " " * len(start) if pad is None else pad
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=inner,
        break_long_words=False,
        break_on_hyphens=False,
    )


_HEAD = f"{'':40}{'own':>7} {'total':>7} {'inf':>5} {'under':>6} {'dead':>6}"


def _tree(report: Report) -> list[str]:
    """By direction, modules with their worst ops; what is fine is folded into a count."""
    lines = [_HEAD]
    phases = [p for p in PHASES if any(op.phase == p for op in report.ops)] or [""]
    for phase in phases:
        own = [op for op in report.ops if op.phase == phase or not phase]
        if phase:
            lines.append(_row(phase, own, 0))
        if not report.agrees or any(badness(op) > TOLERATED for op in own) or not phase:
            lines += _below(tree_of(own), 1 if phase else 0, _MODULES)
    lines.append("own: error of the op itself, total: from the start, inf: became infinite,")
    lines.append("under: share below 2^-14, dead: share of products that vanish. Worst first.")
    if report.agrees and any(badness(op) > TOLERATED for op in report.ops):
        lines.append("What is lost above does not reach loss or updates: they agree.")
    return lines


def _below(node: Node, depth: int, most: int) -> list[str]:
    lines: list[str] = []
    parts = sorted(node.parts.values(), key=lambda part: -max(map(badness, part.all_ops()), default=0.0))
    fine = 0
    for part in parts:
        ops = list(part.all_ops())
        bad = any(badness(op) > TOLERATED for op in ops)
        if not bad and (fine or len(lines) >= most or depth > 2):
            fine += len(ops)
            continue
        lines.append(_row(part.name, ops, depth))
        if bad or depth < 1:
            lines += _below(part, depth + 1, most)
    if fine:
        lines.append(f"{'  ' * depth}{fine} more, all fine")
    worst = [op for op in sorted(node.ops, key=lambda op: -badness(op)) if badness(op) > TOLERATED]
    for op in worst[:_OPS]:
        lines.append(_row(f"{op.accuracy.kind} {op.accuracy.name}{_at(op)}", [op], depth))
    if len(worst) > _OPS:
        lines.append(f"{'  ' * depth}{len(worst) - _OPS} more like these")
    return lines


def _at(op: OpLine) -> str:
    return f" {op.place.line.rpartition('/')[2]}" if op.place.line else ""


def _row(name: str, ops: Sequence[OpLine], depth: int) -> str:
    profiles = [op.accuracy.profile for op in ops]
    own, total = (max(getattr(p, which).relative for p in profiles) for which in ("own", "total"))
    if total >= 10.0 and own <= TOLERATED and ops[0].phase == "optimizer":
        total = -1.0  # what is left of a weight beyond fp16: next to nothing in double precision
    dead = [op.accuracy.dead for op in ops if op.accuracy.dead is not None]
    under = max(op.accuracy.flushed for op in ops)
    left = "  " * depth + name
    left = left if len(left) <= 39 else left[:36] + "..."
    infinite = sum(p.overflows for p in profiles)
    cells = (
        _short(own),
        _short(total),
        f"{infinite or '-'}",
        f"{under:.0%}",
        f"{max(dead):.0%}" if dead else "-",
    )
    return f"{left:40}{cells[0]:>7} {cells[1]:>7} {cells[2]:>5} {cells[3]:>6} {cells[4]:>6}"


def _short(value: float) -> str:
    if value <= 0.0:
        return "0" if value == 0.0 else "-"
    if not value < 10.0:
        return ">10"
    return f"{value:.1e}".replace("e-0", "e-") if value < 0.01 else share(value).replace(" ", "")
