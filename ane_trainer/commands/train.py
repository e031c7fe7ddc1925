"""`train`: a model on a dataset, from options, a TOML file, or where an interrupted run stopped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.options import Output, takes_train_options
from ane_trainer.training.config import RESUMABLE, make_config, read_config_file
from ane_trainer.training.reporting.report import ConsoleReporter, Reporter, summary
from ane_trainer.utils import torchrun_rank


@takes_train_options
def train(
    dataset: Annotated[
        str | None,
        typer.Argument(
            help="A known name (mnist, cifar-10, ...), a folder of images, a CSV, Parquet, .npz or text file, "
            "hf:NAME, or file.py:function.",
            metavar="DATA",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with any of these options; those given here win.", metavar="FILE"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run (default: a new one in runs/).", metavar="DIR")
    ] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with an interrupted run.", metavar="RUN")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show loss scale, skipped steps, traffic and more.")
    ] = False,
    as_json: bool = False,
    options: Mapping[str, object] = {},
) -> Output:
    """Train a model on a dataset.

    ane-trainer train mnist

    ane-trainer train photos/ --epochs 20 --augment flip,shift=2

    ane-trainer train houses.csv --target price

    ane-trainer train --resume last
    """
    given = {**options, **({"dataset": dataset} if dataset is not None else {})}
    if resume is not None:
        _only_resumable(given, {"out": out, "config": config})
    elif dataset is None and config is None:
        raise UsageError("train: needs a dataset; got none. Try: ane-trainer train mnist", code="ANE100")
    read = read_config_file(config) if config else {"dataset": ""} if resume is not None else {}
    settings = make_config({**read, **given})
    leads = torchrun_rank() == 0  # of several processes one reports
    report = ConsoleReporter(sys.stderr if as_json else sys.stdout, verbose=verbose) if leads else Reporter()
    report.activity("importing PyTorch")
    from ane_trainer import core  # PyTorch is imported only for what can run

    if resume is not None:
        result = core.resume_training(resume, report=report, **settings.model_dump(include=set(given)))
    else:
        result = core.run_training(settings, out=out, report=report)
    if not leads:
        raise typer.Exit
    text = summary(result, folder=result.details["run"], command=_command(), report=report)
    if as_json:
        print(text, file=sys.stderr)
    return Output(result.to_json(), text)


def _only_resumable(options: Collection[str], places: Mapping[str, Path | None]) -> None:
    """A resumed run keeps its options; only those in `RESUMABLE` may change, and where its data lies."""
    given = {*options, *(name for name, path in places.items() if path is not None)}
    others = sorted(given - RESUMABLE - {"dataset"})
    if others:
        raise UsageError(
            f"train: --resume keeps the run's options; got {', '.join(others)} as well. "
            f"Leave them out, or start a new run. These may change: {', '.join(sorted(RESUMABLE))}.",
            code="ANE107",
        )


def _command() -> str:
    """How the user can type this program: by name where it is on the path, else as it was called."""
    if Path(sys.argv[0]).name == "__main__.py":
        return "python -m ane_trainer"
    return "ane-trainer" if shutil.which("ane-trainer") else sys.argv[0]
