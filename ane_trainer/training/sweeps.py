"""Sweeps: many trainings with options that Optuna chooses, counted in its storage so that none is lost or repeated.

    sweep.toml:   trials = 8                 how many trainings
                  metric = "val_accuracy"    of the last epoch (best = true: of the best); losses are minimised
                  [train]                    options of `train` that all have
                  dataset = "digits"
                  [search]                   options that differ, and among what
                  lr = { low = 1e-4, high = 1e-1, log = true }
                  hidden = { choices = ["32", "64,32"] }

A trial is Optuna's; its training is the run folder `trial-<number>` beside the storage. A trial that was under way when
the sweep ended keeps its options and goes on from its last checkpoint.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ane_trainer.ane.errors import MissingDependency, UsageError
from ane_trainer.training.config import TrainConfig, make_config, read_config_file
from ane_trainer.training.folder.records import RunRecord, read_record
from ane_trainer.training.reporting.charts import line_chart
from ane_trainer.training.reporting.option_charts import dot_chart
from ane_trainer.utils import atomic_write, did_you_mean

if TYPE_CHECKING:
    import optuna

#: Where the sweep's own files are in its folder.
STORAGE, TABLE, PAGE = "study.db", "sweep.csv", "sweep.html"
#: Names of what can be sought, each with whether more is better.
METRICS = {"val_accuracy": True, "val_loss": False, "train_loss": False}

Value = str | int | float | bool


class Choice(BaseModel):
    """What an option may be: one of `choices`, or a number from `low` to `high` (whole ones if both are)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: tuple[Value, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = None

    def suggest(self, trial: optuna.Trial, name: str) -> Value:
        """The trial's value."""
        if self.choices:
            return cast(Value, trial.suggest_categorical(name, list(self.choices)))
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return int(trial.suggest_int(name, self.low, self.high, log=self.log, step=int(self.step or 1)))
        return float(trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step))


class SweepConfig(BaseModel):
    """What `ane-trainer sweep` reads from its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(20, ge=1)
    jobs: int | None = Field(None, ge=1)
    metric: Literal["val_accuracy", "val_loss", "train_loss"] = "val_accuracy"
    best: bool = False
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    seed: int = Field(0, ge=0)
    storage: str | None = None
    train: Mapping[str, object]
    search: Mapping[str, Choice]

    def options(self, chosen: Mapping[str, Value]) -> dict[str, object]:
        """The options of a trial's training."""
        return {**self.train, **chosen}

    @property
    def maximises(self) -> bool:
        """Whether more is better."""
        return METRICS[self.metric]


def read_sweep(path: str | Path) -> SweepConfig:
    """The sweep of a TOML file. UsageError for what is not known, out of range, or no option of `train`."""
    try:
        sweep = SweepConfig(**read_config_file(path))
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
        raise UsageError(f"{path}: {'; '.join(found)}. See docs/scale.md.", code="ANE104") from None
    if not sweep.search:
        raise UsageError(f"{path}: needs options under [search]; got none. Name what differs.", code="ANE104")
    for name, choice in sweep.search.items():
        if name not in TrainConfig.model_fields:
            hint = did_you_mean(name, TrainConfig.model_fields)
            raise UsageError(f"{path}: search.{name} is no option of train. {hint}", code="ANE104")
        if not choice.choices and (choice.low is None or choice.high is None or choice.low >= choice.high):
            raise UsageError(
                f"{path}: search.{name} needs choices, or low below high; got neither. Correct it.",
                code="ANE104",
            )
    make_config(sweep.options({n: _first(c) for n, c in sweep.search.items()}), where=str(path))
    return sweep


def _first(choice: Choice) -> Value:
    if choice.choices:
        return choice.choices[0]
    return 0 if choice.low is None else choice.low


@dataclass(frozen=True)
class Study:
    """A sweep's trials in Optuna's storage, and their run folders."""

    sweep: SweepConfig
    folder: Path
    study: optuna.Study

    def next(self) -> optuna.Trial | None:
        """A new trial with its options chosen; None if all that were asked for are there."""
        if len(self.study.get_trials(deepcopy=False)) >= self.sweep.trials:
            return None
        trial = self.study.ask()
        if trial.number >= self.sweep.trials:  # another host took the last one meanwhile
            self.fail(trial.number, "not needed")
            return None
        trial.set_user_attr("host", platform.node())
        for name, choice in self.sweep.search.items():
            choice.suggest(trial, name)
        return trial

    def under_way(self) -> list[optuna.trial.FrozenTrial]:
        """Trials that this host has begun and not finished, with all their options."""
        import optuna

        running = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        own = [t for t in running if t.user_attrs.get("host") in (None, platform.node())]
        for trial in own:
            if trial.params.keys() != self.sweep.search.keys():  # ended while its options were being chosen
                self.fail(trial.number, "begun without its options")
                self.study.enqueue_trial({})
        return [t for t in own if t.params.keys() == self.sweep.search.keys()]

    def run_of(self, number: int) -> Path:
        """A trial's run folder."""
        return self.folder / f"trial-{number:04d}"

    def tell(self, number: int) -> float | None:
        """Note a trial's outcome from its run; None, and a failed trial, if the run has no such number."""
        value = outcome(read_record(self.run_of(number)), self.sweep)
        if value is None:
            self.fail(number, f"the run has no {self.sweep.metric}")
            return None
        self.study.tell(number, value)
        return value

    def fail(self, number: int, reason: str) -> None:
        """Note that a trial came to nothing."""
        import optuna

        self.study.set_user_attr(f"failure/{number}", reason)
        self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def rows(self) -> list[dict[str, object]]:
        """A record for each trial, the best first."""
        found: list[dict[str, object]] = []
        failures = self.study.user_attrs
        for trial in self.study.get_trials(deepcopy=False):
            status = {"COMPLETE": "finished", "RUNNING": "under way", "FAIL": "failed"}.get(
                trial.state.name, "waiting"
            )
            row: dict[str, object] = {"trial": trial.number, "status": status, self.sweep.metric: trial.value}
            row |= {name: trial.params.get(name) for name in self.sweep.search}
            found.append(
                {
                    **row,
                    "run": str(self.run_of(trial.number)),
                    "failure": failures.get(f"failure/{trial.number}", ""),
                }
            )
        sign = -1.0 if self.sweep.maximises else 1.0
        metric = self.sweep.metric

        def rank(row: Mapping[str, object]) -> tuple[bool, float]:
            value = row[metric]
            return (True, 0.0) if value is None else (False, sign * float(str(value)))

        return sorted(found, key=rank)


def outcome(record: RunRecord, sweep: SweepConfig) -> float | None:
    """The number that a run is judged by."""
    known = [v for _, v in record.curve(sweep.metric) if v is not None]
    if not known:
        return None
    return (max(known) if sweep.maximises else min(known)) if sweep.best else known[-1]


def open_study(sweep: SweepConfig, folder: Path) -> Study:
    """The sweep's trials so far. MissingDependency without Optuna; UsageError if the storage has another sweep."""
    try:
        import optuna
    except ImportError:
        raise MissingDependency(
            'sweep: needs optuna; it is not installed. pip install "ane_trainer[sweep]"'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    import sqlalchemy

    storage = sweep.storage or f"sqlite:///{folder / STORAGE}"
    try:
        study = optuna.create_study(
            storage=storage, study_name=folder.name, load_if_exists=True, sampler=_sampler(sweep),
            direction="maximize" if sweep.maximises else "minimize",
        )  # fmt: skip
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
        raise UsageError(
            f"storage: needs a database that Optuna opens; got {storage!r} ({str(error).splitlines()[0]}). "
            "Correct its address, or leave it out.",
            code="ANE104",
        ) from None
    asked = sweep.model_dump(mode="json", include={"metric", "train", "search"})
    before = study.user_attrs.get("sweep")
    if before is not None and json.loads(before) != json.loads(json.dumps(asked)):
        raise UsageError(
            f"{folder}: needs the sweep that it was begun with; train, search or metric differ now. "
            "Put them back, or give another --out.",
            code="ANE107",
        )
    study.set_user_attr("sweep", json.dumps(asked))
    return Study(sweep, folder, study)


def _sampler(sweep: SweepConfig) -> optuna.samplers.BaseSampler:
    import optuna

    if sweep.sampler == "random":
        return optuna.samplers.RandomSampler(seed=sweep.seed)
    if sweep.sampler == "grid":
        open_ended = [name for name, choice in sweep.search.items() if not choice.choices]
        if open_ended:
            raise UsageError(
                f"sampler: grid needs choices for every option; {open_ended[0]} has none. Choose tpe or random.",
                code="ANE104",
            )
        return optuna.samplers.GridSampler(
            {n: list(c.choices) for n, c in sweep.search.items()}, seed=sweep.seed
        )
    return optuna.samplers.TPESampler(seed=sweep.seed, n_startup_trials=5, constant_liar=True)


def write_outcome(study: Study) -> None:
    """Write the table as CSV, and a page with the table and a chart of the trials and of each option."""
    rows, sweep = study.rows(), study.sweep
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["trial"])
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(study.folder / TABLE, text.getvalue())
    names = [name for name in (rows[0] if rows else {}) if any(row[name] not in (None, "") for row in rows)]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_linked(name, row[name], study.folder)}</td>" for name in names) + "</tr>"
        for row in rows
    )
    page = (
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Sweep {escape(study.folder.name)}</title><style>body{{font:15px system-ui,sans-serif;margin:2em auto;"
        "max-width:1100px;padding:0 1em}table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:"
        ".25em .8em;text-align:left;border-bottom:1px solid #ddd}.charts{display:grid;grid-template-columns:"
        "repeat(auto-fit,minmax(400px,1fr));gap:1em;margin:1.5em 0}</style>"
        f"<h1>Sweep {escape(study.folder.name)}</h1><p>{len(rows)} of {sweep.trials} trials, by {sweep.metric}.</p>"
        f"<div class=charts>{''.join(charts(rows, sweep))}</div><table><tr>{head}</tr>{body}</table>"
    )
    atomic_write(study.folder / PAGE, page)


def charts(rows: Sequence[Mapping[str, object]], sweep: SweepConfig) -> list[str]:
    """SVGs: the outcome by trial with the best so far, and the outcome of each trial over each option."""
    metric = sweep.metric
    done = [(row, float(str(row[metric]))) for row in rows if row[metric] is not None]
    by_trial = sorted((float(str(row["trial"])), value) for row, value in done)
    best: list[tuple[float, float | None]] = []
    for number, value in by_trial:
        before = best[-1][1] if best else None
        better = max if sweep.maximises else min
        best.append((number, value if before is None else better(before, value)))
    found = [line_chart({"trial": by_trial, "best so far": best}, metric, x_label="trial")]
    for name, choice in sweep.search.items():
        dots = [
            (v if isinstance(v := row[name], (int, float)) else str(v), value, f"trial {row['trial']}: {_shown(value)}")
            for row, value in done if row[name] is not None
        ]  # fmt: skip
        found.append(dot_chart(dots, f"{metric} by {name}", name, logarithmic=choice.log))
    return [chart for chart in found if chart]


def _linked(name: str, value: object, folder: Path) -> str:
    """A cell of the page; a run's is a link to its report, where there is one."""
    report = Path(str(value)) / "report.html"
    if name != "run" or not report.is_file():
        return escape(_shown(value))
    return f'<a href="{escape(os.path.relpath(report, folder), quote=True)}">{escape(_shown(value))}</a>'


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
