"""A run's folder read as plain values, without PyTorch: for lists of runs, comparisons and report.html."""

from __future__ import annotations

import csv
import datetime
import io
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ane_trainer.ane.errors import CheckpointError

#: Where runs go when no folder is named.
RUNS = Path("runs")

Status = Literal["finished", "interrupted", "empty"]


@dataclass(frozen=True)
class RunRecord:
    """One run: its options, one mapping an epoch, and its result where it came to its end."""

    path: Path
    config: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any] | None
    modified: float

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def status(self) -> Status:
        """`finished`, `interrupted` (it can be resumed), or `empty` (nothing was trained)."""
        if self.result is not None:
            return "finished"
        return "interrupted" if self.history or any(self.path.glob("checkpoint*")) else "empty"

    @property
    def accuracy(self) -> float | None:
        """On the test data, else of the last epoch on what it was evaluated on."""
        if self.result is not None and self.result.get("test_accuracy") is not None:
            return float(self.result["test_accuracy"])
        return self.last("val_accuracy")

    @property
    def when(self) -> str:
        """The time of the last change."""
        return datetime.datetime.fromtimestamp(self.modified).strftime("%Y-%m-%d %H:%M")

    def last(self, name: str) -> float | None:
        """The last known value of a number of the epochs."""
        known = [record[name] for record in self.history if record.get(name) is not None]
        return float(known[-1]) if known else None

    def curve(self, name: str) -> list[tuple[float, float | None]]:
        """A number by epoch."""
        return [(float(record.get("epoch", n)), record.get(name)) for n, record in enumerate(self.history, 1)]


def read_record(path: str | Path) -> RunRecord:
    """The run in a folder, in a folder of that name under runs/, or `last`: the newest there that was trained.

    What is damaged in metrics.jsonl or result.json is left out. CheckpointError (CKPT101) if there is no run.
    """
    if str(path) == "last" and not Path("last").exists():
        found = [record for record in find_records() if record.status != "empty"]
        if not found:
            raise CheckpointError(
                "last: needs a run under runs/; there is none. Train one first.", code="CKPT101"
            )
        return found[-1]
    folder = Path(path) if Path(path).exists() else RUNS / path
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: needs a run folder with a config.toml that can be read; got none. "
            "`ane-trainer runs list` shows the runs.",
            code="CKPT101",
        ) from None
    modified = max(file.stat().st_mtime for file in (folder, *folder.glob("*.toml"), *folder.glob("*.json*")))
    return RunRecord(folder, config, read_history(folder), _json(folder / "result.json"), modified)


def find_records(root: Path = RUNS) -> list[RunRecord]:
    """The runs right below a folder, oldest first; what cannot be read is left out."""
    found = []
    for config in root.glob("*/config.toml"):
        try:
            found.append(read_record(config.parent))
        except CheckpointError:
            continue
    return sorted(found, key=lambda record: (record.modified, record.name))


def read_history(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of metrics.jsonl, one mapping an epoch; damaged ones are left out."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return tuple(found)


def as_csv(history: Iterable[Mapping[str, object]]) -> str:
    """One row an epoch under a row of names; what is not known is empty."""
    rows = list(history)
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _json(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
