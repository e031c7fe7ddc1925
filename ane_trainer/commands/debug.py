"""`debug`: which op of a training step, or of a program, departs from full precision, and what heals it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.model_options import Asked, takes_subject
from ane_trainer.commands.options import Chip, Output
from ane_trainer.commands.subjects import ModelSubject, ProgramSubject, warn_if_refused
from ane_trainer.utils import atomic_write

if TYPE_CHECKING:
    import torch

    from ane_trainer.training.debugging import Report
    from ane_trainer.training.debugging.trials import Way

#: Examples of a step, where no number is given.
_BATCH = 8


@takes_subject
def debug(
    asked: Asked,
    data: Annotated[
        str | None,
        typer.Option(help="Take a batch of this dataset instead of random numbers.", metavar="NAME"),
    ] = None,
    feed: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a program: an input, once for each; others are drawn.", metavar="NAME=FILE.npy"
        ),
    ] = None,
    chip: Chip = "m4",
    rewrites: Annotated[
        bool,
        typer.Option("--rewrites/--no-rewrites", help="The range pass; without it, what it heals shows."),
    ] = True,
    loss_scale: Annotated[
        str, typer.Option(help="A power of two to start from, or auto.", metavar="X|auto")
    ] = "auto",
    optimizer_on: Annotated[
        str, typer.Option(help="Where the optimizer runs.", metavar="auto|engine|host")
    ] = "auto",
    clip_grad_norm: Annotated[
        float | None, typer.Option(help="Clip the norm of all gradients.", metavar="X")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with histograms there.", metavar="FILE")
    ] = None,
) -> Output:
    """Find the op where a step departs from full precision, and what heals it.

    Every op of forward, loss, backward and optimizer is held against fp64. Where the step departs from fp32,
    the op to blame is found by putting double precision in its place, and remedies are measured; exit code 3 then.

    ane-trainer debug net.py:Model --input 3x32x32

    ane-trainer debug model.mil --feed x=image.npy --html report.html
    """
    example = None if data is None else _batch_of(data, asked.batch or _BATCH)
    way = _way(rewrites, loss_scale, optimizer_on, clip_grad_norm)
    resolved = asked.resolved("debug", usual=_BATCH, x=None if example is None else example[0])
    if feed and isinstance(resolved, ModelSubject):
        text = "--feed: needs a program; got a model, whose batch is drawn. Take --data NAME for a batch of data."
        raise UsageError(text, code="ANE104")
    if data is not None and isinstance(resolved, ProgramSubject):
        raise UsageError("--data: needs a model; got a program. Take --feed NAME=FILE.npy.", code="ANE104")
    found = report_of(resolved, chip, asked.route, way, example, feed or ())
    if html is not None:
        atomic_write(html, found.as_html())
    hint = "" if feed else _of_a_run(resolved)
    return Output(found.to_json(), found.as_text() + hint, 0 if found.agrees else 3)


def _of_a_run(subject: ModelSubject | ProgramSubject) -> str:
    """A line about a run's program on its own: random numbers in the place of its state say little."""
    folder, name = Path(subject.name).parent, Path(subject.name).name
    if isinstance(subject, ModelSubject) or name != "program.mil" or not (folder / "config.toml").is_file():
        return ""
    return (
        "\nIts inputs were random numbers, its state and scalars, too (0 under a division).\n"
        f"With the run's own weights, state and data: ane-trainer debug {folder}"
    )


def report_of(
    subject: ModelSubject | ProgramSubject, chip: str, path: str, way: Way,
    example: tuple[torch.Tensor, torch.Tensor] | None = None, feed: list[str] | tuple[str, ...] = (),
) -> Report:  # fmt: skip
    """The report of a model's step, of a run's, or of a program."""
    from ane_trainer.ane.dispatch import resolve_target
    from ane_trainer.training.debugging import debug_function, debug_step
    from ane_trainer.training.debugging.remedies import Bench

    target = resolve_target("sim", chip, "exact", path=path)
    if isinstance(subject, ModelSubject):
        trained = subject.trained(chip)
        if example is not None:
            trained = dataclasses.replace(trained, example=example)
        return debug_step(subject.name, Bench(trained, target), way)
    if subject.run is not None:
        return _report_of_run(subject, chip, path, way)
    from ane_trainer.ane.chips.lookup import get_chip
    from ane_trainer.commands.run import feeds_of, parse_inputs

    warn_if_refused(subject.program.main, get_chip(chip), path)
    feeds, _ = feeds_of(subject.program.main, parse_inputs(feed, "--feed"), 1, 0)
    return debug_function(subject.name, subject.program, feeds[0], chip, path)


def _report_of_run(subject: ProgramSubject, chip: str, path: str, way: Way) -> Report:
    """A run's step with its weights, on a batch of its data."""
    from ane_trainer import core
    from ane_trainer.ane.dispatch import resolve_target
    from ane_trainer.ane.dispatch.loading import Subject as Trained
    from ane_trainer.training.debugging import debug_step
    from ane_trainer.training.debugging.remedies import Bench

    assert subject.run is not None
    trainer, example = core.open_for_step(subject.run)
    trained = Trained(trainer.model, trainer.loss, trainer.optimizer, example)
    target = resolve_target("sim", chip, "exact", path=path)
    return debug_step(subject.name, Bench(trained, target), way)


def _batch_of(data: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch of a dataset; its shape is the model's input."""
    from ane_trainer.data import load_dataset

    train, _ = load_dataset(data, batch_size=size)
    x, y = next(iter(train))
    return x, y


def _way(rewrites: bool, loss_scale: str, optimizer_on: str, clip_norm: float | None) -> Way:
    from ane_trainer.ane.capture.gradients import GradientOptions
    from ane_trainer.ane.capture.range.switch import REWRITES
    from ane_trainer.ane.dispatch import StepOptions
    from ane_trainer.training.debugging.trials import Way

    options = StepOptions(
        GradientOptions(clip_norm), optimizer_on, loss_scale=_scale(loss_scale), seed=0, sync="lazy"
    )
    return Way(options, frozenset(REWRITES) if rewrites else frozenset())


def _scale(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise UsageError(
            f"--loss-scale: needs a power of two or auto; got {text!r}. Correct it.", code="ANE104"
        ) from None
