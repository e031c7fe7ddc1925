"""Data that is not in files of its own kind: arrays, .npz, torch datasets, `file.py:function`, `hf:NAME`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets import images, tables
from ane_trainer.training.datasets.batches import ArrayExamples, Batches, Examples, Subset, seeded_by
from ane_trainer.training.datasets.cells import EXACT, LARGEST
from ane_trainer.training.datasets.description import DataDescription, Task
from ane_trainer.training.datasets.splits import (
    DataOptions,
    Parts,
    divide_rows,
    in_memory,
    mean_and_std,
    standardised,
)

Arrays = tuple[Array, Array]
#: Items of a dataset whose targets are read one by one.
MOST_ITEMS = 500_000_000


def open_arrays(found: Mapping[str, Arrays], where: str, options: DataOptions) -> Parts:
    """Arrays (x, y) by split; images if x is uint8 [N, H, W] or has four axes, else numbers."""
    for split, (x, y) in found.items():
        _check_arrays(x, y, f"{where}: {split}")
    task, names, y = find_target(found["train"][1], options.task, where)
    y_by = {k: y if k == "train" else _like_train(part[1], task, names, where) for k, part in found.items()}
    rows = divide_rows(y, set(found) - {"train"}, options)
    x_by = {split: as_model_input(part[0]) for split, part in found.items()}
    train = x_by["train"][rows["train"]]
    if any(x.shape[1:] != train.shape[1:] for x in x_by.values()):
        got = ", ".join(f"{list(x.shape[1:])} in {split}" for split, x in x_by.items())
        raise DataError(f"{where}: needs examples of one shape; got {got}. Make them alike.", code="DATA105")
    is_image = train.ndim == 4
    pixel_max = 255.0 if is_image and float(train.max()) > 1.5 else 1.0
    mean, std = mean_and_std(train, per_column=train.ndim == 2, scale=pixel_max)
    description = DataDescription(
        Path(where).name, "image" if is_image else "array", task, train.shape[1:], names, mean, std, pixel_max,
        source=where,
    )  # fmt: skip
    return in_memory(x_by, y_by, rows, description)


def _check_arrays(x: Array, y: Array, where: str) -> None:
    _check_lengths(x, y, where)
    if x.dtype.kind not in "uifb":
        raise DataError(f"{where}: needs numbers as x; got dtype {x.dtype}. Convert it.", code="DATA105")
    if not x.size:
        raise DataError(f"{where}: needs numbers in x; got {list(x.shape)}. Add columns.", code="DATA105")
    if y.dtype.kind not in "uifbUSO":
        raise DataError(
            f"{where}: needs numbers or texts as y; got dtype {y.dtype}. Convert it.", code="DATA105"
        )
    for name, part in (("x", x), ("y", y)):
        check_finite(part, f"{where}: {name}")


def check_finite(values: Array, where: str) -> None:
    """DataError DATA106 for numbers that are nan, inf or beyond single precision."""
    if values.dtype.kind != "f":
        return
    if not bool(np.isfinite(values).all()):
        wrong = int((~np.isfinite(values)).sum())
        raise DataError(
            f"{where}: needs finite numbers; got {wrong} that are nan or inf. Clean the data.", code="DATA106"
        )
    if values.size and float(np.abs(values).max()) > LARGEST:
        raise DataError(
            f"{where}: needs numbers up to {LARGEST:.2g}; got {np.abs(values).max():.2g}. Take another unit.",
            code="DATA106",
        )


def _check_lengths(x: Array, y: Array, where: str) -> None:
    if not x.ndim or not y.ndim:
        raise DataError(
            f"{where}: needs arrays with examples along their first axis; got single numbers. Put them in rows.",
            code="DATA105",
        )
    if not len(x) or len(x) != len(y):
        raise DataError(
            f"{where}: needs as many targets as examples, and some; got {len(x)} and {len(y)}. Make them equal.",
            code="DATA105" if len(x) else "DATA104",
        )


def open_datasets(datasets: Mapping[str, object], where: str, options: DataOptions) -> Parts:
    """Map-style datasets by split: PIL images or bytes are scaled here, other x is taken as it is."""
    train = open_items(datasets["train"])
    opened = {k: train if k == "train" else open_items(part, train.shape) for k, part in datasets.items()}
    for split, items in opened.items():
        check_finite(items.y, f"{where}: {split}: y")
    task, found, y = find_target(train.y, options.task, where)
    y_by = {k: y if k == "train" else _like_train(part.y, task, found, where) for k, part in opened.items()}
    given = tuple(str(name) for name in getattr(datasets["train"], "classes", None) or ())
    names = given if task == "classify" and len(given) >= len(found) else found
    rows = divide_rows(y, set(opened) - {"train"}, options)
    description = DataDescription(
        Path(where).name,
        "image" if len(train.shape) == 3 else "array",
        task,
        train.shape,
        names,
        source=where,
    )
    with seeded_by([options.seed]):
        if train.take(np.arange(1))[0].dtype == np.uint8:
            mean, std = images.measure_scale(Subset(train, rows["train"]), options.seed)
            description = replace(description, mean=(mean,), std=(std,), pixel_max=255.0)
    description, y_by = standardised(description, y_by, rows)
    whole = replace(train, y=y_by["train"])
    parts: dict[str, Examples] = {k: replace(part, y=y_by[k]) for k, part in opened.items() if k != "train"}
    return Parts({**parts, **{k: Subset(whole, chosen) for k, chosen in rows.items()}}, description)


def holds_examples(dataset: Any) -> bool:
    """Whether the items of a map-style dataset are examples, rather than batches of them."""
    if isinstance(dataset, (Batches, torch.utils.data.DataLoader)) or not len(dataset):
        return False
    with seeded_by([0]):
        first = dataset[0]
    if not isinstance(first, (tuple, list)) or len(first) != 2:
        return False
    if is_image(first[0]):
        return True
    x, y = (np.shape(as_array(part)) if not isinstance(part, (tuple, list, dict)) else None for part in first)
    return x is not None and y is not None and (not x or not y or x[0] != y[0])


def holds_records(dataset: Sequence[object]) -> bool:
    """Whether the items of a map-style dataset are examples by name, whose "labels" are single numbers."""
    if isinstance(dataset, (Batches, torch.utils.data.DataLoader)) or not len(dataset):
        return False
    with seeded_by([0]):
        first = dataset[0]
    return isinstance(first, Mapping) and "labels" in first and np.shape(as_array(first["labels"])) == ()


def unscaled(data: Any, where: str) -> tuple[Examples, DataDescription]:
    """Arrays (x, y), or a dataset, as they are; images of a dataset as 0 .. 1."""
    if is_pair(data):
        x, y = (as_array(part) for part in data)
        _check_lengths(x, y, where)
        _check_numbers(where, x=x, y=y)
        examples: Examples = ArrayExamples(x, y)
        return examples, DataDescription(where, "array", "regress", x.shape[1:])
    items = open_items(data)
    _check_numbers(where, y=items.y)
    with seeded_by([0]):
        pixels = items.take(np.arange(1))[0].dtype == np.uint8
    return items, DataDescription(where, "array", "regress", items.shape, pixel_max=255.0 if pixels else 1.0)


def _check_numbers(where: str, **parts: Array) -> None:
    for name, part in parts.items():
        if part.dtype.kind not in "uifbc":
            got = f"{part.reshape(-1)[0]!r}" if part.size else str(part.dtype)
            raise DataError(f"{where}: {name} needs numbers; got {got}. Convert it.", code="DATA105")


def as_model_input(x: Array) -> Array:
    """Images with their channels first, single numbers as rows of one; bytes stay bytes, others float32."""
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim == 3 and x.dtype == np.uint8:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32))


def find_target(y: Array, task: str, where: str) -> tuple[Task, tuple[str, ...], Array]:
    """(task, names, targets) of an array: whole numbers or texts are classes, [N, K] of 0 and 1 labels."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind in "US" or y.dtype == object:
        return tables.learn_target({"y": _as_cells(y)}, ["y"], "auto", where)
    if y.ndim == 1 and task != "regress" and (y.dtype.kind in "uib" or task == "classify" or _are_classes(y)):
        values = np.unique(y)
        if len(values) == 1:
            raise DataError(
                f"{where}: needs two or more classes; all targets are {values[0]}. There is nothing to learn.",
                code="DATA116",
            )
        if _is_large(values):
            return tables.learn_target({"y": _as_cells(y)}, ["y"], "classify", where)
        if values[0] >= 0 and values[-1] < max(2 * len(values), 2) and (values == np.round(values)).all():
            names = tuple(str(number) for number in range(int(values[-1]) + 1))
            return "classify", names, y.astype(np.int64)
        return tables.learn_target({"y": y.astype(np.float64)}, ["y"], "classify", where)
    columns = y.reshape(len(y), -1)
    zero_one = bool(np.isin(columns, (0, 1)).all()) and columns.shape[1] > 1
    if task in ("auto", "classify") and zero_one and bool((columns.sum(axis=1) == 1).all()):
        return (
            "classify",
            tuple(str(k) for k in range(columns.shape[1])),
            columns.argmax(axis=1).astype(np.int64),
        )
    names = tuple(f"y{k}" for k in range(columns.shape[1]))
    multilabel = task == "multilabel" or (task == "auto" and zero_one)
    if multilabel and not bool(np.isin(columns, (0, 1)).all()):
        raise DataError(f"{where}: needs 0 and 1 in each column of labels. Mend them.", code="DATA116")
    return ("multilabel", names, columns.astype(np.float32)) if multilabel else ("regress", names, columns)


def _are_classes(y: Array) -> bool:
    """Whether floats are whole numbers of few values, as a table's classes are."""
    return y.dtype.kind == "f" and tables.find_task([y.astype(np.float64)]) == "classify"


def _like_train(y: Array, task: Task, names: tuple[str, ...], where: str) -> Array:
    """Targets of another part in the form of the training part's."""
    if task != "classify":
        return y.reshape(len(y), -1)
    if y.ndim == 2 and y.shape[1] > 1:
        y = y.argmax(axis=1)
    cells = y.reshape(-1)
    if _is_large(cells) or cells.dtype.kind not in "uifb":
        return tables.encode_classes(_as_cells(cells), names, where)
    return tables.encode_classes(cells.astype(np.float64), names, where)


def _is_large(y: Array) -> bool:
    """Whether there are whole numbers that float64 may not hold."""
    return y.dtype.kind in "ui" and len(y) > 0 and max(-int(y.min()), int(y.max())) >= EXACT


def _as_cells(y: Array) -> Array:
    """Targets as the texts of a table's column."""
    return np.array([str(value) for value in y], object)


def as_array(value: object) -> Array:
    """A tensor, list or array-like as a NumPy array; DataError DATA105 for what is none."""
    try:
        if isinstance(value, torch.Tensor):
            plain = value.detach().to_dense().cpu()
            return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
        return np.asarray(value)
    except (TypeError, ValueError, NotImplementedError) as error:  # a meta tensor, rows of unlike lengths
        raise DataError(
            f"data: needs numbers in an array; got {type(value).__name__} ({str(error).splitlines()[0].rstrip('.')}). "
            "Convert it.",
            code="DATA105",
        ) from None


def call_with_seed(function: Callable[..., object], seed: int) -> Any:
    """What a user's function returns; it gets `seed` if it has such a parameter."""
    try:
        parameters = inspect.signature(function).parameters
        inspect.signature(function).bind(**({"seed": seed} if "seed" in parameters else {}))
    except (TypeError, ValueError) as error:
        name = getattr(function, "__name__", str(function))
        raise DataError(
            f"data: needs a function that is called without arguments, or with seed; got {name} ({error}). "
            "Give its parameters defaults.",
            code="DATA115",
        ) from None
    return function(**({"seed": seed} if "seed" in parameters else {}))


@dataclass(frozen=True)
class DatasetExamples:
    """The items (x, y) of a map-style dataset, e.g. torchvision's: PIL images, arrays or tensors and labels.

    Items are fetched when taken, since transforms may draw random numbers (`draws`).
    """

    dataset: Any
    shape: tuple[int, ...]
    y: Array
    draws = True

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows_B: NDArray[np.int64]) -> tuple[Array, Array]:
        """The items' x, converted, and their targets."""
        items = [item_input(self.dataset[int(row)][0], self.shape) for row in rows_B]
        other = next((row for row, x in zip(rows_B, items, strict=True) if x.shape != self.shape), None)
        if other is not None:
            got = next(x.shape for x in items if x.shape != self.shape)
            raise DataError(
                f"dataset: needs examples of one shape, {list(self.shape)} as the first; got {list(got)} at {other}. "
                "Make them alike.",
                code="DATA105",
            )
        return np.stack(items), self.y[rows_B]

    def targets(self) -> Array:
        """The targets as they were when the dataset was opened."""
        return self.y


def open_items(dataset: Any, shape: tuple[int, ...] | None = None) -> DatasetExamples:
    """A map-style dataset as examples of the first item's shape; DataError DATA105 for items that are no pairs."""
    with seeded_by([0]):
        try:
            count = len(dataset)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"dataset: needs a length; got {type(error).__name__}: {error}. Mend its __len__.",
                code="DATA105",
            ) from None
        if count > MOST_ITEMS:
            raise DataError(
                f"dataset: needs at most {MOST_ITEMS:,} items, whose targets are held in memory; its __len__ is "
                f"{count:,}. Mend its __len__, or give batches, such as a DataLoader's, to Trainer.fit.",
                code="DATA105",
            )
        first = dataset[0] if count else None
        if not isinstance(first, (tuple, list)) or len(first) != 2:
            raise DataError(
                f"dataset: needs items (x, y); got {type(first).__name__}. Let it return pairs.",
                code="DATA105",
            )
        if shape is None:
            bands = len(first[0].getbands()) if is_image(first[0]) else 0
            shape = (bands, *first[0].size[::-1]) if bands else as_array(first[0]).shape
        if (kind := item_input(first[0], shape).dtype.kind) not in "uifb":
            got = type(first[0]).__name__ if kind == "O" else "text"
            raise DataError(f"dataset: needs numbers as x; got {got}. Convert it.", code="DATA105")
        return DatasetExamples(dataset, shape, _item_targets(dataset))


def _item_targets(dataset: Any) -> Array:
    """All targets: the attribute that torchvision's datasets have, if it agrees with the items, or one pass."""
    known = getattr(dataset, "targets", None)
    if known is not None and len(known) == len(dataset):
        found = as_array(known)
        ends = {0, len(dataset) // 2, len(dataset) - 1}
        if all(np.array_equal(as_array(dataset[row][1]), found[row]) for row in ends):
            return found
    try:
        return np.stack([as_array(dataset[row][1]) for row in range(len(dataset))])
    except ValueError as error:
        raise DataError(
            f"dataset: needs targets of one shape; {error}. Make them alike.", code="DATA105"
        ) from None


def item_input(x: object, shape: tuple[int, ...]) -> Array:
    """One item's input: a PIL image as pixels [C, H, W], anything else as an array."""
    if is_image(x):
        return images.pixels_of(x, (shape[0], shape[1], shape[2]))
    return as_array(x)


def is_pair(data: object) -> bool:
    """Whether it is (x, y) as two arrays or tensors with examples along their first axis."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    return all(hasattr(part, "dtype") and len(getattr(part, "shape", ())) for part in data)


def is_dataset(data: object) -> bool:
    """Whether it is a map-style dataset: items by number, and how many."""
    plain = isinstance(data, (tuple, list, Mapping, str, bytes)) or hasattr(data, "shape")
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not plain


def is_image(value: object) -> bool:
    """Whether it is a PIL image (without importing PIL)."""
    return hasattr(value, "getbands") and hasattr(value, "convert")
