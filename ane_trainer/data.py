"""`load_dataset()`: known datasets, users' files and objects, as iterables of normalised (x, y) batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ane_trainer.ane.errors import UsageError
from ane_trainer.training.datasets.batches import Batches
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.datasets.known import DATASETS, DatasetInfo, default_root, find_dataset
from ane_trainer.training.datasets.known import find as find_known
from ane_trainer.training.datasets.opening import open_data
from ane_trainer.training.datasets.splits import DataOptions, Splits
from ane_trainer.utils import did_you_mean

__all__ = [
    "DATASETS", "Batches", "DataDescription", "DataOptions", "DatasetInfo", "Splits", "default_root",
    "find_dataset", "find_known", "load_dataset", "open_data",
]  # fmt: skip


def load_dataset(
    name: object, batch_size: int = 128, seed: int = 0, *,
    limit: int | tuple[int | None, int | None] | None = None, shuffle: bool = True,
    drop_last: bool | None = None, augment: Sequence[str] | str = (), **options: Any,
) -> tuple[Batches, Batches]:  # fmt: skip
    """Load data as (train, test), each an iterable of (x, y) batches; see `Batches`.

    name        a known dataset ("mnist", "fashion-mnist", "kmnist", "emnist-letters", "cifar-10", "digits", ...);
                a folder of images by class, a .csv, .tsv, .parquet, .npz or .txt file; "hf:NAME";
                "file.py:function"; or arrays (x, y), a data frame, a torch dataset, or two or three of these.
    batch_size  examples a batch.
    seed        of the training order, the division and the changes of `augment` (>= 0).
    limit       use at most so many examples of both parts, or (train, test) numbers.
    drop_last   leave out a last, smaller training batch; default: of known datasets only.
    augment     changes of the training images: shift, flip, crop, rotate, erase, mixup, e.g. "flip,shift=2".
    options     of `DataOptions`: target, task, val_split, test_split, size, channels, context, tokens; and for
                known datasets `root`, the folder that holds, or is to hold, the files (torchvision's layout;
                default: the user's cache folder), and `mean`, `std` of the normalisation
                (byte / pixel_max - mean) / std (mnist 0.1307, 0.3081; fashion-mnist 0.2860, 0.3530; digits
                0.3054, 0.3760).

    The second part is the test part, or where the data has none, the part held out for validation. For all
    three, and what was found out, use `open_data`.

    DataError: DATA101 unknown name, DATA102 an argument out of range, DATA110 not to be had (lists every
    source tried), DATA111 cache not writable, DATA115 to DATA117 a file that cannot be used.
    MissingDependency: the extra to install.
    """
    limits = limit if isinstance(limit, tuple) else (limit, limit)
    changes = (augment,) if isinstance(augment, str) else tuple(augment)
    if isinstance(target := options.get("target"), str):
        options["target"] = tuple(target.split(","))
    known = [each.name for each in fields(DataOptions)]
    for other in options.keys() - set(known):
        raise UsageError(
            f"load_dataset: needs a known argument; got {other!r}. {did_you_mean(other, known)}",
            code="ANE104",
        )
    splits = open_data(
        name,
        DataOptions(
            batch_size, seed, limit=limits, shuffle=shuffle, drop_last=drop_last, augment=changes, **options
        ),
    )  # fmt: skip
    return splits.train, splits.held_out
