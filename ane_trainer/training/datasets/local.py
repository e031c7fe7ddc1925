"""Dataset files on this machine: the IDX format, and copies in torchvision's, Keras' and Debian's folders."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ane_trainer.training.datasets.table import DatasetInfo, IdxFile, SourceFailed

_log = logging.getLogger("ane_trainer.data")


def is_official(file: IdxFile, raw: bytes) -> bool:
    """True if `raw` is the official content, by length and SHA-256."""
    return len(raw) == file.raw_bytes and hashlib.sha256(raw).hexdigest() == file.raw_sha256


def gunzip(data: bytes, limit_bytes: int) -> bytes:
    """Decompress up to `limit_bytes` + 1 (so that too much shows in the length); b"" if damaged."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        return unpacker.decompress(data, limit_bytes + 1)
    except zlib.error:
        return b""


def read_folders(folders: Iterable[Path], wanted: Sequence[IdxFile]) -> Iterator[tuple[IdxFile, bytes, Path]]:
    """Each wanted file that a folder holds, raw or as .gz, with its path; a wrong one is named in the log."""
    places = list(folders)
    for file in wanted:
        for path in (folder / f"{file.name}{suffix}" for folder in places for suffix in ("", ".gz")):
            try:
                data = path.read_bytes()
            except OSError:
                continue
            raw = gunzip(data, file.raw_bytes) if path.suffix == ".gz" else data
            if is_official(file, raw):
                yield file, raw, path
                break
            _log.warning("%s: not the official content (%d bytes); ignored", path, len(data))


def copies_on_disk(info: DatasetInfo, wanted: Sequence[IdxFile]) -> Iterator[tuple[IdxFile, bytes]]:
    """The files where torchvision, Keras and Debian leave them; SourceFailed if some are missing."""
    found = set()
    folders = list(_usual_folders(info))
    for file, raw, _ in read_folders(folders, wanted):
        found.add(file.name)
        yield file, raw
    missing = [file for file in wanted if file.name not in found]
    if missing and info.name == "mnist":
        path = _keras_home() / "datasets" / "mnist.npz"
        for file, raw in _keras_npz(path, missing):
            found.add(file.name)
            yield file, raw
    if len(found) < len(wanted):
        raise SourceFailed("none found in ./data, ~/data, the Keras folder or the system's dataset folders")


def _keras_home() -> Path:
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")


def _usual_folders(info: DatasetInfo) -> Iterator[Path]:
    home = Path.home()
    for base in (Path("data"), Path("datasets"), Path(), home / "data", home / "datasets"):
        yield base / info.folder / "raw"
    yield _keras_home() / "datasets" / info.name
    yield Path("/usr/share/datasets") / info.name


def _keras_npz(path: Path, wanted: Sequence[IdxFile]) -> Iterator[tuple[IdxFile, bytes]]:
    """Rebuild the IDX files from Keras' mnist.npz."""
    keys = {
        "train-images-idx3-ubyte": "x_train",
        "train-labels-idx1-ubyte": "y_train",
        "t10k-images-idx3-ubyte": "x_test",
        "t10k-labels-idx1-ubyte": "y_test",
    }
    if not path.exists():
        return
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            built = [(file, build_idx(arrays[keys[file.name]])) for file in wanted]
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        gzip.BadGzipFile,
    ) as error:
        _log.warning("%s: not Keras' mnist.npz (%s); ignored", path, error)
        return
    for file, raw in built:
        if is_official(file, raw):
            yield file, raw
        else:
            _log.warning("%s: not the official content of %s; ignored", path, file.name)


#: IDX: a big-endian header, then unsigned bytes, as MNIST has it.
_UNSIGNED_BYTE = 0x08


def parse_idx(raw: bytes) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes; ValueError if header and length do not agree."""
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] != _UNSIGNED_BYTE:
        raise ValueError(f"not an IDX file of unsigned bytes: starts with {raw[:4].hex()}")
    header_bytes = 4 + 4 * raw[3]
    if len(raw) < header_bytes:
        raise ValueError(f"IDX header is cut off: needs {header_bytes} bytes, got {len(raw)}")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header_bytes])
    values = np.frombuffer(raw, dtype=np.uint8, offset=header_bytes)
    expected = 1
    for size in shape:
        expected *= size
    if values.size != expected:
        raise ValueError(
            f"IDX data is cut off or too long: shape {shape} needs {expected} bytes, got {values.size}"
        )
    return values.reshape(shape)


def build_idx(array: NDArray[np.uint8]) -> bytes:
    """The IDX file holding an array of unsigned bytes; the inverse of `parse_idx`."""
    if array.dtype != np.uint8:
        raise ValueError(f"IDX: needs uint8; got {array.dtype}")
    header = struct.pack(f">HBB{array.ndim}I", 0, _UNSIGNED_BYTE, array.ndim, *array.shape)
    return header + array.tobytes()
