"""`predict`: what a run's model says of new examples: images, tables, arrays, text, or held-out examples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.options import Output, Run, RunChip, RunData, RunDevice, RunFidelity, weights_note


def predict(
    run: Run,
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(help="Images, folders of images, CSV or Parquet files, .npy arrays.", metavar="FILES"),
    ] = None,
    input: Annotated[
        Path | None, typer.Option("--input", help="The same, as an option.", metavar="FILE")
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Held-out examples of the run's data: 7, 0:10 or 3,5.", metavar="N[:M]")
    ] = None,
    text: Annotated[str | None, typer.Option(help="What a text model goes on from.", metavar="TEXT")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="So many tokens of text.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Predict the first so many.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a .csv or .json file.", metavar="FILE")] = None,
    chip: RunChip = None,
    device: RunDevice = None,
    fidelity: RunFidelity = None,
    data: RunData = None,
) -> Output:
    """Predict with a run's model, its own preprocessing included.

    ane-trainer predict last photo.jpg folder/

    ane-trainer predict last new.csv --out answers.csv

    ane-trainer predict last --index 0:10
    """
    from ane_trainer import core
    from ane_trainer.training.language.finetuned import answer_finetuned, is_finetuned
    from ane_trainer.training.prediction import as_lines, write_answers

    paths = [*(inputs or ()), *([input] if input is not None else ())]
    if out is not None and out.resolve() in [path.resolve() for path in paths]:
        raise UsageError(f"--out: needs another file than what is read; got {out}. Rename it.", code="ANE104")
    place = {"chip": chip, "device": device, "fidelity": fidelity, "dataset": data}
    if is_finetuned(run):
        found = answer_finetuned(run, paths, prompt=text, index=index, tokens=tokens, **place)
    else:
        found = core.predict_run(
            run, paths, index=index, prompt=text, tokens=tokens, temperature=temperature, limit=limit, **place
        )
    for line in weights_note(found):
        print(line, file=sys.stderr)
    if out is None:
        return Output(found, as_lines(found["predictions"]))
    write_answers(out, found["predictions"], found["classes"])
    return Output(found, f"{len(found['predictions']):,} predictions in {out}")
