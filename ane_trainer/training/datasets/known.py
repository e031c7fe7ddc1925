"""The datasets that are known by name: find one, bring its files here, verified, and read them into arrays.

Copies on this machine come first, then mirrors. IDX files are checked by SHA-256, archives by the MD5 that is
published with them.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import logging
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError, MissingDependency
from ane_trainer.training.datasets.carriers import restricted_load
from ane_trainer.training.datasets.fetch import default_root, download, fetch_files, unreachable
from ane_trainer.training.datasets.local import parse_idx
from ane_trainer.training.datasets.table import DATASETS, Archive, DatasetInfo, SourceFailed
from ane_trainer.utils import atomic_write, did_you_mean

__all__ = ["DATASETS", "NAMES", "DatasetInfo", "default_root", "find", "find_dataset", "load"]

_log = logging.getLogger("ane_trainer.data")

#: Names to show; those of EMNIST's divisions are longer.
NAMES = tuple(DATASETS)

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]

TRAIN_DIGITS = 1437
_DIGITS_SEED = 0
_DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


@dataclass(frozen=True)
class Loaded:
    """(images, labels) as bytes by split, "train" and "test", where they came from, and names that the data holds."""

    splits: Mapping[str, Arrays]
    source: str
    class_names: tuple[str, ...] = ()


def find(name: str) -> DatasetInfo | None:
    """The table entry of a dataset; case, `_` and `-` do not matter; "emnist" is its balanced division."""
    folded = name.lower().replace("_", "").replace("-", "").replace(" ", "")
    by_name = {known.replace("-", ""): info for known, info in DATASETS.items()}
    return by_name.get("emnistbalanced" if folded == "emnist" else folded)


def find_dataset(name: str) -> DatasetInfo:
    """As `find`; DataError DATA101 if the name is not known."""
    if (info := find(name)) is not None:
        return info
    raise DataError(
        f"dataset: needs a known name; got {name!r}. {did_you_mean(name, DATASETS)}", code="DATA101"
    )


def load(info: DatasetInfo, root: str | Path | None = None) -> Loaded:
    """The whole dataset, from the cache under `root` or from where it can be had.

    DataError: DATA110 not to be had (lists every source tried), DATA111 cache not writable, DATA112 wrong
    content. MissingDependency: "digits" without scikit-learn.
    """
    if info.files:
        fetched = fetch_files(info, root)
        source = ", ".join(fetched.sources)
        _log.info("%s: verified, from %s", info.name, source)
        a, b, c, d = (parse_idx(fetched.raw[file.name]) for file in info.files)
        return Loaded({"train": (a, b), "test": (c, d)}, source)
    if not info.archives:
        return _load_digits()
    fetched_archives = [_fetch_archive(info, archive, root) for archive in info.archives]
    source = ", ".join(sorted({source for _, source in fetched_archives}))
    try:
        if info.name.startswith("cifar"):
            return _read_cifar(info, fetched_archives[0][0], source)
        return Loaded(_read_idx_archives(info, [data for data, _ in fetched_archives]), source)
    except (
        KeyError,
        ValueError,
        OSError,
        EOFError,
        SourceFailed,
        tarfile.TarError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(
            f"load_dataset({info.name!r}): needs the published archive; it cannot be read ({error}). "
            "Delete it and fetch it again.",
            code="DATA112",
        ) from None


def _fetch_archive(info: DatasetInfo, archive: Archive, root: str | Path | None) -> tuple[bytes, str]:
    """An archive's bytes with its MD5 right, and where they came from; a download is kept in the cache."""
    base = Path(root).expanduser() if root is not None else default_root()
    attempts = []
    for path in _places(info, archive, base):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == archive.md5:
            return data, str(path.parent)
        attempts.append(f"  {path}: wrong content (its MD5 is not the official file's)")
    probe = unreachable(info.mirrors)
    for mirror in info.mirrors:
        try:
            if mirror in probe:
                raise SourceFailed(probe[mirror])
            data = download(mirror + archive.name, archive.name, f"md5:{archive.md5}")
        except SourceFailed as failure:
            attempts.append(f"  {mirror}: {failure}")
            continue
        _keep(base / info.folder / "raw" / archive.name, data)
        return data, mirror
    raise DataError(
        "\n".join([
            f"load_dataset({info.name!r}): needs {archive.name}; no source delivered:",
            *attempts,
            f"Offline: on a machine with a network get it from {(*info.mirrors, 'its authors')[0]}, copy it to "
            f"{base / info.folder / 'raw'}, and run again.",
        ]),
        code="DATA110",
    )  # fmt: skip


def _keep(path: Path, data: bytes) -> None:
    try:
        atomic_write(path, data)
    except OSError as error:
        raise DataError(
            f"data cache: needs a folder that can be written; got {path.parent} ({error.strerror or error}). "
            'Pass another one: load_dataset(..., root="...").',
            code="DATA111",
        ) from error


def _places(info: DatasetInfo, archive: Archive, base: Path) -> Iterator[Path]:
    """Where an archive may lie: our cache, and where torchvision and users leave it."""
    home = Path.home()
    for folder in (
        base,
        default_root(),
        Path("data"),
        Path("datasets"),
        Path(),
        home / "data",
        home / "datasets",
    ):
        for inside in (folder / info.folder / "raw", folder / info.folder, folder):
            yield inside / archive.name


def _read_idx_archives(info: DatasetInfo, archives: Sequence[bytes]) -> dict[str, Arrays]:
    """Four IDX files, each a .gz of its own, or all as .gz in one .zip with EMNIST's images to be turned."""
    if len(archives) == len(info.members):
        raw = [gzip.decompress(data) for data in archives]
    else:
        with zipfile.ZipFile(io.BytesIO(archives[0])) as box:
            inside = {Path(name).name: name for name in box.namelist()}
            raw = [gzip.decompress(box.read(inside[f"{member}.gz"])) for member in info.members]
    images_a, labels_a, images_b, labels_b = (parse_idx(data) for data in raw)
    if info.folder == "EMNIST":
        images_a, images_b = images_a.transpose(0, 2, 1), images_b.transpose(0, 2, 1)
    first = 1 if info.name == "emnist-letters" else 0  # its classes count from 1
    return {"train": (images_a, labels_a - np.uint8(first)), "test": (images_b, labels_b - np.uint8(first))}


def _read_cifar(info: DatasetInfo, archive: bytes, source: str) -> Loaded:
    """The pickles of CIFAR's Python version, of which only NumPy data, texts and numbers are read."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as box:

        def content(member: str) -> dict[str, Any]:
            file = box.extractfile(f"{info.folder}/{member}")
            if file is None:
                raise KeyError(member)
            return dict(restricted_load(file.read()))

        fine = info.name == "cifar-100"
        parts = [content(member) for member in info.members]
        names = tuple(content("meta")["fine_label_names"]) if fine else ()
    images = [np.asarray(part["data"], np.uint8) for part in parts]
    labels = [np.asarray(part["fine_labels" if fine else "labels"], np.uint8) for part in parts]
    train = (np.concatenate(images[:-1]), np.concatenate(labels[:-1]))
    return Loaded({"train": train, "test": (images[-1], labels[-1])}, source, names)


def _load_digits() -> Loaded:
    """8x8 images with values 0 to 16, bundled with scikit-learn, in a split that never changes."""
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise MissingDependency(
            'load_dataset("digits"): needs scikit-learn, which brings the data; got no such package. '
            'Do: pip install "ane_trainer[digits]".'
        )
    # Its file alone: importing scikit-learn takes longer than training on it.
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",", dtype=np.float32).astype(np.uint8)
    images, labels = np.ascontiguousarray(rows[:, :64]).reshape(-1, 8, 8), np.ascontiguousarray(rows[:, 64])
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != _DIGITS_SHA256:
        raise DataError(
            f'load_dataset("digits"): needs the data that scikit-learn 1.x carries; got SHA-256 {found}. '
            "Do: reinstall scikit-learn.",
            code="DATA112",
        )
    order = np.random.Generator(np.random.PCG64(_DIGITS_SEED)).permutation(len(images))
    train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    return Loaded(
        {"train": (images[train], labels[train]), "test": (images[test], labels[test])}, "scikit-learn"
    )
