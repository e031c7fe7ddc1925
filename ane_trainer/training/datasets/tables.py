"""Tables, from files or data frames: columns become numbers by rules learnt on the training rows.

A column of numbers is standardised, a column of text becomes one input per category, dates count in days;
a missing value is 0 (the mean) and sets an input of its own. See `Column` and `DataDescription`.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets.cells import (
    LARGEST,
    cell_text,
    is_beyond,
    is_nested,
    like_a_number,
    number_of,
    typed_column,
)
from ane_trainer.training.datasets.description import Column, DataDescription, Task
from ane_trainer.training.datasets.splits import DataOptions, Parts, divide_rows, in_memory
from ane_trainer.training.datasets.table_files import SUFFIXES, Table, read_table
from ane_trainer.utils import did_you_mean

__all__ = ["SUFFIXES", "Table", "open_tables", "read_table"]

#: A column of text with more different values keeps the most common ones.
MOST_CATEGORIES = 64
#: Whole numbers with at most so many different values are classes if they are the target.
MOST_CLASSES = 32
#: Names that columns of row numbers have: id, customer_id, userId, index, row, no, Nr., #.
_NUMBER = re.compile(
    r"(?:^|[ _-])(?i:ids?|index|idx|rows?|row_?num(ber)?|no|nr|num|number)[.]?$|[a-z](Id|ID)$|^#$"
)
_SAME = "the same value in all training rows"
#: The column that is predicted if none is named.
USUAL_TARGETS = ("target", "label", "class", "y")


def open_tables(found: Mapping[str, Table], where: str, options: DataOptions) -> Parts:
    """Tables by split ("train", perhaps "val", "test"), their columns encoded by the training rows."""
    target = choose_target(found["train"], options.target, where)
    whole, notes = _with_target(found, target, where)
    task, names, y = learn_target(whole["train"], target, options.task, where)
    y_by = {"train": y}
    for split in set(whole) - {"train"}:
        cells = [whole[split][name] for name in target]
        y_by[split] = (
            encode_classes(cells[0], names, where) if task == "classify" else np.stack(cells, axis=1)
        )
    rows = divide_rows(y, set(whole) - {"train"}, options)
    inputs = {split: {k: v for k, v in table.items() if k not in target} for split, table in whole.items()}
    columns, left_out = learn_columns(inputs["train"], rows["train"])
    if not columns:
        got = "; ".join(left_out) or "there is none"
        raise DataError(
            f"{where}: needs a column besides the target that can be used; {got}. Add one.", code="DATA116"
        )
    x_by = {split: encode_columns(table, columns, where) for split, table in inputs.items()}
    description = DataDescription(
        Path(where).name, "table", task, (x_by["train"].shape[1],), names, columns=columns, target=target,
        source=where, notes=(*notes, *left_out),
    )  # fmt: skip
    return replace(in_memory(x_by, y_by, rows, description), takes=frozenset({"target", "task"}))


def _with_target(
    found: Mapping[str, Table], target: Sequence[str], where: str
) -> tuple[dict[str, Table], list[str]]:
    """The rows that have a target, by split, and notes about the others; DataError DATA104 if none has."""
    whole, notes = {}, []
    for split, table in found.items():
        choose_target(table, target, f"{where}: {split}")
        whole[split], missing = without_missing(table, target)
        if missing:
            notes.append(f"{missing} rows of {split} without {', '.join(target)} are left out")
        if not rows_of(whole[split]):
            raise DataError(
                f"{where}: {split} needs rows with a target; got none. Fill it in.", code="DATA104"
            )
    return whole, notes


def is_frame(data: object) -> bool:
    """Whether it is a pandas or polars data frame (without importing them)."""
    return hasattr(data, "columns") and hasattr(data, "dtypes")


def table_of(frame: Mapping[str, object] | Any) -> Table:
    """A mapping of columns, or a pandas or polars data frame, as a table."""
    names = list(frame) if isinstance(frame, Mapping) else list(frame.columns)
    return {str(name): typed_column(np.asarray(frame[name]).tolist()) for name in names}


def choose_target(table: Table, target: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of the columns to predict; DataError DATA116 if they are unknown, or none is named or usual."""
    if not target:
        usual = [name for name in table if name.lower() in USUAL_TARGETS]
        if len(usual) == 1:
            return (usual[0],)
        raise DataError(
            f"{where}: needs the column to predict; its columns are {', '.join(table)}. Do: --target COLUMN.",
            code="DATA116",
        )
    for name in target:
        if name not in table:
            raise DataError(
                f"{where}: needs a column of the file as target; got {name!r}. "
                f"{did_you_mean(name, table) if table else 'It has no columns.'}",
                code="DATA116",
            )
    if twice := [name for name, count in Counter(target).items() if count > 1]:
        raise DataError(
            f"{where}: needs each target once; got {twice[0]!r} twice. Leave one out.", code="DATA116"
        )
    return tuple(target)


def learn_columns(table: Table, rows: NDArray[np.int64]) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """How each column is turned into inputs, from the training rows; and which are left out, and why."""
    columns, reasons, notes = [], dict[str, list[str]](), []
    for name, cells in table.items():
        column = "row numbers" if counts_rows(name, cells) else _learn_column(name, cells[rows])
        if not isinstance(column, Column):
            reasons.setdefault(column, []).append(repr(name))
            continue
        columns.append(column)
        if (shown := next(filter(like_a_number, column.categories), None)) is not None:
            notes.append(f"column {name!r} holds texts such as {shown!r}: each is a category, not a number")
    for reason, names in reasons.items():
        one, more = len(names) == 1, f" and {len(names) - 4:,} more" if len(names) > 5 else ""
        listed = ", ".join(names[: 4 if more else None]) + more
        notes.append(f"{'column' if one else 'columns'} {listed} {'is' if one else 'are'} left out: {reason}")
    return tuple(columns), tuple(notes)


def counts_rows(name: str, cells: Array) -> bool:
    """Whether a column numbers the rows of a file: by its name, and by one more in each row."""
    if not _NUMBER.search(name) or cells.dtype != np.float64 or len(cells) < 3:
        return False
    return bool((np.diff(cells) == 1.0).all())


def _learn_column(name: str, cells: Array) -> Column | str:
    """The column's rule, or the reason to leave it out."""
    if name in ("Unnamed: 0", "__index_level_0__"):
        return "row numbers"
    if not name:
        return "no name"
    if cells.dtype == np.float64:
        return _learn_numbers(name, "number", cells)
    present = [cell for cell in cells if cell]
    if not present:
        return "no value in the training rows"
    if is_nested(present[0]):
        return "lists or records, not single values"
    days = np.array([_days(cell) for cell in cells])
    if np.isfinite(days).sum() == len(present):
        return _learn_numbers(name, "date", days)
    _refuse_strays(name, present)
    counts = Counter(present)
    if len(counts) > max(10, 0.5 * len(present)):
        return f"{len(counts)} different texts in {len(present)} rows, such as {present[0]!r}{_advice(present[0])}"
    if len(counts) == 1 and len(present) == len(cells):
        return _SAME
    common = sorted(value for value, _ in counts.most_common(MOST_CATEGORIES))
    return Column(name, "category", categories=tuple(common), missing=len(present) < len(cells))


def _advice(cell: str) -> str:
    """What to do about a text that is meant as a number or a date."""
    if like_a_number(cell):
        return "; write numbers as 1234.5"
    return "; write dates as 2024-12-31" if re.fullmatch(r"\d{1,4}([./-])\d{1,2}\1\d{1,4}.*", cell) else ""


def _refuse_strays(name: str, present: Sequence[str]) -> None:
    """DataError DATA116 for a column of numbers in which a few cells are something else, or any is too large."""
    wrong = [cell for cell in present if number_of(cell) is None]
    if wrong and all(map(is_beyond, wrong)):
        raise DataError(
            f"column {name!r}: needs numbers that single precision holds, up to {LARGEST:.2g}; got {wrong[0]!r}. Mend "
            "the cell, leave it empty, or give the column another unit.",
            code="DATA116",
        )
    if 0 < len(wrong) < 0.1 * len(present):
        raise DataError(
            f"column {name!r}: needs numbers in all rows; got {wrong[0]!r} beside {len(present) - len(wrong)} "
            "numbers. Mend the cell, or leave it empty.",
            code="DATA116",
        )


def _learn_numbers(name: str, kind: Any, values: NDArray[np.float64]) -> Column | str:
    present = values[np.isfinite(values)]
    missing = len(present) < len(values)
    if not len(present):
        return "no value in the training rows"
    mean, std = float(present.mean()), float(present.std())
    if std <= 1e-12 * max(abs(mean), 1.0):
        if not missing:
            return _SAME
        std = 1.0
    return Column(name, kind, mean, std, missing=missing)


def encode_columns(table: Table, columns: Sequence[Column], where: str) -> NDArray[np.float32]:
    """The model's inputs [N, F]; DataError DATA116 for a missing column, or text where numbers are needed."""
    absent = [column.name for column in columns if column.name not in table]
    if absent:
        raise DataError(
            f"{where}: needs the columns of training; {', '.join(map(repr, absent))} not there. Add them.",
            code="DATA116",
        )
    return np.concatenate([_encode(table[column.name], column, where) for column in columns], axis=1)


def _encode(cells: Array, column: Column, where: str) -> NDArray[np.float32]:
    if column.kind == "category":
        texts = [cell_text(cell) for cell in cells]
        values = np.array([[text == known for known in column.categories] for text in texts], np.float32)
        absent = np.array([not text for text in texts])
    else:
        numbers = cells if cells.dtype == np.float64 else np.array([_days(c) for c in cells])
        if column.kind == "number" and cells.dtype != np.float64:
            wrong = next((cell for cell in cells if cell and number_of(cell) is None), None)
            if wrong is not None:
                raise DataError(
                    f"{where}: column {column.name!r} needs numbers, as in training; got {wrong!r}. Mend the cell.",
                    code="DATA116",
                )
        absent = ~np.isfinite(numbers)
        values = np.where(absent, 0.0, (numbers - column.mean) / column.std).astype(np.float32)[:, None]
    values = values.reshape(len(cells), -1)
    return np.concatenate([values, absent[:, None].astype(np.float32)], axis=1) if column.missing else values


def learn_target(
    table: Table, names: Sequence[str], task: str, where: str
) -> tuple[Task, tuple[str, ...], Array]:
    """(task, class or label names, y [N] or [N, K]) of the columns `names`, which have no missing values.

    With "auto", several columns of zeros and ones are labels, a column of text or of few whole numbers is
    classes, other numbers are to be regressed.
    """
    columns = [table[name] for name in names]
    numeric = all(column.dtype == np.float64 for column in columns)
    for name, column in zip(names, columns, strict=True):
        if column.dtype != np.float64:
            _refuse_strays(name, column.tolist())
        if len(column) > 1 and len(set(column.tolist())) == 1:
            raise DataError(
                f"{where}: needs a target with different values; got {cell_text(column[0])!r} in all rows of {name!r}. "
                "There is nothing to learn.",
                code="DATA116",
            )
    if task == "auto":
        task = find_task(columns) if numeric else "classify"
        for name, column in zip(names, columns, strict=True):
            _refuse_no_classes(column, f"{where}: column {name!r}")
    if task == "classify":
        if len(names) > 1:
            raise DataError(
                f"{where}: needs one column to classify; got {', '.join(names)}. Name one, or use columns of 0 and 1.",
                code="DATA116",
            )
        classes = tuple(cell_text(value) for value in np.unique(columns[0]).tolist())
        return "classify", classes, encode_classes(columns[0], classes, where)
    if not numeric:
        raise DataError(f"{where}: needs numbers to {task}; got text in {', '.join(names)}.", code="DATA116")
    if task == "multilabel" and not all(set(np.unique(column)) <= {0.0, 1.0} for column in columns):
        raise DataError(f"{where}: needs 0 and 1 in each column of labels. Mend them.", code="DATA116")
    y_NK = np.stack(columns, axis=1).astype(np.float32 if task == "multilabel" else np.float64)
    return ("multilabel" if task == "multilabel" else "regress"), tuple(names), y_NK


def _refuse_no_classes(column: Array, where: str) -> None:
    """DataError DATA116 for texts that are no classes: numbers and dates in another form, lists, one for each row."""
    if column.dtype == np.float64:
        return
    texts = [cell_text(cell) for cell in column]
    counts = Counter(texts)
    help = "Or say that these are classes: --task classify."
    if is_nested(texts[0]):
        got, help = f"lists or records, such as {texts[0][:40]}", "Give each of their values a column."
    elif sum(map(like_a_number, texts)) > len(texts) / 2:
        got = f"texts such as {texts[0]!r}. Write numbers as 1234.5, without signs"
    elif len(counts) > 2 and all(math.isfinite(_days(text)) for text in counts):
        got = f"dates such as {texts[0]!r}. Write them as a number, such as days since the first"
    elif len(counts) > max(10, 0.5 * len(texts)):
        got = f"{len(counts)} different texts in {len(texts)} rows, such as {texts[0][:40]!r}"
    else:
        return
    raise DataError(f"{where}: needs numbers or classes as target; got {got}. {help}", code="DATA116")


def find_task(columns: Sequence[NDArray[np.float64]]) -> str:
    """What columns of numbers are, if they are to be predicted: labels, classes, or numbers."""
    values = [np.unique(column) for column in columns]
    if len(columns) > 1:
        return "multilabel" if all(set(found) <= {0.0, 1.0} for found in values) else "regress"
    whole = bool((values[0] == np.round(values[0])).all())
    return "classify" if whole and len(values[0]) <= min(MOST_CLASSES, len(columns[0]) // 2) else "regress"


def encode_classes(cells: Array, class_names: Sequence[str], where: str) -> NDArray[np.int64]:
    """Class numbers [N]; DataError DATA117 for a class that is not known."""
    number = {name: index for index, name in enumerate(class_names)}
    texts = [cell_text(cell) for cell in cells.tolist()]
    if unknown := sorted({text for text in texts if text not in number}):
        raise DataError(
            f"{where}: needs the classes of the training part; got {', '.join(map(repr, unknown[:5]))}. "
            "Take these rows out, or train with them.",
            code="DATA117",
        )
    return np.array([number[text] for text in texts], np.int64)


def without_missing(table: Table, names: Sequence[str]) -> tuple[Table, int]:
    """The rows in which all the columns `names` have a value, and how many have not."""
    present = np.ones(rows_of(table), bool)
    for name in names:
        cells = table[name]
        present &= (
            np.isfinite(cells) if cells.dtype == np.float64 else np.array([bool(c) for c in cells], bool)
        )
    return {name: cells[present] for name, cells in table.items()}, int((~present).sum())


def rows_of(table: Table) -> int:
    """The number of rows."""
    return len(next(iter(table.values()))) if table else 0


def _days(cell: object) -> float:
    """An ISO date or time in days since 1970; nan if it is none."""
    try:
        moment = datetime.datetime.fromisoformat(str(cell))
    except ValueError:
        return math.nan
    return (moment.replace(tzinfo=None) - datetime.datetime(1970, 1, 1)).total_seconds() / 86_400
