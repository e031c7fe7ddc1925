"""`predict`: classes and probabilities that a finished run's model gives for examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ane_trainer.commands.options import Output, Run, RunChip, RunDevice, RunFidelity


def predict(
    run: Run,
    input: Annotated[
        Path | None, typer.Option("--input", help="A .npy file of examples [N, ...].", metavar="FILE")
    ] = None,
    index: Annotated[int | None, typer.Option(help="A test example by its number.")] = None,
    chip: RunChip = None,
    device: RunDevice = None,
    fidelity: RunFidelity = None,
) -> Output:
    """Predict classes with a finished run's model."""
    from ane_trainer import core

    found = core.predict_run(run, index=index, path=input, chip=chip, device=device, fidelity=fidelity)
    truth = "" if found["truth"] is None else f"   truth {found['truth']}"
    lines = [
        f"{number}: {row['name']}   probability {max(row['probabilities']):.4f}{truth}"
        for number, row in enumerate(found["predictions"])
    ]
    return Output(found, "\n".join(lines))
