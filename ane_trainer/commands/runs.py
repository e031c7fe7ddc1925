"""`runs list`, `show`, `compare`, `plot`, `rm`: what the run folders hold, read without PyTorch."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.options import Output, Run, table
from ane_trainer.training.folder.records import RUNS, RunRecord, find_records, locked, read_record
from ane_trainer.training.reporting.charts import line_chart
from ane_trainer.utils import atomic_write, did_you_mean, format_seconds

_SORTS: Mapping[str, Callable[[RunRecord], float | str]] = {
    "time": lambda record: record.modified,
    "accuracy": lambda record: -1.0 if record.accuracy is None else record.accuracy,
    "name": lambda record: record.name,
}

#: Results that are compared, each with how it is written.
_RESULTS: Mapping[str, str] = {
    "test_accuracy": ".2%", "test_loss": ".4f", "train_loss": ".4f", "fp32_reference": ".2%", "parameters": ",",
    "steps": ",", "skipped_steps": ",", "seconds_per_step": "s", "seconds_total": "s",
}  # fmt: skip

#: Heights of a curve in one line of text.
_BARS = "▁▂▃▄▅▆▇█"

Runs = Annotated[
    list[str],
    typer.Argument(help="Folders of runs; `last` is the newest.", metavar="RUN...", show_default=False),
]


def runs_list(
    root: Annotated[Path, typer.Option(help="Folder that holds the runs.", metavar="DIR")] = RUNS,
    sort: Annotated[str, typer.Option(help="What comes last.", metavar="time|accuracy|name")] = "time",
) -> Output:
    """List the runs: what was trained, whether it came to its end, and how well."""
    if sort not in _SORTS:
        raise UsageError(
            f"--sort: needs a known order; got {sort!r}. {did_you_mean(sort, _SORTS)}", code="ANE104"
        )
    records = sorted(find_records(root), key=_SORTS[sort])
    if not records:
        return Output({"runs": []}, f"no runs in {root}; train one: ane-trainer train digits")
    head = ("run", "model", "data", "status", "epochs", "accuracy", "loss", "last change")
    rows = [head, *(_row(record) for record in records)]
    lines = table(rows, left=(0, 1, 2, 3, 7))
    if sys.stdout.isatty() and max(map(len, lines)) > shutil.get_terminal_size().columns:
        short = [
            (Path(row[0]).name if root == RUNS else row[0], *row[3:]) for row in rows
        ]  # the name tells the rest
        lines = table(short, left=(0, 1, 5))
    return Output({"runs": [_values(record) for record in records]}, "\n".join(lines))


def runs_show(run: Run) -> Output:
    """Show a run: its options, its epochs and its result."""
    record = read_record(run)
    lines = [f"{record.path}: {record.status}, last change {record.when}"]
    lines += [f"  warning          {text}" for text in record.damage]
    lines += [f"  {name:<17}{value}" for name, value in record.config.items()]
    if record.history:
        lines.append("")
        for name in ("train_loss", "val_loss", "val_accuracy"):
            known = [value for _, value in record.curve(name) if value is not None]
            if known:
                lines.append(f"  {name:<17}{sparkline(known)}  {known[0]:.4g} -> {known[-1]:.4g}")
    found = [(name, _shown(name, (record.result or {}).get(name))) for name in _RESULTS]
    lines += ["", *(f"  {name:<17}{text}" for name, text in found if text)] if record.result else []
    files = [record.path / name for name in ("report.html", "metrics.csv")]
    lines += ["", *(f"  {path.name:<17}{path}" for path in files if path.exists())]
    if record.status == "interrupted":
        lines.append(f"  go on: ane-trainer train --resume {record.path}")
    kept = {"config": dict(record.config), "history": list(record.history), "result": record.result,
            "damage": list(record.damage)}  # fmt: skip
    return Output({**_values(record), **kept}, "\n".join(lines).rstrip())


def runs_compare(runs: Runs) -> Output:
    """Compare runs side by side: the options in which they differ, and their results."""
    records = [read_record(run) for run in runs]
    options = dict.fromkeys(name for record in records for name in record.config)
    differing = {
        name: [record.config.get(name) for record in records] for name in options
        if len({str(record.config.get(name)) for record in records}) > 1
    }  # fmt: skip
    results = {name: [_result(record, name) for record in records] for name in _RESULTS}
    rows = [("", *(record.name for record in records))]
    rows += [
        (name, *("" if value is None else str(value) for value in values))
        for name, values in differing.items()
    ]
    rows += [
        (name, *(_shown(name, value) for value in values)) for name, values in results.items()
        if any(value is not None for value in values)
    ]  # fmt: skip
    values = {"runs": [str(record.path) for record in records], "options": differing, "results": results}
    return Output(values, "\n".join(table(rows, left=(0,))))


def runs_plot(
    runs: Runs,
    what: Annotated[
        str,
        typer.Option(
            help="A number of metrics.jsonl, e.g. train_loss, val_loss, val_accuracy.", metavar="NAME"
        ),
    ] = "val_accuracy",
    out: Annotated[Path, typer.Option(help="The SVG file, for any browser.", metavar="FILE")] = Path(
        "curves.svg"
    ),
) -> Output:
    """Draw a curve of each run into one SVG file."""
    records = [read_record(run) for run in runs]
    known = list(dict.fromkeys(name for record in records for row in record.history for name in row))
    if not known:
        raise UsageError(
            f"runs plot: needs epochs to draw; {', '.join(str(record.path) for record in records)} have none that "
            "can be read. Choose another run.",
            code="ANE104",
        )
    if out.suffix.lower() != ".svg":
        raise UsageError(f"--out: needs a file that ends in .svg; got {out}. Rename it.", code="ANE104")
    chart = line_chart({str(record.path): record.curve(what) for record in records}, what, size=(820, 420))
    if not chart:
        raise UsageError(
            f"--what: needs a number that these runs have; got {what!r}. {did_you_mean(what, known)}",
            code="ANE104",
        )
    atomic_write(out, chart.replace("<svg ", '<svg style="background:#fff;color:#222" ', 1))
    lines = [
        f"{record.name:<32}  {sparkline(values)}" for record in records
        if (values := [value for _, value in record.curve(what) if value is not None])
    ]  # fmt: skip
    return Output({"file": str(out), "what": what}, "\n".join([*lines, f"drawn into {out}"]))


def runs_rm(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Folders of runs.", metavar="RUN...", show_default=False)
    ] = None,
    empty: Annotated[
        bool, typer.Option("--empty", help="All in runs/ in which nothing was trained.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> Output:
    """Delete runs with everything in their folders."""
    records = [read_record(run) for run in runs or ()]
    records += [record for record in find_records() if empty and record.status == "empty"]
    if not records:
        raise UsageError("runs rm: needs runs; got none. Name their folders, or give --empty.", code="ANE104")
    if links := [record.path for record in records if record.path.is_symlink()]:
        raise UsageError(
            f"runs rm: needs the run itself; {links[0]} is a link to {links[0].resolve()}. Name that.",
            code="ANE104",
        )
    if not yes:
        names = "\n".join(f"  {record.path}: {record.status}" for record in records)
        if not sys.stdin.isatty():
            raise UsageError(
                f"runs rm: needs --yes where nobody can be asked; these would go:\n{names}", code="ANE104"
            )
        if not typer.confirm(f"{names}\ndelete?"):
            return Output({"deleted": []}, "nothing was deleted")
    with contextlib.ExitStack() as held:
        for record in records:
            held.enter_context(locked(record.path))
        for record in records:
            shutil.rmtree(record.path)
    paths = [str(record.path) for record in records]
    return Output({"deleted": paths}, "\n".join(f"deleted  {path}" for path in paths))


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """A curve as one line of blocks, thinned to `width`."""
    step = max(len(values) / width, 1.0)
    thinned = [values[int(n * step)] for n in range(int(len(values) / step))]
    low, high = min(thinned), max(thinned)
    return "".join(_BARS[round((value - low) / ((high - low) or 1) * (len(_BARS) - 1))] for value in thinned)


def _row(record: RunRecord) -> tuple[str, ...]:
    accuracy, loss = record.accuracy, _result(record, "test_loss") or record.kept("train_loss")
    model, dataset = (Path(str(record.config.get(name, ""))).name for name in ("model", "dataset"))
    return (
        str(record.path), model, dataset,
        record.status, f"{len(record.history)}/{record.config.get('epochs', '?')}",
        "" if accuracy is None else f"{accuracy:.2%}", "" if loss is None else f"{loss:.4f}", record.when,
    )  # fmt: skip


def _values(record: RunRecord) -> dict[str, object]:
    return {
        "run": str(record.path), "status": record.status, "model": record.config.get("model"),
        "dataset": record.config.get("dataset"), "epochs": len(record.history), "accuracy": record.accuracy,
        "loss": _result(record, "test_loss"), "modified": record.modified,
    }  # fmt: skip


def _result(record: RunRecord, name: str) -> Any:
    return (record.result or {}).get(name)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return format_seconds(value) if _RESULTS[name] == "s" else format(value, _RESULTS[name])
