"""`cache show` and `cache prune`: what earlier compilations left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ane_trainer.ane.compiler.build import cache_folder
from ane_trainer.ane.dispatch import recall
from ane_trainer.ane.simulator.loops import objects
from ane_trainer.commands.options import Output, table
from ane_trainer.training.datasets import digests
from ane_trainer.utils import entries_of, format_bytes, prune

_WHAT = {
    "steps": "compiled steps, with what they were compiled from",
    "programs": "MIL text and weights of compiled programs",
    "code": "machine code of the simulator's loops",
    "digests": "hashes of image files, by which a run knows its data again",
}


def _folders() -> dict[str, Path]:
    return {
        "steps": recall.folder(),
        "programs": cache_folder(),
        "code": objects.folder(),
        "digests": digests.folder(),
    }


def cache_show() -> Output:
    """Show what compiled programs and machine code take on disk."""
    values: dict[str, dict[str, object]] = {}
    rows = [("cache", "entries", "size", "what")]
    for name, place in _folders().items():
        found = entries_of(place)
        size = sum(each for _, each, _ in found)
        values[name] = {"folder": str(place), "entries": len(found), "bytes": size}
        rows.append((name, f"{len(found):,}", format_bytes(size), f"{_WHAT[name]}   {place}"))
    return Output(values, "\n".join(table(rows, (0, 3))))


def cache_prune(
    keep: Annotated[int, typer.Option(help="Megabytes that each cache may keep.", metavar="MB", min=0)] = 0,
) -> Output:
    """Delete what was not used for longest, down to a size. Nothing is lost but the time to compile again."""
    values: dict[str, dict[str, object]] = {}
    lines = []
    for name, place in _folders().items():
        count, size = prune(place, keep * 1024**2)
        values[name] = {"folder": str(place), "deleted": count, "bytes": size}
        lines.append(f"{name}: {count:,} deleted, {format_bytes(size)}")
    return Output(values, "\n".join(lines))
