"""`init`: a TOML file with every option of `train`, explained, for `train --config`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.options import Output
from ane_trainer.training.config import TrainConfig, toml_value
from ane_trainer.utils import atomic_write


def init(
    dataset: Annotated[
        str, typer.Argument(help="What will be trained on, as for `train`.", metavar="DATASET")
    ] = "mnist",
    out: Annotated[Path, typer.Option(help="The file.", metavar="FILE")] = Path("run.toml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
) -> Output:
    """Write a commented file of all options of `train`, to be changed and given to `train --config`."""
    if out.exists() and not overwrite:
        raise UsageError(
            f"init: needs a free path; {out} exists. Give --overwrite, or another --out.", code="ANE120"
        )
    atomic_write(out, commented(dataset))
    return Output({"file": str(out)}, f"{out}: change what you like, then: ane-trainer train --config {out}")


def commented(dataset: str) -> str:
    """Every field of TrainConfig with its description, by panel; those that stand for their default as comments."""
    panels: dict[str, list[str]] = {}
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        lines = [f"# {line}" for line in textwrap.wrap(field.description or "", 96)]
        if name == "dataset":
            lines.append(f"dataset = {toml_value(dataset)}")
        else:
            value = "..." if field.default is None else toml_value(field.default)
            lines.append(f"# {name} = {value}")
        panels.setdefault(str(extra.get("panel", "Training")), []).append("\n".join(lines))
    parts = [
        f"# ---- {panel} {'-' * (74 - len(panel))}\n\n" + "\n\n".join(entries)
        for panel, entries in panels.items()
    ]
    head = (
        "# Options of `ane-trainer train --config FILE`. Remove a # to change one; the command line wins.\n\n"
    )
    return head + "\n\n".join(parts) + "\n"
