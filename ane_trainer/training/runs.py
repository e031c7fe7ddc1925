"""The run folder: where a training run leaves its configuration, metrics, program, weights and checkpoint.

    config.toml              the resolved options           metrics.jsonl   one line per epoch
    result.json              the outcome                    program.mil     the training step as MIL text
    weights.safetensors      the trained parameters         weights.bin     the program's weight blob
    checkpoint.safetensors   everything needed to go on

Files appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ane_trainer.ane.errors import CheckpointError
from ane_trainer.training.checkpoint import CHECKPOINT, Checkpoint, read_tensors, unwritable, write_tensors
from ane_trainer.training.config import TrainConfig, load_config
from ane_trainer.utils import atomic_write, atomic_write_json, finite

#: Where runs go when no folder is named.
RUNS = Path("runs")

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on disk. Writing raises EnvironmentFault, reading CheckpointError."""

    path: Path

    def write_config(self, config: TrainConfig) -> None:
        """Write config.toml."""
        self._write("config.toml", config.to_toml())

    def read_config(self) -> TrainConfig:
        """The run's configuration."""
        if not (self.path / "config.toml").is_file():
            got = "a folder without one" if self.path.is_dir() else "no such folder"
            raise CheckpointError(
                f"{self.path}: needs a run folder with a config.toml; got {got}. "
                "Give the folder that `train` named as saved, or `last`.",
                code="CKPT101",
            )
        return load_config(self.path / "config.toml")

    def has_result(self) -> bool:
        """True if the run came to its end."""
        return (self.path / "result.json").is_file()

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; numbers that are not finite become null."""
        with self._writing("metrics.jsonl"), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def keep_metrics(self, epochs: int) -> None:
        """Cut metrics.jsonl to its first `epochs` lines; what follows will be repeated."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()[:epochs] if path.exists() else []
        self._write("metrics.jsonl", "".join(f"{line}\n" for line in lines))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json; numbers that are not finite become null."""
        with self._writing("result.json"):
            atomic_write_json(self.path / "result.json", finite(result))

    def write_program(self, text: str, blob: bytes) -> None:
        """Write the training step: program.mil and its weight blob weights.bin."""
        self._write("program.mil", text)
        self._write("weights.bin", blob)

    def write_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Write weights.safetensors: the module's state_dict."""
        with self._writing(WEIGHTS):
            write_tensors(self.path / WEIGHTS, state)

    def read_weights(self) -> dict[str, torch.Tensor]:
        """The module's state_dict."""
        return read_tensors(self.path / WEIGHTS, scalars=False).tensors

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace checkpoint.safetensors."""
        with self._writing(CHECKPOINT):
            write_tensors(self.path / CHECKPOINT, checkpoint.tensors, checkpoint.scalars)

    def read_checkpoint(self) -> Checkpoint:
        """The last checkpoint."""
        return read_tensors(self.path / CHECKPOINT, scalars=True)

    def _write(self, name: str, data: str | bytes) -> None:
        with self._writing(name):
            atomic_write(self.path / name, data)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self.path / name, error) from None


def create_run(out: str | Path | None, name: str) -> RunFolder:
    """Make the folder of a new run: `out`, or runs/<name>-<date>-<number>.

    EnvironmentFault if it cannot be written, CheckpointError if `out` already holds a run.
    """
    path = Path(out) if out is not None else _fresh_path(name)
    if (path / "config.toml").exists():
        raise CheckpointError(
            f"{path}: needs a folder without a run; it holds one already. "
            f"Go on with it by --resume {path}, or give another --out.",
            code="CKPT104",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.unlink(atomic_write(path / ".writable", ""))
    except OSError as error:
        raise unwritable(path, error) from None
    return RunFolder(path)


def open_run(path: str | Path) -> RunFolder:
    """An existing run: a folder, or `last` for the newest one under runs/. CheckpointError if it is none."""
    if str(path) == "last" and not Path("last").exists():
        found = [config.parent for config in RUNS.glob("*/config.toml")]
        if not found:
            raise CheckpointError(
                "last: needs a run under runs/; there is none. Train one first.", code="CKPT101"
            )
        path = max(found, key=lambda folder: (folder / "config.toml").stat().st_mtime_ns)
    run = RunFolder(Path(path))
    run.read_config()
    return run


def _fresh_path(name: str) -> Path:
    stem = f"{name}-{datetime.date.today().isoformat()}"
    number = 1
    while (RUNS / f"{stem}-{number}").exists():
        number += 1
    return RUNS / f"{stem}-{number}"
