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
from ane_trainer.training.datasets.kinds import other_kind

#: A table by column; a cell is a number (nan: missing) or a text ("": missing).
Table = dict[str, Array]

SUFFIXES = (".csv", ".tsv", ".parquet")
#: The line by which a spreadsheet program says what separates.
_SEPARATOR = re.compile(r"sep=([\t;,|])\r?\n")
#: A text in quotes, and a row that may hold such.
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_FIRST_ROW = re.compile(r'(?:[^"\r\n]|"(?:[^"]|"")*")*')
#: A number with a comma before its fraction, perhaps with points between thousands.
_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")


def read_table(path: Path) -> Table:
    """The columns of a .csv, .tsv or .parquet file. DataError DATA115 if it cannot be read as one."""
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        other = other_kind(path, b"PAR1") if is_parquet else other_kind(path)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "Check the file.") from None
    if other is not None:
        raise _unreadable(path, *other)
    return _read_parquet(path) if is_parquet else _read_csv(path)


def _read_csv(path: Path) -> Table:
    try:
        delimiter, rows = _rows_of(read_any_text(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error), "Save it as CSV in UTF-8.") from None
    except csv.Error as error:
        fix = 'Close each quote, and write a quote within a text twice: "".'
        raise _unreadable(path, f"quotes that do not fit together ({error})", fix) from None
    if not rows:
        raise _unreadable(path, "no line", "Give a line of column names, then one line a row.")
    names = _column_names(rows[0], path)
    if len(rows) == 1:
        raise _unreadable(path, "no row below them", "Give a line of column names, then one line a row.")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise _unreadable(
                path, f"{len(row)} value{'s' * (len(row) != 1)} in row {number} for {len(names)} columns",
                f"The separator is {delimiter!r}, as in its first line; quote values that hold it."
                if len(names) > 1 else "The column names have to be its first line.",
            )  # fmt: skip
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(names)}
    if delimiter != ",":
        columns = {name: _with_points(cells) for name, cells in columns.items()}
    return {name: typed_column(cells) for name, cells in columns.items()}


def _rows_of(text: str) -> tuple[str, list[list[str]]]:
    """The separator, which the first row has most of, and the rows that are not blank; a line `sep=;` names it."""
    given = _SEPARATOR.match(text)
    text = text[given.end() :] if given else text
    first = _FIRST_ROW.match(text)
    head = _QUOTED.sub("", first[0] if first else "")
    delimiter = given[1] if given else max("\t;,|", key=head.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return delimiter, [row for row in rows if row]


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
    if not any(names):
        raise _unreadable(path, "a blank first line", "Put the column names there.")
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
        got = str(error).splitlines()[0].rstrip(".")
        raise _unreadable(path, got, "Write it again.") from None
    return {str(name): typed_column(values) for name, values in read.to_pydict().items()}


def _unreadable(path: Path, got: str, fix: str) -> DataError:
    return DataError(f"{path}: needs a table with column names; got {got}. {fix}", code="DATA115")
