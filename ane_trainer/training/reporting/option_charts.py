"""Dots of an outcome over an option, a number or a word, for the page of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ane_trainer.training.reporting.charts import COLOURS, grid, ticks

_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 28, 36

#: (value of the option, outcome, what a tooltip says).
Dots = Sequence[tuple[float | str, float, str]]


def dot_chart(dots: Dots, title: str, x_label: str, *, logarithmic: bool = False) -> str:
    """An SVG of one dot a trial; "" without any, or where all have one value. Words stand side by side."""
    values = list(dict.fromkeys(value for value, _, _ in dots))
    if len(values) < 2:
        return ""
    words = not all(isinstance(value, (int, float)) for value in values)
    shares, marks = _categories(sorted(map(str, values))) if words else _numbers(values, logarithmic)
    y_ticks = ticks(min(y for _, y, _ in dots), max(y for _, y, _ in dots))
    inner = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)

    def down(y: float) -> float:
        return _TOP + inner[1] * (1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="11">',
        f'<text x="{_LEFT}" y="16" font-size="13" font-weight="600" fill="currentColor">{escape(title)}</text>',
    ]
    parts += grid(
        [_LEFT, *(_LEFT + inner[0] * share for share, _ in marks), _LEFT + inner[0]], [*map(down, y_ticks)]
    )
    for y in y_ticks:
        parts.append(_text(_LEFT - 6, down(y) + 4, f"{y:.6g}", "end"))
    parts += [
        _text(_LEFT + inner[0] * share, _TOP + inner[1] + 15, label, "middle") for share, label in marks
    ]
    parts.append(_text(_LEFT + inner[0] / 2, _HEIGHT - 4, x_label, "middle"))
    for value, y, label in dots:
        across = _LEFT + inner[0] * shares[str(value)]
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down(y):.1f}" r="4" fill="{COLOURS[0]}" fill-opacity=".7">'
            f"<title>{escape(label)}</title></circle>"
        )
    return "".join([*parts, "</svg>"])


Axis = tuple[dict[str, float], list[tuple[float, str]]]


def _categories(names: Sequence[str]) -> Axis:
    """Where each word stands, as a share of the width, and the labels."""
    places = {name: (number + 0.5) / len(names) for number, name in enumerate(names)}
    return places, [(share, name) for name, share in places.items()]


def _numbers(values: Sequence[float | str], logarithmic: bool) -> Axis:
    """Where each number stands, and the axis' labels; logarithmic ones at powers of ten."""
    scaled = {str(value): math.log10(float(value)) if logarithmic else float(value) for value in values}
    marks = ticks(min(scaled.values()), max(scaled.values()), least=1.0 if logarithmic else 0.0)
    low, high = marks[0], marks[-1]
    labels = [
        ((mark - low) / (high - low), f"1e{mark:.0f}" if logarithmic else f"{mark:.6g}") for mark in marks
    ]
    return {value: (place - low) / (high - low) for value, place in scaled.items()}, labels


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'
