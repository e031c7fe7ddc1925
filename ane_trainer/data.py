"""`load_dataset()`: a known dataset, verified, as two iterables of normalised (x, y) batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError
from ane_trainer.training.datasets.digits import load_digits
from ane_trainer.training.datasets.fetch import default_root, fetch_files
from ane_trainer.training.datasets.idx import parse_idx
from ane_trainer.training.datasets.table import DATASETS, DatasetInfo
from ane_trainer.utils import did_you_mean

__all__ = ["DATASETS", "Batches", "DatasetInfo", "default_root", "find_dataset", "load_dataset"]

_log = logging.getLogger(__name__)


class Batches:
    """An iterable of (x, y): x float32 [B, C, H, W] is (byte / pixel_max - mean) / std, y int64 [B].

    With `shuffle`, each pass (`iter()`) has a new order that depends on `seed` and the number of the pass
    only; `set_epoch(n)` chooses the number of the next one. `state_dict()` says where a pass stands, also in
    the middle of it, and `load_state_dict()` continues there with the very same batches. `drop_last` leaves
    out a last batch of fewer than `batch_size` examples. `len()` is the number of batches of a pass.

    The values are bit for bit those of torchvision's ToTensor and Normalize.
    """

    def __init__(
        self, images_NHW: NDArray[np.uint8], labels_N: NDArray[np.uint8], info: DatasetInfo, *,
        split: str = "train", source: str = "", batch_size: int = 128, seed: int = 0, shuffle: bool = False,
        drop_last: bool = False, mean: float | None = None, std: float | None = None,
    ) -> None:  # fmt: skip
        self.images = torch.from_numpy(np.array(images_NHW)).reshape(-1, *info.in_shape)
        self.labels = torch.from_numpy(labels_N.astype(np.int64))
        self.name, self.split, self.source = info.name, split, source
        self.in_shape, self.class_names = info.in_shape, info.class_names
        self.pixel_max = info.pixel_max
        self.mean = info.mean if mean is None else mean
        self.std = info.std if std is None else std
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self._next_epoch = 0
        self._skip = 0  # batches of the next pass that were delivered before a resume
        self._current: tuple[int, int] | None = None  # the pass in progress: its number, batches delivered

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are 0 to num_classes - 1."""
        return len(self.class_names)

    @property
    def num_examples(self) -> int:
        """The number of examples in this split (after `limit`)."""
        return len(self.labels)

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __repr__(self) -> str:
        size = f"{self.num_examples:,} examples, {len(self)} batches of {self.batch_size}"
        return f"Batches({self.name} {self.split}: {size})"

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch, start = self._next_epoch, self._skip
        self._next_epoch, self._skip = epoch + 1, 0
        self._current = (epoch, start)
        return self._pass(epoch, start)

    def _pass(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = self.order(epoch)
        for number in range(start, len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            self._current = (epoch, number + 1)
            # NumPy picks and scales the rows: a batch is too small to gain from PyTorch's threads, and on a
            # busy machine waiting for them took 9 ms a batch (0.09 ms without).
            x_BCHW = self.normalise(torch.from_numpy(self.images.numpy()[rows]))
            yield x_BCHW, torch.from_numpy(self.labels.numpy()[rows])

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The example numbers [N] in the order of pass `epoch`; a function of the seed and `epoch` only."""
        if not self.shuffle:
            return np.arange(self.num_examples)
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return generator.permutation(self.num_examples)

    def normalise(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Unsigned bytes to the float32 values that the model sees."""
        x_BCHW = images_BCHW.numpy().astype(np.float32)
        x_BCHW /= np.float32(self.pixel_max)
        x_BCHW -= np.float32(self.mean)
        x_BCHW /= np.float32(self.std)
        return torch.from_numpy(x_BCHW)

    def set_epoch(self, epoch: int) -> None:
        """Make the next `iter()` pass number `epoch`, from its first batch."""
        self._next_epoch, self._skip, self._current = epoch, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands: the pass in progress, how many of its batches are delivered, whose it is."""
        epoch, batch = self._current if self._current is not None else (self._next_epoch, self._skip)
        if batch >= len(self):
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; DataError DATA103 if it belongs to other data or order."""
        different = [f"{key} {state.get(key)!r} (here {value!r})" for key, value in self._identity().items()
                     if state.get(key) != value]  # fmt: skip
        if different:
            raise DataError(
                f"Batches.load_state_dict: needs the state of the same data; got {', '.join(different)}. "
                "Load the dataset with the settings of the run that is resumed.",
                code="DATA103",
            )
        self._next_epoch, self._skip, self._current = state["epoch"], state["batch"], None

    def _identity(self) -> dict[str, Any]:
        keys = ("name", "split", "num_examples", "batch_size", "seed", "shuffle", "drop_last")
        return {key: getattr(self, key) for key in keys}


def find_dataset(name: str) -> DatasetInfo:
    """The table entry of a dataset; case, `_` and `-` do not matter. DataError DATA101 if it is not known."""
    folded = name.lower().replace("_", "").replace("-", "").replace(" ", "")
    for known, info in DATASETS.items():
        if known.replace("-", "") == folded:
            return info
    raise DataError(
        f"dataset: needs a known name; got {name!r}. {did_you_mean(name, DATASETS)}", code="DATA101"
    )


def load_dataset(
    name: str, batch_size: int = 128, seed: int = 0, *, root: str | Path | None = None,
    limit: int | tuple[int, int] | None = None, shuffle: bool = True, drop_last: bool = True,
    mean: float | None = None, std: float | None = None,
) -> tuple[Batches, Batches]:  # fmt: skip
    """Load "mnist", "fashion-mnist" or "digits" as (train, test), each an iterable of (x, y) batches.

    x is float32 [B, 1, 28, 28] (digits: [B, 1, 8, 8]), y is int64 [B]. See `Batches`.

    batch_size  examples a batch. Training drops the incomplete last batch (`drop_last`), since a compiled
                step has a fixed shape; the test split keeps it.
    seed        of the training order (>= 0).
    root        the folder that holds, or is to hold, the files (torchvision's layout); default: the user's
                cache folder. Files are fetched once, checked by SHA-256 at every load.
    limit       use the first so many examples of both splits, or (train, test) numbers.
    mean, std   of the normalisation (byte / pixel_max - mean) / std; default: the dataset's own
                (mnist 0.1307, 0.3081; fashion-mnist 0.2860, 0.3530; digits 0.3054, 0.3760).

    DataError: DATA101 unknown name, DATA102 an argument out of range, DATA110 not to be had (lists every
    source tried), DATA111 cache not writable. MissingDependency: "digits" without scikit-learn.
    """
    info = find_dataset(name)
    limits = limit if isinstance(limit, tuple) else (limit, limit)
    _check_arguments(info, batch_size, seed, limits, std)
    (train, test), source = _arrays(info, root)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "source": source,
        "mean": mean,
        "std": std,
    }
    images, labels = (array[: limits[0]] for array in train)
    train_batches = Batches(
        images, labels, info, split="train", shuffle=shuffle, drop_last=drop_last, **common
    )
    images, labels = (array[: limits[1]] for array in test)
    test_batches = Batches(images, labels, info, split="test", **common)
    if len(train_batches) == 0:
        raise DataError(
            f"load_dataset({info.name!r}): needs at least one full batch; got "
            f"{train_batches.num_examples:,} training examples for batch_size {batch_size}. "
            "Lower batch_size, raise limit, or pass drop_last=False.",
            code="DATA102",
        )
    return train_batches, test_batches


Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def _arrays(info: DatasetInfo, root: str | Path | None) -> tuple[tuple[Arrays, Arrays], str]:
    """((train images, labels), (test images, labels)) as bytes, and where they came from."""
    if not info.files:
        return load_digits(), "scikit-learn"
    fetched = fetch_files(info, root)
    source = ", ".join(fetched.sources)
    _log.info("%s: verified, from %s", info.name, source)
    a, b, c, d = (parse_idx(fetched.raw[file.name]) for file in info.files)
    return ((a, b), (c, d)), source


def _check_arguments(
    info: DatasetInfo, batch_size: int, seed: int, limits: tuple[int | None, int | None], std: float | None
) -> None:
    problems = []
    if batch_size < 1:
        problems.append(f"batch_size >= 1; got {batch_size}")
    if seed < 0:
        problems.append(f"seed >= 0; got {seed}")
    problems += [f"limit >= 1; got {limit}" for limit in limits if limit is not None and limit < 1]
    if std is not None and not std > 0:
        problems.append(f"std > 0; got {std}")
    if problems:
        raise DataError(f"load_dataset({info.name!r}): needs {'; needs '.join(problems)}.", code="DATA102")
