"""A run's folder without PyTorch: read as plain values, and held against other processes."""

from __future__ import annotations

import contextlib
import csv
import datetime
import errno
import io
import json
import os
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ane_trainer.ane.errors import CheckpointError, EnvironmentFault
from ane_trainer.utils import atomic_write

#: Where runs go when no folder is named.
RUNS = Path("runs")

#: What is a number, and what a table, in result.json where it is known.
RESULT_NUMBERS = (
    "test_accuracy", "test_loss", "train_loss", "fp32_reference", "parameters", "steps", "skipped_steps",
    "seconds_per_step", "seconds_total", "seconds_compile", "energy_joules", "engine_flop_fraction",
)  # fmt: skip
_RESULT_TABLES = ("placement", "estimate", "health", "agreement")

Status = Literal["finished", "interrupted", "empty"]


@dataclass(frozen=True)
class RunRecord:
    """One run: its options, one mapping an epoch, and its result where it came to its end.

    `damage` names, a sentence each, what of its files could not be read and is left out.
    """

    path: Path
    config: Mapping[str, object]
    history: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any] | None
    modified: float
    damage: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def status(self) -> Status:
        """`finished`, `interrupted` (it can be resumed), or `empty` (nothing was trained)."""
        if self.result is not None or (self.path / "weights.safetensors").exists():
            return "finished"
        return "interrupted" if self.history or any(self.path.glob("checkpoint*")) else "empty"

    @property
    def accuracy(self) -> float | None:
        """On the test data, else of the kept weights on what their epoch was evaluated on."""
        if self.result is not None and self.result.get("test_accuracy") is not None:
            return float(self.result["test_accuracy"])
        return self.kept("val_accuracy")

    @property
    def when(self) -> str:
        """The time of the last change."""
        return datetime.datetime.fromtimestamp(self.modified).strftime("%Y-%m-%d %H:%M")

    def kept(self, name: str) -> float | None:
        """A number of the epoch whose weights the run ended with; of one without a result the last that is known."""
        epoch = (self.result or {}).get("weights_epoch")
        records = [record for record in self.history if record.get("epoch") == epoch] or self.history
        known = [record[name] for record in records if record.get(name) is not None]
        return float(known[-1]) if known else None

    def curve(self, name: str) -> list[tuple[float, float | None]]:
        """A number by epoch."""
        return [(float(record.get("epoch", n)), record.get(name)) for n, record in enumerate(self.history, 1)]


#: What training writes, and nothing else: an export or a trace does not make a run the last one.
_TRAINED = ("config.toml", "metrics.jsonl", "checkpoint.safetensors", "result.json")


def find_run(path: str | Path) -> Path:
    """A run's folder: the folder itself, one of that name under runs/, or `last`: the newest there that was trained.

    CheckpointError (CKPT101) if there is no run to be the last one.
    """
    if str(path) == "last" and not Path("last").exists():
        found = [record for record in find_records() if record.status != "empty"]
        if not found:
            raise CheckpointError(
                "last: needs a run under runs/; there is none. Train one first.", code="CKPT101"
            )
        return found[-1].path
    folder = Path(path)
    return RUNS / folder if not folder.exists() and (RUNS / folder / "config.toml").exists() else folder


def read_record(path: str | Path) -> RunRecord:
    """The run that `find_run` finds. What is damaged in metrics.jsonl or result.json is left out, and said.

    CheckpointError (CKPT101) if there is no run.
    """
    folder = find_run(path)
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or f"not TOML: {error}"
        raise CheckpointError(
            f"{path}: needs a run folder with a config.toml that can be read; {reason}. "
            "`ane-trainer runs list` shows the runs.",
            code="CKPT101",
        ) from None
    history, damage = read_history(folder)
    result, wrong = _result(folder / "result.json")
    written = [file.stat().st_mtime for name in _TRAINED if (file := folder / name).exists()]
    modified = max(written)  # config.toml is there
    return RunRecord(folder, config, history, result, modified, (*damage, *wrong))


def find_records(root: Path = RUNS) -> list[RunRecord]:
    """The runs right below a folder, oldest first; what cannot be read is left out."""
    found = []
    for config in root.glob("*/config.toml"):
        try:
            found.append(read_record(config.parent))
        except CheckpointError:
            continue
    return sorted(found, key=lambda record: (record.modified, record.name))


def read_history(folder: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """The lines of metrics.jsonl, one mapping an epoch, and a sentence on those that are damaged and left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = [record for line in lines if (record := _record(line)) is not None]
    lost = len(lines) - len(found)
    return tuple(found), (f"{lost} of {len(lines)} lines of {path.name} are damaged and left out",) * (
        lost > 0
    )


def _record(line: bytes) -> Mapping[str, Any] | None:
    """An epoch's numbers; None if they are not."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("epoch"), int) or record["epoch"] < 1:
        return None
    return record if all(map(_is_number, record.values())) else None


def _is_number(value: object) -> bool:
    """Whether it is a finite number, or None: not known."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None
    return abs(value) <= sys.float_info.max  # false for nan, and for whole numbers beyond


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


def _result(path: Path) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """What is in result.json, and a sentence on what of it is not as it was written."""
    if not path.is_file():
        return None, ()
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return None, (f"{path.name} is damaged and left out",)
    wrong = [name for name in RESULT_NUMBERS if not _is_number(found.get(name))]
    wrong += [name for name in _RESULT_TABLES if not isinstance(found.get(name), dict | None)]
    whole = {name: value for name, value in found.items() if name not in wrong}
    return whole, (f"{', '.join(wrong)} of {path.name} are damaged and left out",) * bool(wrong)


# The lock ----------------------------------------------------------------------------------------------------

_LOCK = ".lock"
_LOCK_FLAGS = os.O_RDONLY if os.name == "posix" else os.O_RDWR | os.O_CREAT


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes; CheckpointError CKPT109 says which one has it.

    The system gives the lock back when the process ends, however it ends. EnvironmentFault ANE204 if the folder
    cannot be written.
    """
    note = folder / _LOCK
    try:
        handle = os.open(folder if os.name == "posix" else note, _LOCK_FLAGS, 0o666)
    except OSError as error:
        raise unwritable(note, error) from None
    try:
        if not _try_lock(handle):
            holder = _holder(note)
            raise CheckpointError(
                f"{folder}: needs a folder that no other process writes to; process {holder or '(unknown)'} does. "
                "Wait for it, or end it.",
                code="CKPT109",
            )
        try:
            atomic_write(note, f"{os.getpid()}\n")
        except OSError as error:
            raise unwritable(note, error) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                note.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _holder(note: Path) -> str:
    """The number of the process that has the lock, which it writes down right after it took it; "" if unknown."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            if holder := note.read_text(encoding="utf-8", errors="replace").strip():
                return holder
        time.sleep(0.02)
    return ""


def _try_lock(handle: int) -> bool:
    """Take the lock if it is free."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def unwritable(path: Path, error: OSError) -> EnvironmentFault:
    """The error for a folder or file that cannot be written."""
    help = "Make room there, or begin in another (--out DIR)."
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
        help = "Something else lies there: move it away, or begin in another folder (--out DIR)."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        help = "Allow it to be written, or begin in another (--out DIR)."
    return EnvironmentFault(
        f"{path}: needs a place that can be written; {error.strerror or error}. {help}", code="ANE204"
    )
