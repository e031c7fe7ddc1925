"""Copies of a dataset already on this machine: torchvision folders, Keras files, Debian's package."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ane_trainer.training.datasets.idx import build_idx
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
