"""Checkpoints: tensors and JSON scalars in one safetensors file, models, and optimizers' settings.

A model is stored by `torch.save` and read back by PyTorch's restricted loader, which gets leave for exactly
the classes that the file names and that are nn.Modules, or functions of PyTorch, of modules already imported.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from ane_trainer.ane.errors import CheckpointError, EnvironmentFault
from ane_trainer.utils import atomic_write

#: The file name of a checkpoint in its folder.
CHECKPOINT = "checkpoint.safetensors"

#: Written into every file; raised when older versions could not read newer files.
FORMAT = 1


#: What reading a damaged or foreign model file raises, by the place of the damage.
_DAMAGED = (
    RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and JSON-able scalars, of one moment of a run."""

    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any] | None = None
) -> None:
    """Write one safetensors file atomically; `scalars` go as JSON into its header.

    The header has one entry only: safetensors writes several in an order that changes from run to run.
    """
    content = json.dumps({"version": FORMAT, "scalars": scalars})
    header = {"format": "pt"} if scalars is None else {"ane_trainer": content}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    atomic_write(path, save_tensors(plain, metadata=header))


def read_tensors(path: Path, *, scalars: bool) -> Checkpoint:
    """Read a file of `write_tensors`, written with or without scalars.

    CheckpointError if it is missing, damaged or of another format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). "
            "Check the path; a run writes this file after each epoch and when it is interrupted.",
            code="CKPT102",
        ) from None
    try:
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        empty: dict[str, Any] = {"version": FORMAT, "scalars": {}}
        content = json.loads(header["__metadata__"]["ane_trainer"]) if scalars else empty
        version, found = content["version"], content["scalars"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: needs a safetensors file written by ane_trainer; it is damaged or foreign ({error}). "
            "Use another run, or train again.",
            code="CKPT103",
        ) from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path}: needs format {FORMAT}; got {version}. Use the version of ane_trainer that wrote it.",
            code="CKPT103",
        )
    return Checkpoint(tensors, found)


def unwritable(path: Path, error: OSError) -> EnvironmentFault:
    """The error for a folder or file that cannot be written."""
    return EnvironmentFault(
        f"{path}: needs a place that can be written; {error.strerror or error}. Choose another (--out DIR).",
        code="ANE204",
    )


def write_model(path: Path, model: nn.Module, loss: str | Callable[..., Any]) -> bool:
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


def describe_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Class and hyperparameters as JSON; parameters by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
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
    groups = []
    for described in description["groups"]:
        group = {key: _untupled(value) for key, value in described.items()}
        groups.append({**group, "params": [parameters[name] for name in described["params"]]})
    build: Callable[..., torch.optim.Optimizer] = found
    return build(groups, lr=groups[0]["lr"])


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple))


def _untupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
