"""`DataDescription`: what was found out about data when it was opened, and how raw examples become numbers.

A run keeps it as JSON, so that predicting, evaluating and exporting treat new examples as training did.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.utils import printable

Kind = Literal["image", "table", "text", "array"]
Task = Literal["classify", "regress", "multilabel", "next-token"]

KINDS: tuple[Kind, ...] = ("image", "table", "text", "array")
TASKS: tuple[Task, ...] = ("classify", "regress", "multilabel", "next-token")


@dataclass(frozen=True)
class Column:
    """A column of a table as the model sees it.

    number, date  one value, (value - mean) / std (a date counts in days since 1970); a missing one is 0.
    category      one value per entry of `categories`, 1 for the row's and 0 for the others.
    missing       one more value: 1 where the table has none, else 0.
    """

    name: str
    kind: Literal["number", "date", "category"]
    mean: float = 0.0
    std: float = 1.0
    categories: tuple[str, ...] = ()
    missing: bool = False

    @property
    def width(self) -> int:
        """How many of the model's inputs the column takes."""
        return (len(self.categories) if self.kind == "category" else 1) + self.missing


@dataclass(frozen=True)
class DataDescription:
    """Kind, shape, classes and preprocessing of a dataset.

    in_shape       one example as the model gets it: [C, H, W], [F], or [T] for text.
    class_names    by class number; the names of the labels (multilabel) or of the numbers (regress).
    mean, std      an image or array value v is fed as (v / pixel_max - mean) / std; one number, or one for
                   each channel (image) or column (array).
    columns        of a table, in the order of the inputs.
    target         the column or columns that are predicted; a number y is trained as
                   (y - target_mean) / target_std.
    vocabulary     of text: a token's number is its place; () means bytes.
    examples       number by split. notes: what was left out or decided, a sentence each.
    content        a fingerprint of what it holds, by which other data of the same form is noticed.
    """

    name: str
    kind: Kind
    task: Task
    in_shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pixel_max: float = 1.0
    columns: tuple[Column, ...] = ()
    target: tuple[str, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    vocabulary: tuple[str, ...] = ()
    source: str = ""
    examples: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    content: str = ""

    @property
    def num_outputs(self) -> int:
        """How many numbers the model returns for an example (for text: for each position)."""
        if self.task == "next-token":
            return len(self.vocabulary) or 256
        return len(self.class_names)

    @property
    def default_loss(self) -> str:
        """The loss that fits the task."""
        return {"regress": "mse", "multilabel": "bce_with_logits"}.get(self.task, "cross_entropy")

    @property
    def default_model(self) -> str:
        """The ready network that fits the kind: small images and tables mlp, larger images cnn, text gpt."""
        if self.kind == "text":
            return "gpt"
        large = len(self.in_shape) == 3 and math.prod(self.in_shape) > 28 * 28
        return "cnn" if large and min(self.in_shape[1:]) >= 4 else "mlp"

    @property
    def is_scaled(self) -> bool:
        """Whether values are changed before the model sees them; tokens and encoded tables are not."""
        return (self.pixel_max, self.mean, self.std) != (1.0, (0.0,), (1.0,))

    def normalise(self, values_BX: Array) -> Array:
        """Pixels or numbers [B, *in_shape] as the float32 values that the model sees; if not scaled, as they are."""
        if not self.is_scaled:
            return values_BX if values_BX.dtype != np.float64 else values_BX.astype(np.float32)
        x_BX = values_BX.astype(np.float32)
        if self.pixel_max != 1.0:
            x_BX /= np.float32(self.pixel_max)
        if self.mean != (0.0,):
            x_BX -= self._per_channel(self.mean)
        if self.std != (1.0,):
            x_BX /= self._per_channel(self.std)
        return x_BX

    def _per_channel(self, numbers: Sequence[float]) -> NDArray[np.float32] | np.float32:
        if len(numbers) == 1:
            return np.float32(numbers[0])
        return np.asarray(numbers, np.float32).reshape(-1, *([1] * (len(self.in_shape) - 1)))

    def summary(self) -> str:
        """One line for the console: size, classes, splits, where it comes from."""
        counts = " / ".join(f"{count:,} {split}" for split, count in self.examples.items())
        origin = f", from {self.source}" if self.source not in ("", self.name) else ""
        scaled = ""
        if self.is_scaled and len(self.mean) == 1:
            scaled = f", normalised by mean {self.mean[0]:.4g} and deviation {self.std[0]:.4g}"
        return printable(f"{self.name}  {counts}, {self._what()}{scaled}{origin}")

    def _what(self) -> str:
        if self.kind == "image":
            channels, height, width = self.in_shape
            shape = f"{height}x{width} {'grey' if channels == 1 else 'colour' if channels == 3 else channels}"
        elif self.kind == "text":
            shape = f"windows of {self.in_shape[0]}"
        else:
            width = len(self.columns) or math.prod(self.in_shape)
            shape = f"{width:,} column{'s' * (width != 1)}"
        count = len(self.class_names)
        names = ", ".join(n if len(n) <= 40 else f"{n[:37]}..." for n in self.class_names[:4])
        more = ", ..." if count > 4 else ""
        return {
            "classify": f"{shape}, {count} classes ({names}{more})",
            "multilabel": f"{shape}, {count} labels ({names}{more})",
            "regress": f"{shape}, predicts {names}{more}",
            "next-token": f"{shape} {'characters' if self.vocabulary else 'bytes'}, "
            f"{self.num_outputs} different ones",
        }[self.task]

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> DataDescription:
        """What `to_json` returned; ValueError if it is something else."""
        if not isinstance(value, Mapping):
            raise ValueError(f"needs an object; got {type(value).__name__}")
        known = {item.name for item in dataclasses.fields(cls)}
        try:
            given = {key: _tupled(item) for key, item in value.items() if key in known}
            given["columns"] = tuple(
                Column(**{k: _tupled(v) for k, v in column.items()}) for column in value.get("columns", ())
            )
            found = cls(**given)
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None
        if found.kind not in KINDS or found.task not in TASKS or not _sizes(found.in_shape):
            raise ValueError(
                f"unknown kind, task or shape: {found.kind!r}, {found.task!r}, {found.in_shape!r}"
            )
        return found


def one_hot(labels_B: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Class numbers [B] as rows [B, count] with a single 1."""
    return np.eye(count, dtype=np.float32)[labels_B]


def check_task(task: str) -> None:
    """DataError DATA102 unless the task is "auto" or one that there is."""
    if task not in ("auto", *TASKS):
        raise DataError(f"task: needs auto, {', '.join(TASKS)}; got {task!r}. Choose one.", code="DATA102")


def _tupled(value: object) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _sizes(shape: object) -> bool:
    return isinstance(shape, tuple) and bool(shape) and all(isinstance(n, int) and n > 0 for n in shape)
