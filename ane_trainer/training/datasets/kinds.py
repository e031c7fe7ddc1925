"""What a file is by its first bytes, whatever its name says: a pointer of Git LFS, an archive, a web page."""

from __future__ import annotations

from pathlib import Path

_UNPACK, _EXPORT = "Unpack it.", "Save it as CSV."
#: First bytes -> (what the file is, what to do instead).
_FIRST = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "Fetch it: git lfs pull."),
    b"\x1f\x8b": ("a gzip archive", _UNPACK),
    b"BZh": ("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ\0": ("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Office file, such as .xls", _EXPORT),
    b"%PDF-": ("a PDF", "Give the data itself."),
    b"\x89PNG\r\n\x1a\n": ("a PNG image", "Images go into a folder by class."),
    b"\xff\xd8\xff": ("a JPEG image", "Images go into a folder by class."),
    b"PAR1": ("a Parquet file", "Name it .parquet."),
    b"\x93NUMPY": ("an array of numpy.save", "Save inputs and targets by numpy.savez(file, x=..., y=...)."),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", "Save its arrays by numpy.savez(file, x=..., y=...)."),
    b"SQLite format 3\0": ("an SQLite database", _EXPORT),
}  # fmt: skip
_PAGE = ("a web page", "Download the file itself.")


def other_kind(path: Path, *expected: bytes) -> tuple[str, str] | None:
    """(what the file is, what to do), if it is something that is known; None if not, or it begins as `expected`.

    OSError if it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(expected):
        return None
    if head.startswith(b"PK\x03\x04"):
        workbook = b"[Content_Types].xml" in head or path.suffix.lower() in (".xlsx", ".ods")
        return ("an Excel workbook", _EXPORT) if workbook else ("a zip archive", _UNPACK)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return _PAGE
    return next((found for first, found in _FIRST.items() if head.startswith(first)), None)
