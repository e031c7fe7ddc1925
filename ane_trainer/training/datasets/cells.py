"""Cells of tables: what counts as a number, as missing and as a text, and columns of them as arrays."""

from __future__ import annotations

import ast
import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ane_trainer.ane.mil.weights import Array

#: What counts as missing in a text file, in small letters.
MISSING = ("", "na", "n/a", "nan", "null", "none", "?", "-")
#: The largest number that is read: what a model computes with is single precision at most.
LARGEST = float(np.finfo(np.float32).max)
#: From here on float64 does not hold every whole number.
EXACT = 2.0**53


def typed_column(cells: Sequence[object]) -> Array:
    """Cells as float64 (nan: missing) if all present ones are numbers, else as text ("": missing).

    Whole numbers that differ and would become one in float64 (from 2^53 on, such as account numbers) stay text.
    """
    plain = [None if is_missing(cell) else _decoded(cell) for cell in cells]
    numbers = [math.nan if cell is None else number_of(cell) for cell in plain]
    if None not in numbers and any(cell is not None for cell in plain):
        found = np.array(numbers, np.float64)
        digits = {
            str(cell) for cell, n in zip(plain, numbers, strict=True) if n is not None and abs(n) >= EXACT
        }
        whole = {text for text in digits if text.lstrip("+-").isdigit()}
        if len(whole) == len({float(text) for text in whole}):
            return found
    return np.array(["" if cell is None else str(cell).strip() for cell in plain], dtype=object)


def _decoded(cell: object) -> object:
    """Bytes as the text that they are."""
    return cell.decode(errors="backslashreplace") if isinstance(cell, bytes) else cell


def is_missing(cell: object) -> bool:
    """Whether a cell stands for no value."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return True
    return isinstance(cell, str) and cell.strip().lower() in MISSING


def number_of(cell: Any) -> float | None:
    """The cell as a number; None for a text, for nan and for what is beyond LARGEST."""
    if isinstance(cell, str) and "_" in cell:  # Python's float() would take 1_000
        return None
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if abs(value) <= LARGEST else None  # nan is none, either


def is_beyond(cell: str) -> bool:
    """Whether it reads as a number beyond LARGEST, such as inf and 1e400."""
    with contextlib.suppress(ValueError):
        return abs(float(cell)) > LARGEST
    return False


def cell_text(cell: object) -> str:
    """A category's name: numbers that are whole without their fraction."""
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:g}" if not cell.is_integer() else str(int(cell))
    return str(cell)


#: Digits with a currency, a percent sign, or something between thousands.
_LIKE_A_NUMBER = re.compile(r"[+-]?[$€£¥]?\s?\d[\d,.' \u00a0]*\s?[%€$£¥]?")


def like_a_number(cell: str) -> bool:
    """Whether a text that is no number looks like one, such as $1,000 and 12 %."""
    return number_of(cell) is None and _LIKE_A_NUMBER.fullmatch(cell) is not None


def is_nested(cell: str) -> bool:
    """Whether a text is what a list or a record of a data frame reads as."""
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return cell[:1] in ("[", "{") and isinstance(ast.literal_eval(cell), (list, dict))
    return False
