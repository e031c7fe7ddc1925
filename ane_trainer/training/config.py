"""The configuration of a training run: every option with its default, read from and written to TOML.

Options of the command line override those of a file; the resolved configuration is written to the run folder,
so that a run can be repeated and resumed from it.
"""

from __future__ import annotations

import contextlib
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ane_trainer.ane.errors import UsageError
from ane_trainer.utils import Interval, did_you_mean, read_duration, read_interval

#: Learning rates used when none is given: common first choices for batches of about 128.
DEFAULT_LR: Mapping[str, float] = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.05}

#: What a model takes where an option is not given.
MODEL_DEFAULTS: Mapping[str, dict[str, object]] = {
    "mlp": {"hidden": (256,), "activation": "gelu"},
    "cnn": {"activation": "relu"},
    "transformer": {"activation": "gelu"},
    "gpt": {"activation": "gelu"},
}

#: Options that may change when a run goes on: the weights do not depend on them, or they extend the run.
RESUMABLE = frozenset(
    "blocks compare_fp32 device epochs keep_every log patience recompute save_every shards threads time_limit".split()
)

#: What `build_model` says of every model itself.
_OF_MODELS = ("name", "in_shape", "num_classes", "framework", "seed")
#: Groups of options in the help of `train`; an option that names none is under "Training".
_MODEL: dict[str, Any] = {"panel": "Data and model"}
_WHERE: dict[str, Any] = {"panel": "Where it runs"}


class TrainConfig(BaseModel):
    """What `ane-trainer train` does. Unknown names and values out of range are refused with a UsageError.

    A field here is an option everywhere: in `config.toml`, in a file for `--config`, and on the command line,
    where its description is the help (`commands.options.takes_train_options`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    dataset: str = Field(
        description="A known name (mnist, cifar-10, ...), a folder of images, a CSV, Parquet, .npz or text file, "
        "hf:NAME, file.py:function.", json_schema_extra=_MODEL,
    )  # fmt: skip
    target: tuple[str, ...] | None = Field(
        None, description="Column or columns of a table to predict.", json_schema_extra=_MODEL
    )
    task: Literal["auto", "classify", "regress", "multilabel"] = Field(
        "auto", description="What is predicted, where the data leaves it open.", json_schema_extra=_MODEL
    )
    val_split: float | None = Field(
        None, ge=0, lt=1, json_schema_extra=_MODEL,
        description="Share of the training data held out for validation (default: 0.1 of own data without any).",
    )  # fmt: skip
    test_split: float = Field(
        0.0, ge=0, lt=1, description="Likewise, for a test at the end.", json_schema_extra=_MODEL
    )
    size: int | None = Field(
        None, ge=1, description="Side of own images in pixels (default: found).", json_schema_extra=_MODEL
    )
    channels: int | None = Field(
        None, description="1 for grey, 3 for colour (default: found).", json_schema_extra=_MODEL
    )
    context: int = Field(64, ge=1, description="Tokens in a window of text.", json_schema_extra=_MODEL)
    tokens: Literal["auto", "chars", "bytes"] = Field(
        "auto", description="What a token of text is.", json_schema_extra=_MODEL
    )
    augment: tuple[str, ...] | None = Field(
        None, json_schema_extra=_MODEL,
        description="Random changes of training images: shift, flip, crop, rotate, erase, mixup, e.g. flip,shift=2.",
    )  # fmt: skip
    last_batch: Literal["auto", "train", "drop"] = Field(
        "auto",
        description="A last, smaller batch; auto drops it for known datasets.",
        json_schema_extra=_MODEL,
    )
    model: str = Field(
        "auto", json_schema_extra=_MODEL,
        description="mlp, cnn, transformer, gpt, or path/to/file.py:ClassName; auto goes by the data.",
    )  # fmt: skip
    hidden: tuple[int, ...] | None = Field(
        None,
        description="Widths of the mlp's hidden layers, e.g. 512,256 (default: 256).",
        json_schema_extra=_MODEL,
    )
    activation: str | None = Field(
        None, description="gelu, relu, ... (default: gelu; cnn: relu).", json_schema_extra=_MODEL
    )
    model_arg: dict[str, Any] = Field(
        {}, description="Argument of the model's constructor, as often as needed, e.g. width=16.",
        json_schema_extra=_MODEL,
    )  # fmt: skip
    epochs: int = Field(5, ge=1, description="Passes over the data; with --resume: in all.")
    batch_size: int | Literal["auto"] = Field(
        128, description="Examples a step; auto: what is fastest by the cost model."
    )
    limit: int | None = Field(None, ge=1, description="Use only the first so many examples of each split.")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="How weights are updated.")
    lr: float | Literal["auto"] | None = Field(
        None, description="Learning rate (default: 0.001; sgd: 0.05); auto: found by a short sweep."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Of sgd.")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Pull of the weights to zero.")
    clip_grad_norm: float | None = Field(
        None, gt=0, le=65504, description="Scale all gradients together down to this norm."
    )
    clip_grad_value: float | None = Field(
        None, gt=0, le=65504, description="Cut each entry of the gradients to within this number."
    )
    accumulate: int = Field(1, ge=1, description="Batches whose gradients are averaged before an update.")
    schedule: Literal["constant", "cosine", "linear", "one-cycle", "step", "plateau"] = Field(
        "constant", description="How the learning rate goes over the training."
    )
    warmup: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0 at first.")
    lr_floor: float = Field(
        0.0, ge=0, le=1, description="Share of the learning rate that the schedule keeps."
    )
    lr_decay: float = Field(
        0.1, gt=0, lt=1, description="Of step and plateau: what the learning rate is times."
    )
    lr_every: int = Field(10, ge=1, description="Of step: epochs between two decays.")
    lr_patience: int = Field(
        3, ge=0, description="Of plateau: epochs without a better result before a decay."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many epochs without a better result (default: never)."
    )
    min_delta: float = Field(0.0, ge=0, description="What counts as better, for --patience.")
    monitor: Literal["auto", "val_accuracy", "val_loss", "train_loss"] = Field(
        "auto", description="The result that is watched; auto: the first of these that is known."
    )
    best: bool = Field(False, description="End with the weights of the best epoch, not of the last.")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Evaluate and end with an average of the weights, e.g. 0.999 (default: off).",
    )
    freeze: tuple[str, ...] = Field(
        (), description="Parameters that stay as they are, by name or pattern, e.g. 'conv*,head.bias'."
    )
    time_limit: str | None = Field(
        None, description="Stop after so long: 90s, 10min, 2h (default: never); --resume goes on."
    )
    loss: str = Field(
        "auto", description="What is minimised: cross_entropy, mse, ...; auto goes by the data."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of the weights and the order of the data.")
    compare_fp32: bool = Field(False, description="Train with plain PyTorch too, and show its accuracy.")
    save_every: str | None = Field(
        None,
        description="Write a checkpoint each so many steps, or minutes as in 10min; always after an epoch.",
    )
    keep_every: int | None = Field(
        None, ge=1, description="Keep the checkpoint of each so many epochs for good."
    )
    metrics: tuple[str, ...] = Field(
        (),
        description="Scores by torchmetrics beside accuracy, each epoch, e.g. auroc,f1; of numbers r2, mae.",
    )
    log: tuple[str, ...] = Field(
        (), description="Trackers that get the numbers, e.g. tensorboard,wandb; also mlflow, trackio."
    )
    chip: str = Field("m4", description="Whose arithmetic and limits: m1 ... m6.", json_schema_extra=_WHERE)
    device: str = Field(
        "auto", description="auto, sim, e5rt, coreai, cpu (plain PyTorch fp32).", json_schema_extra=_WHERE
    )
    fidelity: Literal["exact", "fast"] = Field(
        "exact", description="Arithmetic of the simulator.", json_schema_extra=_WHERE
    )
    precision: Literal["auto", "fp16", "fp32"] = Field(
        "auto", description="fp32 where the device has it.", json_schema_extra=_WHERE
    )
    threads: int | None = Field(
        None, ge=1, description="Of the simulator; results do not depend on it (default: all cores).",
        json_schema_extra=_WHERE,
    )  # fmt: skip

    shards: int | None = Field(
        None, ge=1, json_schema_extra=_WHERE,
        description="Parts of a batch that processes share (default: one for each that torchrun started).",
    )  # fmt: skip
    blocks: int | Literal["auto", "off"] = Field(
        "auto", json_schema_extra=_WHERE,
        description="Layers that are one program: a number, off (the step is one), auto (as the chip needs it).",
    )  # fmt: skip
    recompute: bool = Field(
        False, json_schema_extra=_WHERE,
        description="Compute what lies within layers again in the backward pass: less memory, same result.",
    )  # fmt: skip
    optimizer_on: Literal["auto", "engine", "host"] = Field(
        "auto", description="Where weights are updated; the host does it in fp32.", json_schema_extra=_WHERE
    )
    fallback: Literal["none", "cpu"] = Field(
        "none", description="cpu: run there what does not fit the chip.", json_schema_extra=_WHERE
    )

    @field_validator("save_every", mode="before")
    @classmethod
    def _interval(cls, value: object) -> object:
        text = str(value) if isinstance(value, int) else value
        if isinstance(text, str):
            read_interval(text)
        return text

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: object, info: ValidationInfo) -> object:
        kinds = str(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and ("int" in kinds or "float" in kinds):
            raise ValueError("needs a number")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("needs text without zero bytes")
        return value

    @field_validator("batch_size", "blocks")
    @classmethod
    def _some_examples(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("input should be greater than or equal to 1")
        return value

    @field_validator("lr")
    @classmethod
    def _finite_rate(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 < value < math.inf:
            raise ValueError("input should be a finite number greater than 0")
        return value

    @field_validator("time_limit")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            read_duration(value)
        return value

    @property
    def seconds_allowed(self) -> float:
        """`time_limit` in seconds; infinite where there is none."""
        return read_duration(self.time_limit) if self.time_limit is not None else math.inf

    @property
    def save_interval(self) -> Interval:
        """`save_every` as numbers."""
        return read_interval(self.save_every or "")

    @field_validator("hidden", "target", "augment", "freeze", "log", "metrics", mode="before")
    @classmethod
    def _parts_as_typed(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("model_arg", mode="before")
    @classmethod
    def _arguments_as_typed(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        pairs = [str(text).partition("=") for text in value]
        if any(not (name.isidentifier() and equals) for name, equals, _ in pairs):
            raise ValueError("needs NAME=VALUE, e.g. width=16")
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise ValueError("needs each name once")
        if taken := [name for name, _, _ in pairs if name in _OF_MODELS]:
            raise ValueError(
                f"cannot pass {taken[0]}, which every model has: wrap it in a function that passes it"
            )
        return {name: _literal(text) for name, _, text in pairs}

    @field_validator("hidden")
    @classmethod
    def _positive_sizes(cls, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sizes is not None and any(size < 1 for size in sizes):
            raise ValueError("sizes must be positive")
        return sizes

    @property
    def examples_a_step(self) -> int:
        """`batch_size`, or 128 where it is still to be found."""
        return self.batch_size if isinstance(self.batch_size, int) else 128

    @property
    def learning_rate(self) -> float:
        """`lr`, or the optimizer's default where it is not given or still to be found."""
        return self.lr if isinstance(self.lr, float) else DEFAULT_LR[self.optimizer]

    def resolved(self) -> TrainConfig:
        """The same with the defaults that depend on other options written out, for a run to be repeated by."""
        defaults = MODEL_DEFAULTS.get(self.model, {})
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return self.model_copy(update={"lr": self.lr if self.lr == "auto" else self.learning_rate, **missing})

    def model_options(self) -> dict[str, Any]:
        """The keyword arguments for `build_model` that were given."""
        options = {"hidden": self.hidden, "activation": self.activation}
        return {**{name: value for name, value in options.items() if value is not None}, **self.model_arg}

    def to_toml(self) -> str:
        """The resolved configuration as TOML; an option without a value is a comment."""
        return "".join(
            f"{name} = {toml_value(value)}\n" if value is not None else f"# {name} is not set\n"
            for name, value in self
        )


def make_config(options: Mapping[str, Any], *, where: str = "train") -> TrainConfig:
    """Check `options` (None means "not given") and build the configuration; UsageError lists all faults."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return TrainConfig(**given)
    except ValidationError as error:
        wrong = " ".join(dict.fromkeys(map(_explain, error.errors())))
        raise UsageError(f"{where}: {wrong}", code="ANE104") from None


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The options of a TOML file, unchecked; UsageError if the file cannot be read or is not TOML."""
    try:
        with open(path, "rb") as file:
            return tomllib.loads(file.read().decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(
            f"{path}: needs a readable TOML file; {error.strerror or error}. Check the path.", code="ANE105"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {error}. Correct that line.", code="ANE105") from None


def load_config(path: str | Path) -> TrainConfig:
    """The configuration in a TOML file, checked."""
    return make_config(read_config_file(path), where=str(path))


#: Options that take a number or a word -> what they need.
_WORDS_OR_NUMBERS = {
    "lr": "a number or 'auto'", "batch_size": "a whole number or 'auto'",
    "blocks": "a whole number, 'auto' or 'off'",
}  # fmt: skip


def _explain(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    option = str(detail["loc"][0])
    words = _WORDS_OR_NUMBERS.get(option)
    if words is not None and detail["type"] != "value_error":
        return (
            f"{option} needs {words}; got {_as_typed(detail['input'])}. Change --{option.replace('_', '-')}."
        )
    if detail["type"] == "extra_forbidden":
        return f"there is no option {name!r}. {did_you_mean(name, TrainConfig.model_fields)}"
    if detail["type"] == "missing":
        return f"{name} is missing."
    if detail["type"] == "literal_error":
        return (
            f"{name} needs {detail['ctx']['expected']}; got {_as_typed(detail['input'])}. Use one of these."
        )
    message = detail["msg"].removeprefix("Value error, ")
    hint = f"Change --{option.replace('_', '-')}."
    return f"{name}: {message[:1].lower()}{message[1:]}; got {_as_typed(detail['input'])}. {hint}"


def _literal(text: str) -> object:
    """A value of the command line as Python or TOML writes it (16, 0.5, true, [1, 2]), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False}.get(text, text)


def _as_typed(value: object) -> str:
    """A value for a message; a number that came as text stays as it was typed."""
    with contextlib.suppress(ValueError, TypeError):
        float(str(value))
        return str(value)
    return repr(value)


def toml_value(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {toml_value(item)}' for name, item in value.items())}}}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
