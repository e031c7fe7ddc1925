"""Download a dataset's official .gz files from its mirrors, SHA-256-checked; give up fast when offline."""

from __future__ import annotations

import logging
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ane_trainer.training.datasets.local import gunzip
from ane_trainer.training.datasets.table import DatasetInfo, IdxFile, SourceFailed
from ane_trainer.utils import is_interactive

_log = logging.getLogger("ane_trainer.data")

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0


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
) -> list[tuple[str, Callable[[DatasetInfo, Sequence[IdxFile]], Iterator[tuple[IdxFile, bytes]]]]]:
    """One source per mirror, labelled with its URL, in the table's order; the first use probes all hosts."""
    probe: dict[str, str] | None = None

    def source(
        url: str,
    ) -> Callable[[DatasetInfo, Sequence[IdxFile]], Iterator[tuple[IdxFile, bytes]]]:
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
