"""Checkpoints: tensors and JSON scalars in one safetensors file with a checksum, models, optimizers' settings.

What the tensors are is described in `dispatch.state`, with the version.

A model is stored by `torch.save` and read back by PyTorch's restricted loader, which gets leave for exactly
the classes that the file names and that are nn.Modules, or functions of PyTorch, of modules already imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from ane_trainer.ane.dispatch.state import FORMAT, READABLE, STEP, incomplete
from ane_trainer.ane.errors import CheckpointError, UsageError
from ane_trainer.training.folder.results import Epoch
from ane_trainer.training.loop import Progress
from ane_trainer.utils import atomic_write

#: The file name of a checkpoint in its folder.
CHECKPOINT = "checkpoint.safetensors"

#: The checkpoint before the last one, for the case that the last one is damaged.
BEFORE = "checkpoint-before.safetensors"

#: The entry of a file's header that holds what is not tensors.
_HEADER = "ane_trainer"

T = TypeVar("T")

#: What reading a damaged or foreign model file raises, by the place of the damage.
_DAMAGED = (
    RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and JSON-able scalars, of one moment of a run. `sealed`: read with a checksum that holds."""

    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]
    sealed: bool = True


def has_step(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds the state of a compiled step; one of before training does not."""
    return any(name.startswith(STEP) for name in checkpoint.tensors)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, object] | None = None
) -> None:
    """Write one safetensors file atomically; version, checksum and `scalars` go as JSON into its header.

    The checksum covers tensors and scalars.

    The header has one entry only: safetensors writes several in an order that changes from run to run.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    sealed = checksum(plain, json.dumps(scalars))
    content = json.dumps({"version": FORMAT, "checksum": sealed, "scalars": scalars})
    atomic_write(path, save_tensors(plain, metadata={_HEADER: content}))


def checksum(tensors: Mapping[str, torch.Tensor], scalars: str = "") -> str:
    """SHA-256 over names, types, shapes and bytes, and over scalars as JSON; early files have it without these."""
    digest = hashlib.sha256(scalars.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path, *, scalars: bool) -> Checkpoint:
    """Read a file of `write_tensors`, written with or without scalars.

    CheckpointError if it is missing, damaged, of another format, or if its checksum does not match.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). "
            "Check the path; a run writes checkpoints while it trains, and its weights at the end.",
            code="CKPT102",
        ) from None
    try:
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        written = header.get("__metadata__", {}).get(_HEADER)
        foreign: dict[str, Any] = {"version": 1, "scalars": {}}  # weights of version 1, or of another program
        content = foreign if written is None and not scalars else json.loads(written)
        version, found, wanted = content["version"], content["scalars"], content.get("checksum")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"it is damaged or foreign ({error})") from None
    if version not in READABLE:
        raise CheckpointError(
            f"{path}: needs a format up to {FORMAT}; got {version}. Use the version of ane_trainer that wrote it.",
            code="CKPT103",
        )
    sums = (checksum(tensors, json.dumps(found)), checksum(tensors))
    if (version > 1 or wanted is not None) and wanted not in sums:
        raise _damaged(path, "its content is not what was written (the checksum differs)")
    return Checkpoint(tensors, found or {}, wanted is not None)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: needs a safetensors file written by ane_trainer; {why}. Use another run, or train again.",
        code="CKPT103",
    )


def check_scalars(scalars: Mapping[str, object]) -> tuple[Progress, list[Epoch]]:
    """Where training stood and its record, out of a checkpoint's scalars. CheckpointError if they make no sense."""
    progress, faults = read_fields(Progress, scalars.get("progress"), "progress")
    records = scalars.get("history")
    history: list[Epoch] = []
    for number, record in enumerate(records if isinstance(records, list) else (), 1):
        epoch, wrong = read_fields(Epoch, record, f"history {number}")
        faults += wrong
        if epoch is not None:
            faults += [f"history {number} is of epoch {epoch.epoch}"] if epoch.epoch != number else []
            history.append(dataclasses.replace(epoch, scores=_scores_of(record)))
    if not isinstance(records, list):
        faults.append("there is no history")
    elif progress is not None and progress.epoch != len(records):
        faults.append(f"{len(records)} epochs in the history, {progress.epoch} in the progress")
    if not isinstance(scalars.get("data"), dict | None):
        faults.append("the state of the data is none")
    if faults or progress is None:
        raise incomplete("checkpoint", faults)
    return progress, history


def _scores_of(record: Mapping[str, object]) -> tuple[tuple[str, float], ...]:
    """The scores in an epoch's record: `val_` names that are no fields of their own."""
    own = {field.name for field in dataclasses.fields(Epoch)}
    return tuple(
        (name.removeprefix("val_"), float(value)) for name, value in record.items()
        if name.startswith("val_") and name not in own and isinstance(value, float)
    )  # fmt: skip


def read_fields(kind: type[T], values: object, where: str) -> tuple[T | None, list[str]]:
    """A dataclass of counts and numbers out of JSON, and the faults: missing, negative, of another type."""
    if not isinstance(values, dict):
        return None, [f"there is no {where}"]
    faults, found = [], {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                faults.append(f"{where}: {field.name} is missing")
            continue
        if str(field.type).startswith("tuple"):
            continue
        value = found[field.name] = values[field.name]
        if "None" in str(field.type) and value is None:
            continue
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (count if field.type == "int" else number):
            faults.append(f"{where}: {field.name} is {value!r}")
    return (None if faults else kind(**found)), faults


def write_model(path: Path, model: nn.Module, loss: str | Callable[..., object]) -> bool:
    """Write the module and the loss; False, and no file, if they hold something that cannot be stored."""
    buffer = io.BytesIO()
    try:
        torch.save({"model": model, "loss": loss}, buffer)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    atomic_write(path, buffer.getvalue())
    return True


def read_model(path: Path) -> tuple[nn.Module, str | Callable[..., Any]]:
    """Read a file of `write_model`; CheckpointError if missing, damaged or naming what is not allowed."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the model is not stored here. Pass it: Trainer.resume(path, model=...).",
            code="CKPT105",
        )
    try:
        data = path.read_bytes()
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        with torch.serialization.safe_globals([_allowed(name, path) for name in names]):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return content["model"], content["loss"]
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path}: needs a model file written by ane_trainer; it is damaged or foreign ({error}). "
            "Pass the model: Trainer.resume(path, model=...).",
            code="CKPT103",
        ) from None


def _allowed(name: str, path: Path) -> Any:
    """The class or function called `name`, if a model may be made of it."""
    module_name, _, attribute = name.rpartition(".")
    module = sys.modules.get(module_name)
    found = getattr(module, attribute, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    functions = (types.FunctionType, types.BuiltinFunctionType)
    if isinstance(found, functions) and module_name in ("torch", "torch._C._nn", "torch.nn.functional"):
        return found
    why = (
        "its module is not imported"
        if module is None
        else "only nn.Modules and PyTorch's functions are loaded"
    )
    raise CheckpointError(
        f"{path}: the model uses {name}; {why}. "
        "Import the module that defines the model first, or pass it: Trainer.resume(path, model=...).",
        code="CKPT105",
    )


def describe_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, object]:
    """Class and hyperparameters as JSON; parameters by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    foreign = sum(id(p) not in names for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise UsageError(
            f"save: needs an optimizer over the model's parameters; got one with {foreign} tensors that are not among "
            "them (a layer was replaced?). Build it from model.parameters().",
            code="ANE104",
        )
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params" and _plain(value)},
            "params": [names[id(parameter)] for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": groups}


def rebuild_optimizer(description: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """The described optimizer, without its state; CheckpointError if it is not of torch.optim."""
    name = description["class"]
    found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise CheckpointError(
            f"optimizer: needs a class of torch.optim; got {name!r}. Pass it to Trainer.resume.",
            code="CKPT105",
        )
    parameters = dict(model.named_parameters())
    held = [name for described in description["groups"] for name in described["params"]]
    if missing := [name for name in held if name not in parameters]:
        raise CheckpointError(
            f"checkpoint: needs a model with the parameters that it trained; {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} not in {type(model).__name__}. "
            "Build the model as for the first run.",
            code="CKPT106",
        )
    groups = []
    for described in description["groups"]:
        group = {key: _untupled(value) for key, value in described.items()}
        groups.append({**group, "params": [parameters[name] for name in described["params"]]})
    build: Callable[..., torch.optim.Optimizer] = found
    return build(groups, lr=groups[0]["lr"])


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple))


def _untupled(value: object) -> Any:
    return tuple(value) if isinstance(value, list) else value
