"""Writes report.html: one file without links to others that shows what a run did, for people with a browser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ane_trainer.__version__ import __version__
from ane_trainer.training.folder.records import RunRecord
from ane_trainer.training.folder.results import interval_text
from ane_trainer.training.reporting.analysis import (
    Analysis,
    ClassAnalysis,
    LabelAnalysis,
    NumberAnalysis,
    Sample,
)
from ane_trainer.training.reporting.charts import line_chart, png
from ane_trainer.utils import format_count, format_seconds

#: Classes up to which the confusion matrix is shown whole; of more, the pairs that are confused most.
MATRIX_CLASSES = 40

#: Between these lie the pictures of a step.
_PICTURES = ("<!-- pictures of a step -->", "<!-- end of the pictures -->")

#: Rows of the table of ops.
OP_ROWS = 25

STYLE = """
:root { color-scheme: light dark; --line: #8884; --card: #8881; --good: #009e73; --bad: #d55e00; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.sub { margin: .2rem 0 1rem; opacity: .75; } p.note { opacity: .75; margin: .3rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.row > .chart { flex: 1 1 460px; max-width: max(460px, calc(50% - .5rem)); }
.tile { background: var(--card); border-radius: 8px; padding: .6rem 1rem; min-width: 7rem; }
.tile b { display: block; font-size: 1.35rem; } .tile span { opacity: .75; font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.wrap { white-space: normal; text-align: left; }
table.matrix td { text-align: center; min-width: 2rem; border: 1px solid var(--line); padding: .15rem .3rem; }
figure { margin: 0; width: 104px; font-size: .75rem; line-height: 1.25; }
figure img { width: 104px; height: 104px; object-fit: contain; image-rendering: pixelated; background: #0003; }
figure .wrong { color: var(--bad); } figure .right { color: var(--good); }
pre { background: var(--card); border-radius: 8px; padding: .8rem; overflow-x: auto; font-size: .82rem; }
footer { margin-top: 3rem; opacity: .6; font-size: .8rem; }
"""


def page(
    record: RunRecord,
    analysis: Analysis | None = None,
    ops: Sequence[Mapping[str, object]] = (),
    about_data: Mapping[str, object] | None = None,
) -> str:
    """The page of a run. `ops` are the costs of the step's ops (`chips.cost.OpCost` as a mapping, `latency_us`).

    Sections without anything to show are left out.
    """
    sections = (
        ("", _tiles(record, analysis)),
        ("Curves", _curves(record)),
        ("Per class", _classes(analysis)),
        ("Confusion matrix", _confusion(analysis)),
        ("Calibration", _calibration(analysis)),
        ("Predicted against true", _numbers(analysis)),
        ("Worst samples", _samples(analysis, "worst", "The held-out examples with the largest loss.")),
        ("Random samples", _samples(analysis, "random", "Held-out examples drawn with a fixed seed.")),
        ("Health and agreement", _health(record)),
        ("Most expensive ops of a step", _ops(ops)),
        ("", f"{_PICTURES[0]}{_PICTURES[1]}"),
        ("Cost", _cost(record)),
        ("Data", _mapping(about_data or {})),
        ("Environment", _environment(record)),
        ("Options", _mapping(record.config)),
    )
    body = "".join(
        (f"<h2>{escape(title)}</h2>\n" if title else "") + text + "\n" for title, text in sections if text
    )
    model, data = (Path(str(record.config.get(name))).name for name in ("model", "dataset"))
    title, where = f"{model} on {data}", _where(record)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(record.name)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head><body>\n'
        f"<h1>{escape(title)}</h1>\n<p class='sub'>{escape(record.name)}, {record.status}, {record.when}; "
        f"ran on {escape(where)}</p>\n{body}<footer>ane_trainer {__version__}</footer></body></html>\n"
    )


def _where(record: RunRecord) -> str:
    placement = (record.result or {}).get("placement") or {}
    return str(placement.get("where") or record.config.get("device", "an unknown device"))


def _tiles(record: RunRecord, analysis: Analysis | None) -> str:
    result = record.result or {}
    tested = result.get("test_loss") is not None
    shown: list[tuple[str, str | None]] = [
        ("test accuracy", _percent(result.get("test_accuracy"))),
        ("test loss", _number(result.get("test_loss"))),
        ("validation accuracy", None if tested else _percent(record.kept("val_accuracy"))),
        ("validation loss", None if tested else _number(record.kept("val_loss"))),
        ("train loss", _number(record.kept("train_loss") or result.get("train_loss"))),
        ("PyTorch fp32, same seed", _percent(result.get("fp32_reference"))),
    ]
    if isinstance(analysis, (ClassAnalysis, LabelAnalysis)):
        shown += [("F1, mean of classes", f"{analysis.macro_f1:.3f}")]
    if isinstance(analysis, ClassAnalysis):
        shown += [("accuracy, mean of classes", _percent(analysis.balanced_accuracy))]
        shown += [("among the first 5", _percent(analysis.top5_accuracy))]
    if isinstance(analysis, NumberAnalysis) and len(analysis.numbers) == 1:
        shown += [("mean error", _number(analysis.numbers[0].mae)), ("R2", _number(analysis.numbers[0].r2))]
    shown += [
        ("parameters", format_count(result["parameters"]) if result.get("parameters") else None),
        ("epochs", str(len(record.history)) if record.history else None),
        (
            "time, from data on",
            format_seconds(result["seconds_total"]) if result.get("seconds_total") else None,
        ),
        ("energy", f"{result['energy_joules']:.2f} J" if result.get("energy_joules") else None),
    ]
    tiles = [
        f"<div class='tile'><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in shown if value is not None
    ]  # fmt: skip
    return f"<div class='row'>{''.join(tiles)}</div>"


def _curves(record: RunRecord) -> str:
    charts = [
        line_chart({"training": record.curve("train_loss"), "validation": record.curve("val_loss")}, "Loss"),
        line_chart({"accuracy": record.curve("val_accuracy")}, "Accuracy on validation data", most=1.0),
    ]
    for name, title in (
        ("loss_scale", "Loss scale"),
        ("skipped_steps", "Skipped steps (overflowing gradients)"),
    ):
        if len({value for _, value in record.curve(name)}) > 1:
            charts.append(line_chart({name: record.curve(name)}, title))
    known = {"epoch", "steps", "train_loss", "val_loss", "val_accuracy", "loss_scale", "skipped_steps"}
    others = {
        name: None for row in record.history for name, value in row.items()
        if name not in known and isinstance(value, (int, float)) and not isinstance(value, bool)
    }  # fmt: skip
    charts += [line_chart({name: record.curve(name)}, name.replace("_", " ").capitalize()) for name in others]
    return f"<div class='row'>{''.join(charts)}</div>" if any(charts) else ""


def _classes(analysis: Analysis | None) -> str:
    if not isinstance(analysis, (ClassAnalysis, LabelAnalysis)):
        return ""
    rows = [
        (row.name, f"{row.examples:,}", f"{row.precision:.3f}", f"{row.recall:.3f}", f"{row.f1:.3f}")
        for row in analysis.classes
    ]
    note = "precision: share of its predictions that are right; recall: share of its examples that are found."
    return _table(("class", "examples", "precision", "recall", "F1"), rows) + f"<p class='note'>{note}</p>"


def _confusion(analysis: Analysis | None) -> str:
    if not isinstance(analysis, ClassAnalysis):
        return ""
    matrix, names = analysis.confusion_TP, [row.name for row in analysis.classes]
    if len(names) > MATRIX_CLASSES:
        pairs = sorted(
            (
                (int(matrix[t, p]), names[t], names[p])
                for t in range(len(names))
                for p in range(len(names))
                if t != p
            ),
            reverse=True,
        )[:25]
        return _table(("true class", "taken for", "examples"), [(t, p, f"{n:,}") for n, t, p in pairs if n])
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for t, name in enumerate(names):
        whole = max(int(matrix[t].sum()), 1)
        cells = "".join(_cell(t == p, name, names[p], n, whole) for p, n in enumerate(map(int, matrix[t])))
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    note = "Rows: the true class; columns: what the model says. Mistakes are coloured four times as strongly."
    return (
        f"<div class='scroll'><table class='matrix'><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
        f"<p class='note'>{note}</p>"
    )


def _cell(right: bool, true: str, said: str, count: int, whole: int) -> str:
    """One cell of the matrix, the stronger coloured the larger its share of the row."""
    colour, share = ("0 158 115", count / whole) if right else ("213 94 0", min(4 * count / whole, 1.0))
    title = escape(f"{true} taken for {said}: {count} of {whole}")
    return f"<td style='background:rgb({colour} / {share:.2f})' title='{title}'>{count or ''}</td>"


def _calibration(analysis: Analysis | None) -> str:
    if not isinstance(analysis, ClassAnalysis) or not analysis.calibration:
        return ""
    points = [(found.confidence, found.accuracy) for found in analysis.calibration]
    chart = line_chart(
        {"right": points}, "Share that is right, by confidence", x_label="confidence", diagonal=True
    )
    rows = [(f"{b.confidence:.2f}", f"{b.accuracy:.2f}", f"{b.count:,}") for b in analysis.calibration]
    table = _table(("confidence", "right", "examples"), rows)
    error = f"Expected calibration error {analysis.calibration_error:.3f}. Below the dashed line the model is too sure."
    return f"<div class='row'>{chart}{table}</div><p class='note'>{error}</p>"


def _numbers(analysis: Analysis | None) -> str:
    if not isinstance(analysis, NumberAnalysis):
        return ""
    rows = [(row.name, f"{row.mae:.5g}", f"{row.rmse:.5g}", f"{row.r2:.4f}") for row in analysis.numbers]
    table = _table(("predicted", "mean error", "RMS error", "R2"), rows)
    charts = [
        _scatter(analysis.pairs_NK2[:, k].tolist(), row.name) for k, row in enumerate(analysis.numbers[:4])
    ]
    return table + f"<div class='row'>{''.join(charts)}</div>"


def _scatter(pairs: Sequence[Sequence[float]], name: str) -> str:
    """Predictions over truths as dots: a line chart's axes, its line taken out."""
    ordered = sorted((truth, said) for truth, said in pairs)
    chart = line_chart({name: ordered}, f"{name}: predicted over true", x_label="true", identity=True)
    start = chart.find("<polyline")
    whole = chart[:start] + chart[chart.find("/>", start) + 2 :] if start >= 0 else chart
    return whole.replace('r="4" fill-opacity="0"', 'r="2" fill-opacity=".5"')


def _samples(analysis: Analysis | None, kind: str, note: str) -> str:
    if not isinstance(analysis, ClassAnalysis):
        return ""
    samples: tuple[Sample, ...] = getattr(analysis, kind)
    if all(_is_image(sample) for sample in samples):
        figures = "".join(
            f"<figure><img src='{png(sample.x)}' alt='example {sample.index}'>"
            f"<span class='{'right' if sample.predicted == sample.truth else 'wrong'}'>{escape(sample.predicted)} "
            f"{sample.probability:.0%}</span><br>true: {escape(sample.truth)}<br>loss {sample.loss:.2g}<br>"
            f"no. {sample.index}</figure>"
            for sample in samples
        )
        return f"<p class='note'>{note}</p><div class='row'>{figures}</div>"
    rows = [
        (str(s.index), s.truth, s.predicted, f"{s.probability:.1%}", f"{s.loss:.3g}",
         ", ".join(f"{value:.3g}" for value in s.x.reshape(-1)[:8]) + (", ..." if s.x.size > 8 else ""))
        for s in samples
    ]  # fmt: skip
    return f"<p class='note'>{note}</p>" + _table(
        ("no.", "true", "predicted", "probability", "loss", "input"), rows
    )


def _is_image(sample: Sample) -> bool:
    return sample.x.ndim == 3 and sample.x.shape[0] in (1, 3)


def _health(record: RunRecord) -> str:
    """What the run says of its own numbers: values that left their band, agreement with fp32; where it says it."""
    result = record.result or {}
    parts = [
        f"<h3>{title}</h3>{_any({word.replace('_', ' '): v for word, v in result[name].items() if v is not None})}"
        for name, title in (("health", "Health"), ("agreement", "Agreement with fp32: relative differences"))
        if result.get(name)
    ]
    if result.get("health") == {}:
        parts.insert(0, "<p>No update had gradients out of the engine's range.</p>")
    return "".join(parts)


def _any(value: object) -> str:
    """A value of unknown form: a list of mappings as a table, a mapping as pairs, else its text."""
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(row, Mapping) for row in value):
        names = list(dict.fromkeys(name for row in value for name in row))
        return _table(names, [[_plain(row.get(name)) for name in names] for row in value])
    return f"<p>{escape(_plain(value))}</p>"


def _ops(ops: Sequence[Mapping[str, Any]]) -> str:
    if not ops:
        return ""
    whole = sum(op["latency_us"] for op in ops) or 1.0
    most_expensive = sorted(ops, key=lambda op: -op["latency_us"])[:OP_ROWS]
    rows = [
        (op["op"], op.get("source") or op["name"], f"{op['latency_us']:.2f}", f"{op['latency_us'] / whole:.1%}",
         format_count(op["flops"]), f"{op['bytes']:,}", op["bound_by"])
        for op in most_expensive
    ]  # fmt: skip
    head = ("op", "where", "us", "share", "FLOPs", "bytes", "bound by")
    note = f"{len(ops)} ops in all. Times on the engine by the cost model; not measured."
    return _table(head, rows) + f"<p class='note'>{note}</p>"


def with_pictures(text: str, images: Sequence[str]) -> str:
    """The page with these images of a step instead of those that it has; a page without a place for them as it is."""
    before, begin, rest = text.partition(_PICTURES[0])
    _, end, after = rest.partition(_PICTURES[1])
    if not begin or not end:
        return text
    shown = f"<h2>A step on the engine</h2>\n<div class='row'>{''.join(images)}</div>" if images else ""
    return f"{before}{begin}{shown}{end}{after}"


def _cost(record: RunRecord) -> str:
    result = record.result or {}
    estimate = result.get("estimate") or {}
    latency, joules = estimate.get("latency_us"), estimate.get("energy_uj")
    shown = {
        "a step on the engine, estimated": None
        if latency is None
        else f"{latency:,.0f} us ({interval_text(estimate)})",
        "energy of a step, estimated": f"{joules:,.0f} uJ" if joules is not None else None,
        "chip": estimate.get("title"),
        "a step here": format_seconds(result["seconds_per_step"]) if result.get("seconds_per_step") else None,
        "compiling": format_seconds(result["seconds_compile"]) if result.get("seconds_compile") else None,
        "programs a step": result.get("dispatches_per_step"),
        "share of FLOPs in the program": _percent(result.get("engine_flop_fraction")),
        "bytes from and to the host a step": result.get("host_bytes_per_step"),
        "rates": estimate.get("provenance"),
    }
    return _mapping({name: value for name, value in shown.items() if value is not None})


def _environment(record: RunRecord) -> str:
    result = record.result or {}
    names = ("device", "chip", "fidelity", "version", "torch", "platform")
    shown = {name: result[name] for name in names if result.get(name) is not None}
    placement = result.get("placement") or {}
    return _mapping({**shown, **({"known by": placement["how"]} if placement.get("how") else {})})


def _mapping(values: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td class='wrap'>{escape(_plain(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>" if rows else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{top}</tr>{body}</table></div>"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(item)}" for name, item in value.items())
    return "" if value is None else str(value)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
