"""The modelled step in report.html: a roofline with the program's ops, and memory over the step, as plain SVG.

`pictures` draws the same two for files beside a trace, through matplotlib; here it would take longer than a short
training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape

from ane_trainer.ane.chips.cost import rates
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.chips.timeline import HELD, Timeline
from ane_trainer.training.reporting.charts import COLOURS, grid, ticks
from ane_trainer.training.reporting.pictures import BOUNDS, NOTE, ROOFS
from ane_trainer.utils import format_bytes

_WIDTH, _HEIGHT = 520, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 28, 52
_INNER = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)
#: How the roofs are dashed, in their order.
_DASHES = ("", "6 3", "6 3 1 3", "1 3")
#: Dots that are drawn, those that take longest.
_MOST_DOTS = 1_000

Place = Callable[[float, float], tuple[float, float]]


def step_charts(found: Sequence[Timeline]) -> list[str]:
    """A roofline and memory over the step for each chip; a step's programs on one chip run in turn."""
    steps: dict[tuple[str, str], list[Timeline]] = {}
    for program in found:
        steps.setdefault((program.chip, program.path), []).append(program)
    return [chart for own in steps.values() for chart in (roofline(own), memory_over_step(own)) if chart]


def roofline(programs: Sequence[Timeline]) -> str:
    """FLOP/s over FLOPs a byte of each op, under the roofs of the array and of each stream; "" without arithmetic.

    Bytes are operands, results and constants, once each.
    """
    found = programs[0]
    ops = [op for part in programs for op in part.cost.ops if op.flops and op.bytes and op.latency_us > 0]
    if not ops:
        return ""
    chip = get_chip(found.chip)
    values = {name: rate.value for name, rate in rates(found.chip, found.path).items()}
    reached = chip.peak_fp16_flops * values["mac"]
    dots = [(op.flops / op.bytes, op.flops / op.latency_us * 1e6, op) for op in ops]
    left = min(x for x, _, _ in dots) / 2
    right = max(*(2 * x for x, _, _ in dots), 4 * reached / (values["pass"] * 1e9))
    low = min(*(y for _, y, _ in dots), left * values["write"] * 1e9) / 2
    place, parts = _logarithmic(left, right, low, 4 * chip.peak_fp16_flops, "FLOPs a byte", "FLOP/s")
    parts.append(_path([place(left, chip.peak_fp16_flops), place(right, chip.peak_fp16_flops)], "2 3"))
    labels = []
    for number, ((name, label), dash) in enumerate(zip(ROOFS.items(), _DASHES, strict=True)):
        slope = values[name] * 1e9
        ridge = min(reached / slope, right)
        corners = [(left, left * slope), (ridge, ridge * slope), (right, min(reached, right * slope))]
        points = [place(x, y) for x, y in corners if y > low]
        parts.append(_path(points, dash))
        line = _TOP + 12 + 14 * number
        labels.append(_path([(_LEFT + 8, line - 4), (_LEFT + 30, line - 4)], dash))
        labels.append(_text(_LEFT + 36, line, f"{label} {values[name]:.3g} GB/s", "start"))
    parts += [_behind(_LEFT + 4, _TOP + 1, 180, 14 * len(ROOFS) + 4), *labels]
    longest = max(op.latency_us for op in ops)
    for x, y, op in sorted(dots, key=lambda dot: -dot[2].latency_us)[:_MOST_DOTS]:
        across, down = place(x, y)
        size = math.sqrt(12 + 140 * op.latency_us / longest) / 1.8
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{size:.1f}" fill="{BOUNDS[op.bound_by]}" fill-opacity=".6">'
            f"<title>{escape(op.name)}: {op.latency_us:.3g} us, {x:.3g} FLOPs a byte</title></circle>"
        )
    names = [
        (f"{bound}: {len(of)} ops, {sum(op.latency_us for op in of):,.0f} us", colour)
        for bound, colour in BOUNDS.items() if (of := [op for op in ops if op.bound_by == bound])
    ]  # fmt: skip
    title = f"{found.title}, {found.path}: roofline with the ops of a step{_in_turn(programs)}"
    return _svg(title, parts, names, _TOP + _INNER[1] - 14 * len(names) - 6)


def memory_over_step(programs: Sequence[Timeline]) -> str:
    """Bytes held over the dispatches, by what holds them, and where they are most."""
    found, peak = programs[0], max((part.peak() for part in programs), key=lambda held: held.total)
    begins = [0.0, *itertools.accumulate(part.cost.latency_us for part in programs)]
    unit, label = (1e3, "ms") if begins[-1] >= 1e4 else (1.0, "us")
    begins = [begin / unit for begin in begins]
    across, up = ticks(0, begins[-1]), ticks(0, 1.25 * peak.total / 1e6 or 1)  # room for the legend
    place, parts = _linear(across, up, label, "MB")
    held = [item for part in programs for item in part.memory]
    times = [begins[k] + item.start_us / unit for k, part in enumerate(programs) for item in part.memory] + [
        begins[-1]
    ]
    below = [0.0] * len(held)
    names = []
    for name, colour in zip(HELD, COLOURS, strict=False):
        layer = [getattr(item, name) for item in held]
        above = [a + b / 1e6 for a, b in zip(below, layer, strict=True)]
        edge = [(t, y) for k, y in enumerate(above) for t in (times[k], times[k + 1])]
        base = [(t, y) for k, y in enumerate(below) for t in (times[k], times[k + 1])]
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in [*edge, *reversed(base)])
        parts.append(f'<polygon points="{points}" fill="{colour}" fill-opacity=".8"/>')
        names.append((f"{name}, up to {format_bytes(max(layer))}", colour))
        below = above
    for start, part in zip(begins, programs, strict=False):
        begin, bottom = place(start + part.cost.dispatch_us / unit, 0)
        parts.append(
            f'<path d="M{begin:.1f} {bottom:.1f}V{_TOP}" stroke="currentColor" stroke-dasharray="2 3">'
            "<title>the engine begins</title></path>"
        )
    title = f"{found.title}, {found.path}: memory over a step, at most {format_bytes(peak.total)}"
    return _svg(title + _in_turn(programs), parts, names)


def _in_turn(programs: Sequence[Timeline]) -> str:
    return f", {len(programs)} programs in turn" if len(programs) > 1 else ""


def _logarithmic(
    left: float, right: float, low: float, high: float, x_label: str, y_label: str
) -> tuple[Place, list[str]]:
    """Where a point lies on axes of powers of ten, and the axes."""
    across, up = (math.log10(left), math.log10(right)), (math.log10(low), math.log10(high))

    def place(x: float, y: float) -> tuple[float, float]:
        return _placed(
            (math.log10(x) - across[0]) / (across[1] - across[0]), (math.log10(y) - up[0]) / (up[1] - up[0])
        )

    xs, ys = ([10.0**n for n in range(math.ceil(a), math.floor(b) + 1)] for a, b in (across, up))
    return place, _axes(place, (left, low), xs, ys, x_label, y_label, "1e{:.0f}")


def _linear(
    across: Sequence[float], up: Sequence[float], x_label: str, y_label: str
) -> tuple[Place, list[str]]:
    """Where a point lies on plain axes over these ticks, and the axes."""

    def place(x: float, y: float) -> tuple[float, float]:
        return _placed((x - across[0]) / (across[-1] - across[0]), (y - up[0]) / (up[-1] - up[0]))

    return place, _axes(place, (across[0], up[0]), across, up, x_label, y_label, "")


def _placed(across: float, up: float) -> tuple[float, float]:
    return _LEFT + _INNER[0] * across, _TOP + _INNER[1] * (1 - up)


def _axes(
    place: Place, corner: tuple[float, float], xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str,
    power: str,
) -> list[str]:  # fmt: skip
    def shown(value: float) -> str:
        return power.format(math.log10(value)) if power else f"{value:.6g}"

    middle = _TOP + _INNER[1] / 2
    parts = grid(
        [_LEFT, *(place(x, corner[1])[0] for x in xs), _LEFT + _INNER[0]],
        [_TOP + _INNER[1], *(place(corner[0], y)[1] for y in ys), _TOP],
    )
    parts += [
        _text(_LEFT + _INNER[0] / 2, _TOP + _INNER[1] + 30, x_label, "middle"),
        f'<g transform="translate(13 {middle:.0f}) rotate(-90)">{_text(0, 0, y_label, "middle")}</g>',
    ]
    for y in ys:
        _, level = place(corner[0], y)
        parts.append(_text(_LEFT - 6, level + 4, shown(y), "end"))
    for x in xs:
        left, bottom = place(x, corner[1])
        parts.append(_text(left, bottom + 15, shown(x), "middle"))
    return parts


def _path(points: Sequence[tuple[float, float]], dash: str) -> str:
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{line}" fill="none" stroke="#7f7f7f"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'


def _behind(x: float, y: float, width: float, height: float) -> str:
    """The page's own ground below a legend, so that lines do not run through its words."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="Canvas" fill-opacity=".85"/>'
    )


def _svg(title: str, parts: Sequence[str], names: Sequence[tuple[str, str]], legend_at: int = _TOP) -> str:
    wide = 7 * max((len(name) for name, _ in names), default=0)
    ground = [_behind(_WIDTH - 30 - wide, legend_at, wide + 24, 14 * len(names) + 4)] if names else []
    legend = [
        f'<path d="M{_WIDTH - 22} {legend_at + 8 + 14 * k}h12" stroke="{colour}" stroke-width="5"/>'
        + _text(_WIDTH - 28, legend_at + 12 + 14 * k, name, "end")
        for k, (name, colour) in enumerate(names)
    ]
    return "".join([
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="11">',
        f'<text x="8" y="16" font-size="13" font-weight="600" fill="currentColor">{escape(title)}</text>',
        *parts, *ground, *legend, _text(_WIDTH - 10, _HEIGHT - 6, NOTE, "end"), "</svg>",
    ])  # fmt: skip
