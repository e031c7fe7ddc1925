"""`evaluate`: loss, accuracy and scores by class of a run on its held-out data, by an inference program."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from ane_trainer.commands.options import (
    Output,
    Run,
    RunChip,
    RunData,
    RunDevice,
    RunFidelity,
    Threads,
    weights_note,
)
from ane_trainer.training.reporting.report import headline, wrapped
from ane_trainer.utils import printable

#: How the parts of the data are called.
_PARTS = {"val": "validation", "train": "training"}


def evaluate(
    run: Run,
    chip: RunChip = None,
    device: RunDevice = None,
    fidelity: RunFidelity = None,
    threads: Threads = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many examples.")] = None,
    data: RunData = None,
) -> Output:
    """Measure a run on its held-out data."""
    from ane_trainer import core
    from ane_trainer.training.folder.results import text_of
    from ane_trainer.training.language.finetuned import evaluate_finetuned, is_finetuned

    measure = evaluate_finetuned if is_finetuned(run) else core.evaluate_run
    found = measure(
        run, limit=limit, chip=chip, device=device, fidelity=fidelity, threads=threads, dataset=data
    )
    part = _PARTS.get(found["split"], found["split"])
    accuracy = "" if found["test_accuracy"] is None else f"{part} accuracy {found['test_accuracy']:.2%}   "
    perplexity = f"   perplexity {found['perplexity']:.3f}" if "perplexity" in found else ""
    lines = [
        headline(found["where"]),
        *weights_note(found),
        f"{accuracy}{part} loss {found['test_loss']:.4f}{perplexity}   {found['examples']:,} examples"
        + text_of(found.get("metrics", {}).items()),
    ]
    lines += _table(found["scores"] or {})
    return Output(found, "\n".join(wrapped(line, sys.stdout) for line in lines))


def _table(scores: Mapping[str, Any]) -> Sequence[str]:
    """Scores by class, or by predicted number, as lines."""
    if "classes" in scores:
        width = min(max(len("class"), *(len(printable(row["name"])) for row in scores["classes"])), 32)
        head = f"{'class':<{width}}  precision   recall      F1  examples"
        rows = [
            f"{printable(row['name'])[:width]:<{width}}  {row['precision']:9.2%} {row['recall']:8.2%} {row['f1']:7.4f}"
            f"  {row['examples']:8,}"
            for row in scores["classes"]
        ]
        return ["", head, *rows, f"mean F1 {scores['macro_f1']:.4f}"]
    return [
        f"{row['name']}: mean absolute error {row['mae']:.6g}, root mean square error {row['rmse']:.6g}, "
        f"R2 {'unknown' if row['r2'] is None else format(row['r2'], '.4f')}"
        for row in scores.get("numbers", ())
    ]
