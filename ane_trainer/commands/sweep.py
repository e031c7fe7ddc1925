"""`sweep`: train with options that Optuna chooses, several at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ane_trainer.ane.errors import CheckpointError, Interrupted, MissingDependency, UsageError
from ane_trainer.commands.options import Output, table
from ane_trainer.training.config import make_config
from ane_trainer.training.sweeps import (
    PAGE,
    STORAGE,
    TABLE,
    Study,
    Value,
    open_study,
    read_sweep,
    write_outcome,
)
from ane_trainer.utils import atomic_write, format_count

if TYPE_CHECKING:
    from ane_trainer.training.folder.runs import RunFolder

#: Times that a training which was killed is gone on with, before its trial counts as failed.
_TRIES = 3


def sweep(
    config: Annotated[Path, typer.Argument(help="TOML file of the sweep (docs/scale.md).", metavar="FILE")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for its runs (default: runs/sweeps/FILE).", metavar="DIR")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time (default: one a core).")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Instead of the file's number; more may be added later.")
    ] = None,
    engine: Annotated[
        Literal["processes", "ray"], typer.Option(help="Where trainings run: here, or on a Ray cluster.")
    ] = "processes",
) -> Output:
    """Train with options that Optuna chooses, and compare the results; typed again it goes on.

    ane-trainer sweep sweep.toml --jobs 2
    """
    asked = read_sweep(config)
    asked = asked.model_copy(update={"trials": trials or asked.trials})
    if trials is not None and trials < 1:
        raise UsageError(f"--trials: needs a number from 1 on; got {trials}. Choose one.", code="ANE104")
    folder = out if out is not None else Path("runs") / "sweeps" / config.stem
    folder.mkdir(parents=True, exist_ok=True)
    from ane_trainer.training.folder.runs import RunFolder  # imports PyTorch

    with _tidy(folder), RunFolder(folder).locked():
        study = open_study(asked, folder)
        run = _ray_runner() if engine == "ray" else train_in_process
        try:
            _train_all(study, jobs or asked.jobs or os.cpu_count() or 1, run)
        except KeyboardInterrupt:
            write_outcome(study)
            raise Interrupted(
                f"sweep: stopped; {folder / STORAGE} has the trials. Type the same again to go on."
            ) from None
        write_outcome(study)
    return _output(study)


@contextlib.contextmanager
def _tidy(folder: Path) -> Iterator[None]:
    """A sweep that cannot begin leaves no empty folder."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _train_all(study: Study, jobs: int, run: Callable[[Path, Path], tuple[int, str]]) -> None:
    """Go on with what was under way, then train new trials, `jobs` at a time, until all are there."""
    waiting = [(t.number, dict(t.params)) for t in study.under_way()]
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[tuple[int, str]], int] = {}
        while True:
            while len(running) < jobs:
                if waiting:
                    number, chosen = waiting.pop(0)
                elif (trial := study.next()) is not None:
                    number, chosen = trial.number, dict(trial.params)
                else:
                    break
                file = _write_options(study, number, chosen)
                running[pool.submit(run, file, study.run_of(number))] = number
            if not running:
                return
            done = [future for future in running if future.done()]
            if not done:
                time.sleep(0.05)
            for future in done:
                _note(study, running.pop(future), *future.result())


def _write_options(study: Study, number: int, chosen: Mapping[str, Value]) -> Path:
    file = study.folder / f"trial-{number:04d}.toml"
    options = study.sweep.options(chosen)
    here = {"threads": 1} if "threads" not in options else {}
    atomic_write(file, make_config({**options, **here}, where=f"trial {number}").to_toml())
    return file


def _note(study: Study, number: int, code: int, error: str) -> None:
    """A training came to its end: its outcome, or why there is none. An interrupted one stays under way."""
    if code == 130 or code == 128 + 15:
        raise KeyboardInterrupt
    if code:
        study.fail(number, error)
        print(f"trial {number}: failed: {error}", file=sys.stderr, flush=True)
        return
    value = study.tell(number)
    shown = "" if value is None else f"  {study.sweep.metric} {value:.4g}"
    print(f"trial {number}:{shown}", file=sys.stderr, flush=True)
    write_outcome(study)


def train_in_process(options: Path, folder: Path) -> tuple[int, str]:
    """Train a trial, or what is left of it, in a process; (exit code, the last line of what it said).

    A process that an earlier sweep left at work is waited for.
    """
    from ane_trainer.training.folder.runs import RunFolder

    code, text = 1, ""
    for _ in range(_TRIES):
        run = RunFolder(folder)
        _wait_for(run)
        if folder.exists() and run.has_result():
            return 0, ""
        place = ["--resume", str(folder)] if folder.exists() and run.holds_training() else [
            "--config", str(options), "--out", str(folder)
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "ane_trainer", "train", *place, "--json"], check=False, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        code, text = done.returncode, (done.stderr.strip().splitlines() or [""])[-1]
        if code >= 0:
            break
        text = f"killed by signal {-code}"
    return code, text


def _wait_for(run: RunFolder) -> None:
    while run.path.exists():
        try:
            with run.locked():
                return
        except CheckpointError:
            time.sleep(0.2)


def _ray_runner() -> Callable[[Path, Path], tuple[int, str]]:
    """Run trainings as tasks of the Ray cluster (a local one where there is none); run folders on a shared disk."""
    try:
        import ray
    except ImportError:
        raise MissingDependency(
            "sweep: --engine ray needs ray; it is not installed. pip install ray"
        ) from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    remote = ray.remote(num_cpus=1)(train_in_process)

    def run(options: Path, folder: Path) -> tuple[int, str]:
        found: tuple[int, str] = ray.get(remote.remote(options.resolve(), folder.resolve()))
        return found

    return run


def _output(study: Study) -> Output:
    rows, search = study.rows(), list(study.sweep.search)
    names = ["trial", study.sweep.metric, *search, "status"]
    shown = [[_text(row[name]) for name in names] for row in rows]
    done = sum(row["status"] == "finished" for row in rows)
    lines = table([names, *shown], left=(len(names) - 1,))
    lines += [
        "",
        f"{format_count(done)} of {study.sweep.trials} trials   {study.folder / PAGE}   {study.folder / TABLE}",
    ]
    if done:
        lines.append(f"best     ane-trainer runs show {rows[0]['run']}")
    return Output(
        {"trials": rows, "best": rows[0] if done else None, "folder": str(study.folder)},
        "\n".join(lines),
        exit_code=0 if done else 1,
    )


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
