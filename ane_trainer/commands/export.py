"""`export`: a run's model, or its training step, as a file for apps, checked by running the file again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ane_trainer.commands.options import Output, Run, RunChip, RunFidelity, show


def export(
    run: Run,
    format: Annotated[
        str,
        typer.Option(help="mlpackage, aimodel, onnx, torch, step-mlpackage, step-aimodel.", metavar="NAME"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file (default: in the run's folder).", metavar="PATH")
    ] = None,
    input: Annotated[
        str, typer.Option("--input", help="image (pixels), tensor, auto.", metavar="KIND")
    ] = "auto",
    weights: Annotated[str, typer.Option(help="Of an mlpackage: fp16, int8, int4.", metavar="KIND")] = "fp16",
    batch: Annotated[int, typer.Option(help="Examples that go in at once.")] = 1,
    examples: Annotated[int, typer.Option(help="Test examples that the file is checked on; 0: all.")] = 1000,
    chip: RunChip = None,
    fidelity: RunFidelity = None,
) -> Output:
    """Write a run's model, or its training step, for apps, and check the file by running it again."""
    from ane_trainer import core

    return show(
        core.export_run(
            run, format, out, input=input, weights=weights, batch=batch, examples=examples or None, chip=chip,
            fidelity=fidelity,
        )
    )  # fmt: skip
