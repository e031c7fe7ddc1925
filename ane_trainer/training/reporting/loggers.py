"""Sends a run's numbers to experiment trackers, each behind one interface: TensorBoard, W&B, MLflow, trackio.

    trainer = Trainer(model, report=Reporters(ConsoleReporter(), make_logger("tensorboard", "runs/a")))

From the command line: `--log tensorboard,wandb`. Each tracker is an optional package; W&B, MLflow and trackio take
where they send things from their own environment variables and settings.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ane_trainer.ane.errors import MissingDependency, UsageError
from ane_trainer.training.folder.results import Epoch
from ane_trainer.training.reporting.report import Reporter
from ane_trainer.utils import did_you_mean

#: Steps between two logged training losses; epochs are logged whole.
LOSS_EVERY = 10


@dataclass(frozen=True)
class Sink:
    """Where numbers go: `log` takes numbers by name, and the training step; `close` returns when all is stored."""

    log: Callable[[Mapping[str, float], int], object]
    close: Callable[[], object]


class Logger(Reporter):
    """Passes the numbers of a run on to a sink: the loss every `LOSS_EVERY` steps, everything at an epoch's end."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._step = 0

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None, first_step: int = 0) -> None:
        if steps is not None:
            self._step = (epoch - 1) * steps + first_step

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        self._step += 1
        if self._step % LOSS_EVERY == 0 and math.isfinite(loss):
            self.sink.log({"train/loss": loss}, self._step)

    def end_epoch(self, record: Epoch) -> None:
        self.sink.log(numbers_of(record), self._step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            self.sink.close()


def numbers_of(record: Epoch) -> dict[str, float]:
    """The known numbers of an epoch by their names in a tracker: train/loss, val/accuracy, run/seconds, ..."""
    found = {}
    for name, value in record.to_json().items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            group = next((part for part in ("train", "val") if name.startswith(f"{part}_")), "")
            label = f"{group}/{name.removeprefix(group + '_')}" if group else f"run/{name}"
            found["epoch" if name == "epoch" else label] = float(value)
    return found


def make_logger(name: str, folder: str | Path, config: Mapping[str, object] | None = None) -> Logger:
    """The logger of a tracker for the run in `folder`, whose name the tracker shows, with its options.

    UsageError (ANE121) for an unknown name; MissingDependency for a package that is not installed.
    """
    if name not in TRACKERS:
        raise UsageError(
            f"log: needs a known tracker; got {name!r}. {did_you_mean(name, TRACKERS)}", code="ANE121"
        )
    tracker = TRACKERS[name]
    try:
        module = importlib.import_module(tracker.module)
    except ImportError as error:
        raise MissingDependency(
            f"log: {name} needs the package {tracker.package}; it cannot be imported ({error}). "
            f"Install it: pip install {tracker.package}",
            code="ANE201",
        ) from None
    with contextlib.redirect_stdout(sys.stderr):
        return Logger(tracker.open(module, Path(folder), dict(config or {})))


def make_loggers(
    names: Iterable[str], folder: str | Path, config: Mapping[str, object]
) -> tuple[Logger, ...]:
    """The loggers of several trackers."""
    return tuple(make_logger(name, folder, config) for name in dict.fromkeys(names))


class Tracker(NamedTuple):
    """A tracker: the package to install, the module it is used by, and how a run in it begins."""

    package: str
    module: str
    open: Callable[[object, Path, dict[str, object]], Sink]


def _tensorboard(module: Any, folder: Path, config: dict[str, object]) -> Sink:
    """Event files in the run's folder: `tensorboard --logdir runs`."""
    writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))
    writer.add_text("options", "\n".join(f"    {name} = {value}" for name, value in config.items()), 0)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Sink(log, writer.close)


def _wandb(module: Any, folder: Path, config: dict[str, object]) -> Sink:
    """A run of the project "ane_trainer" or WANDB_PROJECT; WANDB_MODE=offline keeps it in the run's folder."""
    run = module.init(
        project=_setting("WANDB_PROJECT"), name=folder.name, config=config, dir=str(folder), id=_once(folder, "wandb"),
        resume="allow",
    )  # fmt: skip
    return Sink(lambda values, step: run.log(dict(values), step=step), run.finish)


def _mlflow(module: Any, folder: Path, config: dict[str, object]) -> Sink:
    """A run of the experiment "ane_trainer" or MLFLOW_EXPERIMENT_NAME, at MLFLOW_TRACKING_URI or in ./mlruns."""
    module.set_experiment(_setting("MLFLOW_EXPERIMENT_NAME"))
    known = folder / ".mlflow-run"
    run = (
        module.start_run(run_id=known.read_text())
        if known.exists()
        else module.start_run(run_name=folder.name)
    )
    known.write_text(run.info.run_id)
    module.log_params({name: str(value) for name, value in config.items()})
    return Sink(lambda values, step: module.log_metrics(dict(values), step=step), module.end_run)


def _trackio(module: Any, folder: Path, config: dict[str, object]) -> Sink:
    """A run of the project "ane_trainer" or TRACKIO_PROJECT, kept on this machine: `trackio show`."""
    plain = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in config.items()
    }
    run = module.init(
        project=_setting("TRACKIO_PROJECT"), name=folder.name, config=plain, resume="allow", embed=False
    )
    return Sink(lambda values, step: run.log(dict(values), step=step), run.finish)


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker("tensorboard", "torch.utils.tensorboard", _tensorboard),
    "wandb": Tracker("wandb", "wandb", _wandb),
    "mlflow": Tracker("mlflow", "mlflow", _mlflow),
    "trackio": Tracker("trackio", "trackio", _trackio),
}


def _setting(variable: str) -> str:
    """A project's name out of the tracker's own environment variable, else ours."""
    return os.environ.get(variable) or "ane_trainer"


def _once(folder: Path, tracker: str) -> str:
    """An id for the run that a resume finds again."""
    known = folder / f".{tracker}-run"
    if not known.exists():
        known.write_text(uuid.uuid4().hex[:16])
    return known.read_text()
