"""A report as one HTML page without links to other files: faults, the tree of modules, histograms of magnitudes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ane_trainer.__version__ import __version__
from ane_trainer.ane.verify.accuracy import LARGEST_POWER, LEAST_POWER
from ane_trainer.ane.verify.faults import RULES, TOLERATED
from ane_trainer.training.debugging.report import PHASES, Fault, OpLine, Report
from ane_trainer.training.debugging.scores import share
from ane_trainer.training.debugging.tree import Node, badness, tree_of
from ane_trainer.training.reporting.page import STYLE

#: Ops with a histogram: those to blame, then the worst.
_HISTOGRAMS = 400
_STEP, _HEIGHT = 3, 40
#: Powers of two of fp16's ends: least subnormal, least normal, largest.
_MARKS = ((-24, "2^-24"), (-14, "2^-14"), (16, "65504"))

_MORE_STYLE = """
details { margin: .15rem 0 .15rem 1rem; } summary { cursor: pointer; } summary b { font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; } .ok { color: var(--good); } .dim { opacity: .7; font-size: .85rem; }
.fault { background: var(--card); border-left: 4px solid var(--bad); border-radius: 6px; }
.fault { padding: .5rem 1rem; margin: .7rem 0; }
.fault.healed { border-color: var(--good); } .fault h3 { margin: .1rem 0 .4rem; font-size: 1rem; }
.fault p { margin: .25rem 0; } .op { margin: .3rem 0 .6rem 1rem; } .op svg { display: block; margin: .2rem 0; }
table.ops { margin: .2rem 0 .4rem 1rem; } code { font-size: .88em; }
@media (max-width: 1100px) {
  details { margin-left: .4rem; } table.ops { margin-left: .2rem; font-size: .72rem; }
  table.ops td, table.ops th { padding: .15rem .25rem; } table.ops svg { width: 7rem; height: auto; }
}
"""


def page(report: Report) -> str:
    """The whole page."""
    title = f"{report.subject} on {report.chip}"
    words = {"agrees": "agrees with", "departs": "departs from", "refused": "is refused; compared with"}
    mark = "ok" if report.agrees else "bad"
    head = f"<p class='sub'><span class='{mark}'>{words[report.verdict]} {escape(report.against)}</span>: "
    head += f"{escape(str(report.score))}; {len(report.ops):,} results of ops</p>"
    shown = _with_histogram(report)
    parts = [
        *(_fault(f, "", shown) for f in report.faults),
        *([] if not report.costs else ["<h2>Where fp16's own rounding costs most</h2>"]),
        *(_fault(f, "", shown) for f in report.costs),
        *([] if not report.lost else ["<h2>Lost on the way, though loss and updates agree</h2>"]),
        *(_fault(f, "", shown) for f in report.lost),
        *([] if not report.healed else ["<h2>Healed by the range pass</h2>"]),
        *(_fault(f, " healed", {}) for f in report.healed),
        *(f"<p class='note'>{escape(note)}</p>" for note in report.notes),
        _legend() if report.ops else "",
        *(_phase(report, phase, shown) for phase in _phases(report)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: accuracy</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}{_MORE_STYLE}</style>'
        f"</head><body>\n<h1>{escape(title)}</h1>\n{head}\n{''.join(parts)}"
        f"<footer>ane_trainer {__version__} debug</footer></body></html>\n"
    )


def _phases(report: Report) -> list[str]:
    return [p for p in PHASES if any(op.phase == p for op in report.ops)] or ([""] if report.ops else [])


def _with_histogram(report: Report) -> dict[str, OpLine]:
    """The ops that get one, by name."""
    blamed = {fault.name for fault in report.faults}
    ordered = sorted(report.ops, key=lambda op: (op.accuracy.name not in blamed, -badness(op)))
    return {op.accuracy.name: op for op in ordered[:_HISTOGRAMS] if op.accuracy.histogram[1]}


def _fault(fault: Fault, kind: str, shown: dict[str, OpLine]) -> str:
    rows = [f"<p>{escape(fault.facts)}. <span class='dim'>{escape(RULES.get(fault.rule, ''))}</span></p>"]
    if fault.more:
        rows.append(f"<p class='dim'>also in {escape(', '.join(fault.more))}</p>")
    if fault.exactly is not None:
        verb = "heals" if fault.exactly.agrees else "helps"
        rows.append(
            f"<p>in double precision here it {verb}: {escape(f'{fault.before} -> {fault.exactly}')}</p>"
        )
    for remedy in fault.remedies:
        mark, word = ("ok", "heals") if remedy.heals else ("dim", "tried")
        rows.append(f"<p><span class='{mark}'>{word}</span> {escape(str(remedy))}</p>")
    if fault.advice:
        rows.append(f"<p><span class='dim'>{fault.advice_is}</span> {escape(fault.advice)}</p>")
    if fault.name in shown:
        rows.append(_histogram(shown[fault.name]))
    phase = f", {fault.phase}" if fault.phase else ""
    title = f"{escape(str(fault.place))}: <code>{escape(fault.op)}</code>{phase}: {escape(fault.rule)}"
    return f"<div class='fault{kind}'><h3>{title}</h3>{''.join(rows)}</div>\n"


def _legend() -> str:
    return (
        "<h2>Every op</h2><p class='note'>own: error of the op itself; total: from the start; against double "
        "precision, relative. under: share of numbers below 2^-14 or lost; dead: share of products that vanish. "
        "Histograms: numbers by power of two, <span style='color:#0072b2'>blue</span> on the engine, grey in double "
        "precision; lines mark the least subnormal, the least normal and the largest fp16 number.</p>"
    )


def _phase(report: Report, phase: str, shown: dict[str, OpLine]) -> str:
    own = [op for op in report.ops if op.phase == phase or not phase]
    title = f"<h2>{phase.capitalize()}</h2>" if phase else ""
    return title + _node(tree_of(own), shown)


def _node(node: Node, shown: dict[str, OpLine]) -> str:
    parts = sorted(node.parts.values(), key=lambda part: -max(map(badness, part.all_ops()), default=0.0))
    inner = "".join(_module(part, shown) for part in parts)
    return inner + _ops(node.ops, shown)


def _module(node: Node, shown: dict[str, OpLine]) -> str:
    ops = list(node.all_ops())
    bad = any(badness(op) > TOLERATED for op in ops)
    own, total = (
        max(getattr(op.accuracy.profile, which).relative for op in ops) for which in ("own", "total")
    )
    infinite = sum(op.accuracy.profile.overflows for op in ops)
    told = f"own {share(own)}" + ("" if ops[0].phase == "optimizer" else f", total {share(total)}")
    told += f", {infinite:,} infinite" if infinite else ""
    mark = "bad" if bad else "dim"
    summary = f"<summary><b>{escape(node.name)}</b> <span class='{mark}'>{told}</span></summary>"
    return f"<details{' open' if bad else ''}>{summary}{_node(node, shown)}</details>\n"


def _ops(ops: Sequence[OpLine], shown: dict[str, OpLine]) -> str:
    if not ops:
        return ""
    head = "<tr><th>op</th><th>kind</th><th>line</th><th>type</th><th>own</th><th>total</th><th>inf</th>"
    head += "<th>under</th><th>dead</th><th>from</th><th>to</th><th>numbers</th></tr>"
    rows = "".join(_op(op, op.accuracy.name in shown) for op in sorted(ops, key=lambda op: -badness(op)))
    return f"<div class='scroll'><table class='ops'>{head}{rows}</table></div>"


def _op(op: OpLine, pictured: bool) -> str:
    found, p = op.accuracy, op.accuracy.profile
    cells = [
        p.name, p.kind, op.place.line.rpartition("/")[2], p.type, share(p.own.relative), share(p.total.relative),
        f"{p.overflows:,}" if p.overflows else "", f"{found.flushed:.0%}" if found.flushed else "",
        "" if found.dead is None else f"{found.dead:.0%}", *("" if v is None else f"{v:.3g}" for v in (p.low, p.high)),
    ]  # fmt: skip
    mark = " class='bad'" if badness(op) > TOLERATED else ""
    first, *rest = (f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr><td{mark}>{first[4:]}{''.join(rest)}<td>{_histogram(op) if pictured else ''}</td></tr>"


def _histogram(op: OpLine) -> str:
    """Both distributions over powers of two as an SVG."""
    engine, double = op.accuracy.histogram
    if not double:
        return ""
    most = max((*engine, *double, 1))
    width = len(double) * _STEP
    parts = [
        f'<svg width="{width}" height="{_HEIGHT + 12}" viewBox="0 0 {width} {_HEIGHT + 12}" role="img" '
        f'aria-label="{escape(op.accuracy.name)}">'
        f'<path d="{_outline(double, most)}" fill="#8886"/>',
        f'<path d="{_outline(engine, most)}" fill="#0072b255" stroke="#0072b2"/>',
    ]
    for power, text in _MARKS:
        x = (power - LEAST_POWER) * _STEP
        parts.append(f'<path d="M{x} 0V{_HEIGHT}" stroke="#d55e00" stroke-dasharray="2 2"/>')
        parts.append(
            f'<text x="{x}" y="{_HEIGHT + 11}" font-size="9" text-anchor="middle" fill="currentColor">{text}</text>'
        )
    zeros = op.accuracy.zeros
    label = f"zeros: {zeros[0]:,} on the engine, {zeros[1]:,} in double precision; 2^{LEAST_POWER} to 2^{LARGEST_POWER}"
    return "".join([*parts, f"<title>{label}</title></svg>"])


def _outline(counts: Iterable[int], most: int) -> str:
    points, x = [f"M0 {_HEIGHT}"], 0
    for count in counts:
        points.append(f"V{_HEIGHT - round(_HEIGHT * (count / most) ** 0.5, 1):g}h{_STEP}")
        x += _STEP
    return "".join([*points, f"V{_HEIGHT}Z"])
