"""How data is to be read and divided, and its parts: training, validation and test, seeded, each class alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets.batches import ArrayExamples, Batches, Examples, Subset
from ane_trainer.training.datasets.description import DataDescription, check_task
from ane_trainer.utils import memory_bytes

#: Share of own data that validation gets where the data has no part for it.
VAL_SPLIT = 0.1


@dataclass(frozen=True)
class DataOptions:
    """How data is read and divided.

    target      column or columns of a table to predict. task: classify, regress, multilabel, or auto.
    val_split   share of the training part that is held out for validation; None: 0.1 of own data without a
                validation part, nothing of the known datasets. test_split: likewise, for the test (0).
    size        side of the images; channels 1 or 3; None: found.
    context     tokens in a window of text; tokens: chars, bytes or auto.
    augment     changes of training images, e.g. ("flip", "shift=2").
    limit       examples of (training, other) parts at most.
    drop_last   leave out a last, smaller batch; None: of the known datasets only.
    root        where known datasets are kept; mean, std: in place of a known dataset's own.
    """

    batch_size: int = 128
    seed: int = 0
    target: tuple[str, ...] = ()
    task: str = "auto"
    val_split: float | None = None
    test_split: float = 0.0
    size: int | None = None
    channels: int | None = None
    context: int = 64
    tokens: str = "auto"
    augment: tuple[str, ...] = ()
    limit: tuple[int | None, int | None] = (None, None)
    shuffle: bool = True
    drop_last: bool | None = None
    root: str | Path | None = None
    mean: float | None = None
    std: float | None = None

    def check(self, where: str) -> None:
        """DataError DATA102 that lists all values out of range."""
        self._check_types(where)
        at_least_one = {"batch_size": self.batch_size, "size": self.size, "context": self.context}
        problems = [f"{k} >= 1; got {v}" for k, v in at_least_one.items() if v is not None and v < 1]
        problems += [f"limit >= 1; got {limit}" for limit in self.limit if limit is not None and limit < 1]
        if self.seed < 0:
            problems.append(f"seed >= 0; got {self.seed}")
        if self.std is not None and not self.std > 0:
            problems.append(f"std > 0; got {self.std}")
        if self.channels not in (None, 1, 3):
            problems.append(f"channels 1 or 3; got {self.channels}")
        for name, share in (("val_split", self.val_split), ("test_split", self.test_split)):
            if share is not None and not 0 <= share < 1:
                problems.append(f"{name} from 0 to below 1; got {share}")
        if not problems and (self.val_split or 0.0) + self.test_split >= 1:
            problems.append(
                f"val_split and test_split below 1 together; got {self.val_split} and {self.test_split}"
            )
        if problems:
            raise DataError(f"{where}: needs {'; needs '.join(problems)}.", code="DATA102")
        check_task(self.task)

    def _check_types(self, where: str) -> None:
        whole = {name: getattr(self, name) for name in ("batch_size", "seed", "size", "channels", "context")}
        whole |= {f"limit[{part}]": limit for part, limit in enumerate(self.limit)}
        real = {name: getattr(self, name) for name in ("mean", "std", "val_split", "test_split")}
        wrong = [
            f"{n} as a whole number; got {v!r}"
            for n, v in whole.items()
            if not isinstance(v, Integral | None)
        ]
        wrong += [f"{n} as a number; got {v!r}" for n, v in real.items() if not isinstance(v, Real | None)]
        if wrong:
            raise DataError(f"{where}: needs {'; needs '.join(wrong)}.", code="DATA102")

    def check_memory(self, shape: Sequence[int], where: str) -> None:
        """DataError DATA102 if a batch of examples of this shape could not be held in this machine's memory."""
        size = 4 * self.batch_size * math.prod(shape)
        if size > memory_bytes() / 16:  # a few batches wait, and each activation is about as large
            text = "x".join(map(str, shape))
            raise DataError(
                f"{where}: needs batches that fit in memory; got {self.batch_size} examples of {text}, "
                f"{size / 2**30:,.1f} GiB. Lower --size or --batch.",
                code="DATA102",
            )


#: Options of `DataOptions` that only some data takes -> which.
_KINDS = {
    "target": "of tables", "task": "of own tables and arrays", "size": "of folders of images",
    "channels": "of folders of images", "context": "of text", "tokens": "of text",
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Examples by split ("train", "val", "test") and what is known about them."""

    examples: Mapping[str, Examples]
    description: DataDescription
    is_known: bool = False
    takes: frozenset[str] = frozenset({"task"})

    def refuse_unused(self, options: DataOptions, where: str) -> None:
        """DataError DATA102 for options that mean nothing for data of this kind (`takes`: those that do)."""
        defaults = DataOptions()
        unused = [
            f"{name} ({_KINDS[name]})" for name in _KINDS
            if name not in self.takes and getattr(options, name) != getattr(defaults, name)
        ]  # fmt: skip
        if "test" in self.examples and options.test_split and self.is_known:
            unused.append("test_split (of data without a test part)")
        if unused:
            raise DataError(
                f"{where}: needs options that mean something for it; got {', '.join(unused)}. Leave them out.",
                code="DATA102",
            )


@dataclass(frozen=True)
class Splits:
    """The parts of a dataset. `test` is never used to choose anything; `val` may be."""

    train: Batches
    val: Batches | None
    test: Batches | None
    description: DataDescription

    @property
    def held_out(self) -> Batches:
        """What a trained model is judged on: the test part, else validation, else the training part."""
        return next(part for part in (self.test, self.val, self.train) if part is not None)


def divide(
    targets_N: NDArray[np.generic], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(remaining, taken) row numbers, ascending; about `fraction` of each class is taken.

    Of a class with two examples or more, at least one is on either side. Targets that are no class numbers
    ([N, K], or floats) are divided without regard to them.
    """
    count = len(targets_N)
    classes = targets_N if targets_N.ndim == 1 and targets_N.dtype.kind in "iu" else np.zeros(count, np.int64)
    random = np.random.Generator(np.random.PCG64([seed, 2]))
    taken: list[NDArray[np.int64]] = []
    for value in np.unique(classes):
        rows = random.permutation(np.flatnonzero(classes == value))
        number = round(len(rows) * fraction)
        if fraction > 0 and len(rows) > 1:
            number = min(max(number, 1), len(rows) - 1)
        taken.append(rows[:number])
    chosen = np.sort(np.concatenate(taken)) if taken else np.zeros(0, np.int64)
    return np.setdiff1d(np.arange(count), chosen, assume_unique=True), chosen


def limited(examples: Examples, limit: int | None, seed: int) -> Examples:
    """At most `limit` examples, with the classes in proportion."""
    if limit is None or limit >= len(examples):
        return examples
    _, taken = divide(examples.targets(), limit / len(examples), seed)
    order = np.random.Generator(np.random.PCG64([seed, 3])).permutation(len(taken))
    return Subset(examples, np.sort(taken[order[:limit]]))


def divide_rows(targets: Array, present: set[str], options: DataOptions) -> dict[str, NDArray[np.int64]]:
    """Row numbers of the training part by split: what it gives to validation and test where they lack."""
    rows = {"train": np.arange(len(targets))}
    shares = {
        "test": 0.0 if "test" in present else options.test_split,
        "val": 0.0 if "val" in present else VAL_SPLIT if options.val_split is None else options.val_split,
    }
    for split, share in shares.items():
        if share:
            rest, taken = divide(targets[rows["train"]], share, options.seed)
            if len(taken):
                rows["train"], rows[split] = rows["train"][rest], rows["train"][taken]
    return rows


def in_memory(
    x_by: Mapping[str, Array], y_by: Mapping[str, Array], rows: Mapping[str, NDArray[np.int64]],
    description: DataDescription,
) -> Parts:  # fmt: skip
    """The parts in memory; numbers to be regressed standardised by the training rows."""
    description, kept = standardised(description, y_by, rows)
    whole = ArrayExamples(x_by["train"], kept["train"])
    parts: dict[str, Examples] = {
        split: ArrayExamples(x, kept[split]) for split, x in x_by.items() if split != "train"
    }
    return Parts({**parts, **{split: Subset(whole, chosen) for split, chosen in rows.items()}}, description)


def standardised(
    description: DataDescription, y_by: Mapping[str, Array], rows: Mapping[str, NDArray[np.int64]]
) -> tuple[DataDescription, dict[str, Array]]:
    """Targets of a regression as (y - mean) / std of the training rows, float32; others as they are."""
    if description.task != "regress":
        return description, dict(y_by)
    mean, std = mean_and_std(y_by["train"][rows["train"]], per_column=True)
    kept: dict[str, Array] = {k: ((y - mean) / std).astype(np.float32) for k, y in y_by.items()}
    return replace(description, target_mean=mean, target_std=std), kept


def mean_and_std(
    values: Array, *, per_column: bool, scale: float = 1.0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of values / scale, over all or per column; 1 where all are equal."""
    axis = 0 if per_column else None
    mean = values.mean(axis=axis, dtype=np.float64) / scale
    std = values.std(axis=axis, dtype=np.float64) / scale
    std = np.where(std > 1e-12 * np.maximum(np.abs(mean), 1.0), std, 1.0)
    return tuple(np.atleast_1d(mean).tolist()), tuple(np.atleast_1d(std).tolist())
