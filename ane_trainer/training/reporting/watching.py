"""What lies beside a run for those who watch it: metrics.csv, trackers, report.html and analysis.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ane_trainer.ane.chips.timeline import timeline
from ane_trainer.ane.dispatch import TrainingStep
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.folder.records import as_csv, read_history, read_record, unwritable
from ane_trainer.training.folder.results import Epoch
from ane_trainer.training.reporting.analysis import Analysis, Seen
from ane_trainer.training.reporting.loggers import make_loggers
from ane_trainer.training.reporting.page import page, with_pictures
from ane_trainer.training.reporting.report import Reporter, Reporters
from ane_trainer.training.reporting.step_charts import step_charts
from ane_trainer.training.steps import Step
from ane_trainer.utils import atomic_write, atomic_write_json, finite

Batch = tuple[Any, object]

#: Examples that are looked at closely at the end; that takes as long as an epoch's evaluation on them.
EXAMPLES = 10_000


class CsvReporter(Reporter):
    """Writes metrics.csv in a run's folder anew after each epoch: what metrics.jsonl has, and the epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def end_epoch(self, record: Epoch) -> None:
        before = [row for row in read_history(self.folder)[0] if row["epoch"] < record.epoch]
        path = self.folder / "metrics.csv"
        try:
            atomic_write(path, as_csv([*before, finite(record.to_json())]))
        except OSError as error:
            raise unwritable(path, error) from None


def watchers(
    console: Reporter, folder: Path, trackers: Iterable[str], config: Mapping[str, object]
) -> Reporter:
    """The console's reporter with metrics.csv and the trackers beside it; errors as `make_logger`."""
    return Reporters(console, CsvReporter(folder), *make_loggers(trackers, folder, config))


def write_report(
    folder: Path,
    predict: Callable[[torch.Tensor], torch.Tensor] | None = None,
    data: Iterable[Batch] = (),
    step: Step | None = None,
) -> Path:
    """Write report.html, and analysis.json with the scores that it shows, from what the run's folder holds.

    predict  the trained model; with `data`, held out and not shuffled, it is looked at closely.
    step     the training step, whose ops are shown with their cost.

    Raises: CheckpointError if there is no run.
    """
    about: DataDescription | None = getattr(data, "description", None)
    seen = Seen()
    if predict is not None:
        for x, y in _first(data, EXAMPLES):
            if not seen.add(x, predict(x), y):
                break
    analysis = _analysis(seen, about)
    if analysis is not None:
        atomic_write_json(folder / "analysis.json", finite(analysis.to_json()))
    cost = step.cost() if step is not None else None
    ops = [{**asdict(op), "latency_us": op.latency_us} for op in cost.ops] if cost is not None else []
    told = {"data": about.summary(), "notes": "; ".join(about.notes)} if about is not None else {}
    text = page(read_record(folder), analysis, ops, {name: value for name, value in told.items() if value})
    return atomic_write(folder / "report.html", with_pictures(text, _pictures(step)))


def _pictures(step: Step | None) -> list[str]:
    """Roofline and memory of each program of the step; none without programs."""
    if not isinstance(step, TrainingStep):
        return []
    return step_charts([timeline(part.program, part.chip, step.target.path) for part in step.programs])


def _analysis(seen: Seen, about: DataDescription | None) -> Analysis | None:
    if about is None:
        return seen.analysis()
    if about.task == "multilabel":
        return seen.label_analysis(about.class_names)
    return seen.analysis(about.class_names, scale=(about.target_mean or (0.0,), about.target_std or (1.0,)))


def _first(data: Iterable[Batch], examples: int) -> Iterator[Batch]:
    """Batches of tensors with so many examples in all, the last one cut."""
    left = examples
    for x, y in data:
        if left <= 0 or not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
            return
        yield x[:left], y[:left]
        left -= len(x)
