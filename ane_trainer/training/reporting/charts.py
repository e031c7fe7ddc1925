"""Draws line charts as SVG text and images as PNG data, without another package, for report.html and `runs plot`."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

#: Colours of lines that stay apart for colour-blind eyes (Okabe and Ito), in the order of use.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 36
#: How strong lines of the grid and the two axes are.
GRID, AXIS = ".22", ".7"

Points = Sequence[tuple[float, float | None]]


def line_chart(
    series: Mapping[str, Points], title: str, *, x_label: str = "epoch", size: tuple[int, int] = (520, 260),
    diagonal: bool = False, identity: bool = False, most: float | None = None,
) -> str:  # fmt: skip
    """An SVG of one line a series, with axes, ticks, a legend, and each value as a tooltip.

    Values that are None or not finite leave a gap. `diagonal` draws y = x, dashed, over a square of 0 to 1,
    `identity` where it lies within the axes.
    `most` is the largest value that there can be, such as 1 for a share.
    """
    width, height = size
    known = {
        name: [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        for name, points in series.items()
    }
    flat = [point for points in known.values() for point in points]
    if diagonal:
        flat += [(0.0, 0.0), (1.0, 1.0)]
    if not flat:
        return ""
    whole = all(float(x).is_integer() for x, _ in flat) and not diagonal
    x_ticks = ticks(*_range(x for x, _ in flat), least=1.0 if whole else 0.0)
    y_ticks = ticks(*_range((y for _, y in flat), most))
    inner = (width - _LEFT - _RIGHT, height - _TOP - _BOTTOM)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + inner[0] * across, _TOP + inner[1] * (1 - up)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="11">',
        f'<text x="{_LEFT}" y="16" font-size="13" font-weight="600" fill="currentColor">{escape(title)}</text>',
    ]
    parts += grid([place(x, 0)[0] for x in x_ticks], [place(0, y)[1] for y in y_ticks])
    for y in y_ticks:
        left, level = place(x_ticks[0], y)
        parts.append(_text(left - 6, level + 4, _short(y), "end"))
    for x in x_ticks:
        across, bottom = place(x, y_ticks[0])
        parts.append(_text(across, bottom + 15, _short(x), "middle"))
    parts.append(_text(_LEFT + inner[0] / 2, height - 4, x_label, "middle"))
    if diagonal or identity:
        low, high = max(x_ticks[0], y_ticks[0]), min(x_ticks[-1], y_ticks[-1])
        (a, b), (c, d) = place(low, low), place(max(low, high), max(low, high))
        parts.append(
            f'<path d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" stroke="currentColor" stroke-dasharray="4 3"/>'
        )
    for number, (name, points) in enumerate(known.items()):
        parts += _line(
            name, points, [place(x, y) for x, y in points], COLOURS[number % len(COLOURS)], len(known) > 1
        )
        parts += _legend(name, number, width) if len(known) > 1 else []
    return "".join([*parts, "</svg>"])


def grid(across: Sequence[float], down: Sequence[float]) -> list[str]:
    """Lines at these places, left to right and bottom to top; the first of each is an axis and stronger."""
    left, right, bottom, top = min(across), max(across), max(down), min(down)
    lines = [f"M{left:.1f} {y:.1f}H{right:.1f}" for y in down] + [
        f"M{x:.1f} {bottom:.1f}V{top:.1f}" for x in across
    ]
    axes = f"M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"
    return [
        f'<path d="{"".join(lines)}" fill="none" stroke="currentColor" stroke-opacity="{GRID}"/>',
        f'<path d="{axes}" fill="none" stroke="currentColor" stroke-opacity="{AXIS}"/>',
    ]


def _line(
    name: str, points: Points, placed: Sequence[tuple[float, float]], colour: str, named: bool
) -> list[str]:
    """A polyline; its values as tooltips of dots, which are invisible where they would run together."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = 'r="2.5"' if len(points) <= 40 else 'r="4" fill-opacity="0"'
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    for (x, y), (across, down) in zip(points, placed, strict=True):
        label = f"{name + ' ' if named else ''}{_short(x)}: {y:.5g}"
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" {dots} fill="{colour}"><title>{escape(label)}</title></circle>'
        )
    return parts


def _legend(name: str, number: int, width: int) -> list[str]:
    down = _TOP + 12 + 15 * number
    rule = (
        f'<path d="M{width - 20} {down - 4}h12" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="3"/>'
    )
    return [rule, _text(width - 26, down, name, "end")]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'


def _range(values: Iterable[float], most: float | None = None) -> tuple[float, float]:
    """The least and the largest value; equal ones below `most` are given room downwards."""
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if most is None or low < high else (min(low, most) - 0.1, most)


def ticks(low: float, high: float, about: int = 5, least: float = 0.0) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about so many, at least `least` apart."""
    same = high - low <= 1e-9 * max(abs(low), abs(high))
    if same and least > 1e-9 * abs(low):
        low, high = low - least, high + least
    elif same:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = max((high - low) / about, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value:.6g}"


def png(image_CHW: NDArray[np.floating]) -> str:
    """A `data:` address of an image of 1 or 3 channels, its own least value black and its greatest white."""
    low, high = float(image_CHW.min()), float(image_CHW.max())
    scaled = (image_CHW - low) / (high - low if high > low else 1.0) * 255
    pixels_HWC = np.ascontiguousarray(scaled.round().astype(np.uint8).transpose(1, 2, 0))
    height, width, channels = pixels_HWC.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels_HWC)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(whole).decode()
