"""Text files as text, whatever wrote them: UTF-8, UTF-16 and UTF-32 by their mark, else Windows' old alphabet."""

from __future__ import annotations

import codecs
import warnings
from pathlib import Path

#: Marks at a file's beginning, the longer ones first: UTF-32's begins as UTF-16's does.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
          codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}  # fmt: skip


def read_any_text(path: Path) -> str:
    """The file's text; a warning where it is not Unicode and is read as Windows-1252.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text, and where it stops to be one.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        try:
            text = data.decode("cp1252") if encoding == "utf-8" and b"\0" not in data else ""
        except UnicodeDecodeError:
            text = ""
        if not text:
            raise ValueError(
                f"a byte 0x{byte:02x} in line {line} that is no {encoding.upper()[:6].rstrip('-')}"
            ) from None
        warnings.warn(
            f"{path} is not UTF-8 (line {line}): read as Windows-1252, where that byte is {text[error.start]!r}; "
            "save it as UTF-8 if that is wrong",
            stacklevel=2,
        )
    if "\0" in text:
        raise ValueError("zero bytes")
    return text
