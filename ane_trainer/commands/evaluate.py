"""`evaluate`: loss and accuracy of a finished run on its test data, by an inference program."""

from __future__ import annotations

from typing import Annotated

import typer

from ane_trainer.commands.options import Output, Run, RunChip, RunDevice, RunFidelity, Threads
from ane_trainer.training.report import headline


def evaluate(
    run: Run,
    chip: RunChip = None,
    device: RunDevice = None,
    fidelity: RunFidelity = None,
    threads: Threads = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many test examples.")] = None,
) -> Output:
    """Measure a finished run on its test data."""
    from ane_trainer import core

    found = core.evaluate_run(run, limit=limit, chip=chip, device=device, fidelity=fidelity, threads=threads)
    accuracy = "unknown" if found["test_accuracy"] is None else f"{found['test_accuracy']:.2%}"
    scores = f"test accuracy {accuracy}   test loss {found['test_loss']:.4f}   {found['examples']:,} examples"
    return Output(found, f"{headline(found['where'])}\n{scores}")
