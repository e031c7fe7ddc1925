"""`export`: a run's model, or its training step, as a file for apps, checked by running the file again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.options import Output, Run, RunChip, RunData, RunFidelity, show


def export(
    run: Run,
    format: Annotated[
        str | None,
        typer.Option(
            help="mlpackage, aimodel, onnx, torch, step-mlpackage, step-aimodel, step-onnx, step-stablehlo.",
            metavar="NAME",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file (default: in the run's folder).", metavar="PATH")
    ] = None,
    input: Annotated[
        str, typer.Option("--input", help="image (pixels), tensor, auto.", metavar="KIND")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="fp16; int8, int4 (mlpackage), fp32 (step-aimodel).", metavar="KIND")
    ] = "fp16",
    batch: Annotated[int, typer.Option(help="Examples that go in at once.")] = 1,
    examples: Annotated[int, typer.Option(help="Test examples that the file is checked on; 0: all.")] = 1000,
    state: Annotated[
        str, typer.Option(help="Of a training step: io (inputs and outputs), state, both.", metavar="FORM")
    ] = "io",
    app: Annotated[
        Path | None,
        typer.Option(help="A Swift package that trains on with the step, into this folder.", metavar="DIR"),
    ] = None,
    chip: RunChip = None,
    fidelity: RunFidelity = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    data: RunData = None,
) -> Output:
    """Write a run's model, or its training step, for apps, and check the file by running it again."""
    if app is not None:
        out, format = app, "app"
    if out is None and format is None:
        raise UsageError(
            "export: needs a format; got none. Give --format mlpackage, or --out model.mlpackage."
        )
    if out is not None and out.exists() and not overwrite:
        raise UsageError(
            f"export: needs a free path; {out} exists. Give --overwrite, or another --out.", code="ANE120"
        )
    from ane_trainer import core
    from ane_trainer.ane.export import format_of

    kind = format_of(out or "", format)
    return show(
        core.export_run(
            run, kind, out, input=input, weights=weights, batch=batch, examples=examples or None,
            state=state, chip=chip, fidelity=fidelity, dataset=data,
        )
    )  # fmt: skip
