"""The configuration of a training run: every option with its default, read from and written to TOML.

Options of the command line override those of a file; the resolved configuration is written to the run folder,
so that a run can be repeated and resumed from it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ane_trainer.ane.errors import UsageError
from ane_trainer.utils import did_you_mean

#: Learning rates used when none is given: common first choices for batches of about 128.
DEFAULT_LR: Mapping[str, float] = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.05}


class TrainConfig(BaseModel):
    """What `ane-trainer train` does. Unknown names and values out of range are refused with a UsageError."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    dataset: str
    model: str = "mlp"
    hidden: tuple[int, ...] | None = None
    activation: str | None = None
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(128, ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    loss: str = "cross_entropy"
    chip: str = "m4"
    device: str = "auto"
    fidelity: Literal["exact", "fast"] = "exact"
    precision: Literal["auto", "fp16", "fp32"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)
    threads: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)
    compare_fp32: bool = False

    @field_validator("hidden")
    @classmethod
    def _positive_sizes(cls, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sizes is not None and any(size < 1 for size in sizes):
            raise ValueError("sizes must be positive")
        return sizes

    @property
    def learning_rate(self) -> float:
        """`lr`, or the optimizer's default."""
        return self.lr if self.lr is not None else DEFAULT_LR[self.optimizer]

    def model_options(self) -> dict[str, Any]:
        """The keyword arguments for `build_model` that were given."""
        options = {"hidden": self.hidden, "activation": self.activation}
        return {name: value for name, value in options.items() if value is not None}

    def to_toml(self) -> str:
        """The resolved configuration as TOML; options without a value are left out."""
        return "".join(f"{name} = {_toml_value(value)}\n" for name, value in self if value is not None)


def make_config(options: Mapping[str, Any], *, where: str = "train") -> TrainConfig:
    """Check `options` (None means "not given") and build the configuration; UsageError lists all faults."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return TrainConfig(**given)
    except ValidationError as error:
        wrong = "; ".join(_explain(detail) for detail in error.errors())
        raise UsageError(f"{where}: {wrong}", code="ANE104") from None


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The options of a TOML file, unchecked; UsageError if the file cannot be read or is not TOML."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(
            f"{path}: needs a readable TOML file; {error.strerror or error}. Check the path.", code="ANE105"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML: {error}. Correct that line.", code="ANE105") from None


def load_config(path: str | Path) -> TrainConfig:
    """The configuration in a TOML file, checked."""
    return make_config(read_config_file(path), where=str(path))


def _explain(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"there is no option {name!r}. {did_you_mean(name, TrainConfig.model_fields)}"
    if detail["type"] == "missing":
        return f"{name} is missing"
    if detail["type"] == "literal_error":
        return f"{name} needs {detail['ctx']['expected']}; got {detail['input']!r}. Use one of these"
    message = detail["msg"].removeprefix("Value error, ")
    hint = f"Change --{name.replace('_', '-')}"
    return f"{name}: {message[:1].lower()}{message[1:]}; got {detail['input']!r}. {hint}"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
