"""The run folder: where a training run leaves its configuration, metrics, program, weights and checkpoints.

    config.toml              every option, resolved         metrics.jsonl   one line per epoch
    data.json                what the data is, and how examples become numbers
    model.py, source.json    the user's model file, copied  result.json     the outcome
    weights.safetensors      the trained parameters         program.mil     the training step as MIL text
    best.safetensors         those of the best epoch        weights.bin     its weight blob; program.sha256 of both
    checkpoint.safetensors   everything needed to go on; checkpoint-before.safetensors: the one before
    checkpoints/             those that are kept for good (keep_every)
    blocks/                  of a step in programs of blocks each program, in a folder that `run` and `estimate` take

Files appear whole or not at all. A process that writes here holds a lock on the folder.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ane_trainer.ane.dispatch.state import MODEL, part
from ane_trainer.ane.errors import CheckpointError, Interrupted
from ane_trainer.ane.mil.loading import sums_of
from ane_trainer.training.checkpoint import (
    BEFORE,
    CHECKPOINT,
    Checkpoint,
    check_scalars,
    read_tensors,
    write_tensors,
)
from ane_trainer.training.config import TrainConfig, load_config
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.folder.records import RUNS, find_run, locked, unwritable
from ane_trainer.utils import atomic_write, atomic_write_json, finite

WEIGHTS, BEST = "weights.safetensors", "best.safetensors"
KEPT = "checkpoints"
DATA = "data.json"
#: The entry of a checkpoint's callbacks that has the run's options and data (the class `Recorder`).
_ORIGIN = "Recorder"
_MODEL, _SOURCE = "model.py", "source.json"


def origin_of(checkpoint: Checkpoint) -> Mapping[str, object]:
    """The options and the data's description that a run's checkpoint was trained with; {}: not known."""
    found = checkpoint.scalars.get("callbacks", {}).get(_ORIGIN, {})
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Weights:
    """A run's trained weights: the state_dict, its origin (options, data), its file, and what is wrong: the damage of a
    newer file, or that this one has no header.
    """

    state: dict[str, torch.Tensor]
    origin: Mapping[str, object]
    file: str
    damage: str = ""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on disk. Writing raises EnvironmentFault, reading CheckpointError."""

    path: Path

    def begin(self, config: TrainConfig, history: Iterable[Mapping[str, object]]) -> None:
        """Training is about to write here: the configuration, the model's source, the metrics of epochs done."""
        self._write("config.toml", config.to_toml())
        self._copy_model(config.model)
        self._write("metrics.jsonl", "".join(json.dumps(finite(record)) + "\n" for record in history))
        left_over = [
            *self.path.glob(".*.tmp"),
            *(self.path / KEPT).glob(".*.tmp"),
        ]  # by a process that was killed
        for path in (
            self.path / "result.json",
            self.path / WEIGHTS,
            *left_over,
        ):  # of an earlier end of this run
            with self._writing(path.name):
                path.unlink(missing_ok=True)

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

    def write_description(self, description: DataDescription) -> None:
        """Write data.json."""
        with self._writing(DATA):
            atomic_write_json(self.path / DATA, description.to_json())

    def read_description(self) -> DataDescription | None:
        """What the run was trained on; None for runs of versions that did not keep it."""
        path = self.path / DATA
        try:
            return DataDescription.from_json(json.loads(path.read_bytes())) if path.exists() else None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: needs the description of the data that `train` wrote; it is damaged ({error}). "
                "Train again, or copy it from a run on the same data.",
                code="CKPT103",
            ) from None

    def has_result(self) -> bool:
        """True if the run came to its end."""
        return (self.path / "result.json").is_file()

    def holds_training(self) -> bool:
        """Whether there is something to go on from or to use: a checkpoint, weights, a result."""
        names = (CHECKPOINT, BEFORE, WEIGHTS, "result.json")
        return any((self.path / name).exists() for name in names)

    def forget_start(self) -> None:
        """Delete the checkpoints of a run of which no step was trained, so that they do not block another start."""
        with contextlib.suppress(CheckpointError):
            if (
                not (self.path / BEFORE).exists()
                and not check_scalars(self._checked(CHECKPOINT).scalars)[0].steps
            ):
                (self.path / CHECKPOINT).unlink()

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """Add one line to metrics.jsonl; numbers that are not finite become null."""
        with self._writing("metrics.jsonl"), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def write_result(self, result: Mapping[str, object]) -> None:
        """Write result.json; numbers that are not finite become null."""
        with self._writing("result.json"):
            atomic_write_json(self.path / "result.json", finite(result))

    def write_program(self, text: str, blob: bytes, name: str = "program") -> None:
        """Write the training step: program.mil, weights.bin and the SHA-256 of both; of two parts also update.mil.

        A name may be in a folder: `blocks/0/program`.
        """
        place, _, stem = name.rpartition("/")
        weights = "weights.bin" if stem == "program" else f"{stem}-weights.bin"
        if place:
            with self._writing(place):
                (self.path / place).mkdir(parents=True, exist_ok=True)
        prefix = f"{place}/" if place else ""
        (self.path / f"{name}.sha256").unlink(missing_ok=True)
        self._write(f"{name}.mil", text)
        self._write(f"{prefix}{weights}", blob)
        self._write(f"{name}.sha256", sums_of({f"{stem}.mil": text.encode(), weights: blob}))

    def write_weights(
        self,
        state: Mapping[str, torch.Tensor],
        origin: Mapping[str, object] | None = None,
        name: str = WEIGHTS,
    ) -> None:
        """Write the module's state_dict, and the options and data that it was trained with (`origin`)."""
        with self._writing(name):
            write_tensors(self.path / name, state, origin)

    def read_weights(self) -> Weights:
        """The trained weights; those of the last checkpoint where the run has not come to its end."""
        if not (self.path / WEIGHTS).exists() and self.holds_training():
            found, damage = self.read_checkpoint()
            return Weights(
                part(found.tensors, MODEL), origin_of(found), BEFORE if damage else CHECKPOINT, damage
            )
        found = read_tensors(self.path / WEIGHTS, scalars=False)
        fault = "has no header of `train`; nothing tells whether it is whole, or this run's"
        foreign = "" if found.sealed else f"{self.path / WEIGHTS} {fault}"
        return Weights(found.tensors, found.scalars, WEIGHTS, foreign)

    def write_checkpoint(self, checkpoint: Checkpoint, *, keep_as: str | None = None) -> None:
        """Make this the last checkpoint, and the last one the one before; `keep_as` names one kept for good."""
        with self._writing(CHECKPOINT):
            _keep_one_before(self.path / CHECKPOINT, self.path / BEFORE)
            write_tensors(self.path / CHECKPOINT, checkpoint.tensors, checkpoint.scalars)
            if keep_as is not None:
                (self.path / KEPT).mkdir(exist_ok=True)
                _link(self.path / CHECKPOINT, self.path / KEPT / f"{keep_as}.safetensors")

    def read_checkpoint(self) -> tuple[Checkpoint, str]:
        """The last checkpoint, or, if it is damaged, the one before and what is wrong with the last."""
        try:
            return self._checked(CHECKPOINT), ""
        except CheckpointError as error:
            if not (self.path / BEFORE).exists():
                raise
            try:
                return self._checked(BEFORE), f"{error}"
            except CheckpointError:
                raise error from None

    def _checked(self, name: str) -> Checkpoint:
        found = read_tensors(self.path / name, scalars=True)
        check_scalars(found.scalars)
        return found

    def model_source(self, model: str) -> tuple[str, str]:
        """How to build the run's model, and a remark if the user's file is not as it was; a known name stays as it is.

        The copy in the run counts, as it was written: CheckpointError (CKPT103) otherwise. Modules beside the original
        are found where it was.
        """
        copy, name = self.path / _MODEL, model.rpartition(":")[2]
        if not copy.exists() and not (self.path / _SOURCE).exists():
            return model, ""
        try:
            source = json.loads((self.path / _SOURCE).read_text(encoding="utf-8"))
            path, wanted = Path(source["path"]), source["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise _changed(self.path / _SOURCE) from None
        if path.parent.is_dir() and str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        remark = ""
        if not copy.is_file() or _hash(copy) != wanted:
            raise _changed(copy)
        if path.exists() and _hash(path) != wanted:
            remark = f"{path} was changed since the run began; the run's own copy is used"
        return f"{copy}:{name}", remark

    def _copy_model(self, model: str) -> None:
        path = Path(model.rpartition(":")[0]).expanduser()
        if not model.rpartition(":")[0] or not path.is_file() or (self.path / _MODEL).exists():
            return
        self._write(_MODEL, path.read_bytes())
        self._write(_SOURCE, json.dumps({"path": str(path.resolve()), "sha256": _hash(path)}) + "\n")

    def _write(self, name: str, data: str | bytes) -> None:
        with self._writing(name):
            atomic_write(self.path / name, data)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self.path / name, error) from None

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder against other processes, see `records.locked`."""
        return locked(self.path)


@contextlib.contextmanager
def claim_run(out: str | Path | None, name: str) -> Iterator[RunFolder]:
    """A folder for a new run, held while the block runs: `out`, or runs/<name>-<date>-<number>.

    If the block fails before a step was trained, what it wrote goes again, with the folder if it was made here.
    EnvironmentFault if it cannot be written, CheckpointError if `out` already holds a run, or is in use.
    """
    path = Path(out) if out is not None else RUNS / name
    try:
        new = not path.exists()
        if out is None:
            path, new = _fresh_folder(name), True
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
    run = RunFolder(path)
    try:
        with run.locked():
            if run.holds_training():
                raise CheckpointError(
                    f"{path}: needs a folder without a run; it holds one already. "
                    f"Go on with it by --resume {path}, or give another --out.",
                    code="CKPT104",
                )
            yield run
    except BaseException as error:
        if not isinstance(error, Interrupted | CheckpointError):
            run.forget_start()
        if new and not run.holds_training():
            shutil.rmtree(path, ignore_errors=True)
        raise


def open_run(path: str | Path) -> RunFolder:
    """An existing run, see `records.find_run`, with a configuration that can be read. CheckpointError if it is none."""
    run = RunFolder(find_run(path))
    run.read_config()
    return run


def _fresh_folder(name: str) -> Path:
    """A new folder runs/<name>-<date>-<number>: made here, so that no other process has it."""
    stem = f"{name}-{datetime.date.today().isoformat()}"
    RUNS.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        with contextlib.suppress(FileExistsError):
            (RUNS / f"{stem}-{number}").mkdir()
            return RUNS / f"{stem}-{number}"
        number += 1


def _keep_one_before(last: Path, before: Path) -> None:
    """Give the last file a second name, by which it stays when it is replaced."""
    if last.exists():
        _link(last, before)


def _link(file: Path, name: Path) -> None:
    """Another name for a file, put in place at once; a copy where the file system has no links."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:
        shutil.copyfile(file, temporary)
    os.replace(temporary, name)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: needs what `train` wrote; it was changed since, or is gone. Put it back, or train again.",
        code="CKPT103",
    )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
