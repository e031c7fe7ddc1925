"""Arrays in files: `.npz` with x and y by split, and `.npy`."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ane_trainer.ane.errors import DataError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets.kinds import other_kind

#: Names that arrays have in files: (inputs, targets) for each split.
_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y"), ("images", "labels"),
              ("data", "target"), ("data", "labels"), ("X", "y"), ("X_train", "y_train")),
    "val": (("x_val", "y_val"), ("val_images", "val_labels"), ("X_val", "y_val")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels"), ("X_test", "y_test")),
}  # fmt: skip


def read_npz(path: Path) -> dict[str, tuple[Array, Array]]:
    """(x, y) by split out of a .npz file; DataError DATA115 if it is none or its names are not known."""
    try:
        if (other := other_kind(path, b"PK\x03\x04", b"\x93NUMPY")) is not None:
            raise ValueError(f"it is {other[0]}")
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds one array, as a .npy file does")
        with loaded as file:
            names = list(file.files)
            chosen = {
                split: pair for split, pairs in _KEYS.items() for pair in pairs if set(pair) <= set(names)
            }
            found = {split: (file[x], file[y]) for split, (x, y) in chosen.items()}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        what = (
            str(error).splitlines()[0] if str(error) and "pickle" not in str(error) else "damaged, or objects"
        )
        raise DataError(
            f"{path}: needs arrays of numbers in a .npz file; {what}. Write it with numpy.savez.",
            code="DATA115",
        ) from None
    if "train" not in found:
        raise DataError(
            f"{path}: needs arrays called x and y, or x_train, y_train, x_test, y_test; got {', '.join(names)}. "
            "Save them as numpy.savez(file, x=..., y=...).",
            code="DATA115",
        )
    return found


def load_array(path: Path, where: str) -> Array:
    """The numbers in a .npy file; DataError DATA109 for anything else, headers that lie included."""
    try:  # mapped first: it compares the header's size with the file's
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            raise ValueError("several arrays")
        loaded = np.array(loaded)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        what = "objects" if "pickle" in str(error) or "Object" in str(error) else str(error)
        raise DataError(
            f"{where}: needs a .npy file with an array of numbers; got {path} ({what or type(error).__name__}). "
            "Write one with numpy.save.",
            code="DATA109",
        ) from None
    if loaded.dtype.kind not in "uifb":
        raise DataError(
            f"{where}: needs an array of numbers; got {path} with dtype {loaded.dtype}. Convert it.",
            code="DATA109",
        )
    return loaded
