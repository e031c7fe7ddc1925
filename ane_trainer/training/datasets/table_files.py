"""Tables in files: CSV and TSV with any of the usual separators, and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ane_trainer.ane.errors import DataError, MissingDependency
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets.cells import is_missing, number_of, typed_column
from ane_trainer.training.datasets.encodings import read_any_text

#: A table by column; a cell is a number (nan: missing) or a text ("": missing).
Table = dict[str, Array]

SUFFIXES = (".csv", ".tsv", ".parquet")
#: A number with a comma before its fraction, perhaps with points between thousands.
_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")


def read_table(path: Path) -> Table:
    """The columns of a .csv, .tsv or .parquet file. DataError DATA115 if it cannot be read as one."""
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)


def _read_csv(path: Path) -> Table:
    try:
        text = read_any_text(path)
        first = text.partition("\n")[0]
        delimiter = max("\t;,|", key=first.count)
        rows = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row
        ]
    except (OSError, ValueError, csv.Error) as error:
        raise _unreadable(path, str(error), "Save it as CSV in UTF-8.") from None
    if not rows:
        raise _unreadable(path, "no line", "Give a line of column names, then one line a row.")
    names = _column_names(rows[0], path)
    if len(rows) == 1:
        raise _unreadable(path, "no row below them", "Give a line of column names, then one line a row.")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise _unreadable(
                path, f"{len(row)} values in row {number} for {len(names)} columns", "Quote values that hold the "
                f"separator {delimiter!r}."
            )  # fmt: skip
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(names)}
    if delimiter != ",":
        columns = {name: _with_points(cells) for name, cells in columns.items()}
    return {name: typed_column(cells) for name, cells in columns.items()}


def _with_points(cells: list[str]) -> list[str]:
    """Numbers that are written with a comma, as 1.234,5, with a point; other columns as they are.

    Three digits after each comma may be a fraction or thousands: those stay text, and are told where they are used.
    """
    present = [cell.strip() for cell in cells if not is_missing(cell)]
    fractions = {len(cell.partition(",")[2]) for cell in present if "," in cell}
    if not fractions or fractions == {3} or not all(_COMMA.fullmatch(cell) for cell in present):
        return cells
    return [cell if is_missing(cell) else cell.replace(".", "").replace(",", ".") for cell in cells]


def _column_names(header: Sequence[str], path: Path) -> list[str]:
    names = [name.strip() for name in header]
    if all(number_of(name) is not None for name in names):
        raise _unreadable(path, f"numbers in its first line ({names[0]}, ...)", "Put the column names there.")
    _refuse_twice(names, path)
    return names


def _refuse_twice(names: Sequence[str], path: Path) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1 and name)
    if twice:
        raise _unreadable(path, f"two columns called {twice[0]!r}", "Rename one.")


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependency(
            f'{path}: needs pyarrow to read Parquet; got no such package. Do: pip install "ane_trainer[data]".'
        ) from error
    try:
        _refuse_twice(parquet.read_schema(path).names, path)
        read = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, str(error).splitlines()[0], "Write it again.") from None
    return {str(name): typed_column(values) for name, values in read.to_pydict().items()}


def _unreadable(path: Path, got: str, fix: str) -> DataError:
    return DataError(f"{path}: needs a table with column names; got {got}. {fix}", code="DATA115")
