"""Pictures of a modelled step, through matplotlib where it is installed: a roofline with the program's ops, and memory.

They lie beside a trace (`ane-trainer trace`) as PNG and SVG; report.html has its own (`step_charts`).
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ane_trainer.ane.chips.cost import rates
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.chips.timeline import HELD, Timeline
from ane_trainer.training.reporting.charts import COLOURS
from ane_trainer.utils import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What brings matplotlib.
INSTALL = 'pip install "ane_trainer[plot]"'
#: What bounds an op -> its colour; `host` is a whole program that leaves the engine.
BOUNDS = dict(zip(("mac", "elementwise", "weights", "activations", "host"), COLOURS, strict=False))
#: Streams that are drawn as roofs -> their names.
ROOFS = {"pass": "elementwise passes", "weight": "constants", "read": "in", "write": "out"}
#: Dots from which an SVG holds them as an image.
_MANY = 3_000
#: Said below both.
NOTE = "modelled by the cost model, not measured"


def missing() -> bool:
    """Whether there is no matplotlib."""
    return find_spec("matplotlib") is None


def roofline(found: Timeline) -> Figure:
    """FLOP/s over FLOPs a byte of each op, under the roofs of the array and of each stream, with the whole step.

    Bytes are operands, results and constants, once each. Ops without arithmetic or without time are not drawn.
    """
    chip = get_chip(found.chip)
    values = {name: rate.value for name, rate in rates(found.chip, found.path).items()}
    figure, axes = _figure(f"{found.title}, {found.path}: roofline with the ops of a step")
    ops = [op for op in found.cost.ops if op.flops and op.bytes and op.latency_us > 0]
    longest = max((op.latency_us for op in ops), default=1.0)
    for bound, colour in BOUNDS.items():
        of = [op for op in ops if op.bound_by == bound]
        if of:
            axes.scatter(
                [op.flops / op.bytes for op in of], [op.flops / op.latency_us * 1e6 for op in of],
                [12 + 140 * op.latency_us / longest for op in of], color=colour, alpha=0.6, linewidths=0,
                label=f"{bound}: {len(of)} ops, {sum(op.latency_us for op in of):,.0f} us", zorder=3,
                rasterized=len(ops) > _MANY,
            )  # fmt: skip
    whole = sum(op.bytes for op in found.cost.ops)
    if found.cost.flops and whole:
        axes.scatter([found.cost.flops / whole], [found.cost.flops / found.cost.latency_us * 1e6], 130, marker="*",
                     color="black", label="the whole dispatch", zorder=4)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s")
    _roofs(axes, chip.peak_fp16_flops, values)
    dots = axes.get_legend_handles_labels()
    own = [(handle, label) for handle, label in zip(*dots, strict=True) if "/s" not in label]
    axes.legend(*zip(*own, strict=True), loc="lower right", fontsize=8) if own else None
    return figure


def _roofs(axes: Axes, peak: float, values: dict[str, float]) -> None:
    """The array's peak, and under what it reaches a slope for each stream, over the range of the dots."""
    from matplotlib.legend import Legend

    (low, high), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    reached = peak * values["mac"]
    low, high = low / 2, max(high, 4 * reached / (values["pass"] * 1e9))
    lines = [axes.axhline(peak, color="black", lw=1, ls=":", label=f"peak {peak / 1e12:.3g} TFLOP/s")]
    for (name, label), style in zip(ROOFS.items(), ("-", "--", "-.", (0, (1, 1))), strict=True):
        slope = values[name] * 1e9
        ridge = min(reached / slope, high)
        lines += axes.plot(
            [low, ridge, high], [low * slope, ridge * slope, min(reached, high * slope)], color="dimgrey", lw=1,
            ls=style, label=f"{label} {values[name]:.3g} GB/s",
        )  # fmt: skip
    axes.set(xlim=(low, high), ylim=(min(bottom, low * values["write"] * 1e9), 4 * peak))
    axes.add_artist(Legend(axes, lines, [str(x.get_label()) for x in lines], loc="upper left", fontsize=8))


def memory_over_time(found: Timeline) -> Figure:
    """Bytes held over the dispatch, by what holds them, and where they are most."""
    figure, axes = _figure(f"{found.title}, {found.path}: memory over a step")
    times = [item.start_us for item in found.memory] + [found.cost.latency_us]
    layers = [[getattr(item, name) / 1e6 for item in found.memory] for name in HELD]
    stacked = [[*layer, layer[-1]] for layer in layers]
    labels = [f"{name}, up to {format_bytes(max(getattr(m, name) for m in found.memory))}" for name in HELD]
    axes.stackplot(times, *stacked, labels=labels, colors=COLOURS[: len(HELD)], step="post", alpha=0.8, lw=0)
    peak = found.peak()
    axes.annotate(
        f"most: {format_bytes(peak.total)}", (peak.start_us, peak.total / 1e6), (0, 12), textcoords="offset points",
        ha="center", fontsize=8, arrowprops={"arrowstyle": "-", "lw": 0.6},
    )  # fmt: skip
    axes.axvline(found.cost.dispatch_us, color="black", lw=0.8, ls=":")
    axes.text(found.cost.dispatch_us, 0, " the engine begins", fontsize=7, va="bottom", rotation=90)
    axes.set(
        xlabel="us", ylabel="MB", xlim=(0, found.cost.latency_us), ylim=(0, peak.total / 1e6 * 1.25 or 1)
    )
    axes.legend(loc="upper left", fontsize=8, framealpha=0.9)
    return figure


def _figure(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25, lw=0.5)
    figure.text(0.995, 0.005, NOTE, ha="right", va="bottom", fontsize=7, color="dimgrey")
    return figure, axes


def drawn(figure: Figure, kind: str) -> bytes:
    """The picture as a file of `kind`, png or svg; the same figure gives the same bytes."""
    import matplotlib

    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ane_trainer"}):
        figure.savefig(file, format=kind, dpi=130, metadata=metadata)
    return file.getvalue()
