"""Datasets of the Hugging Face hub, or in a folder of the package `datasets`: images with classes, or a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ane_trainer.ane.errors import DataError, MissingDependency
from ane_trainer.training.datasets import arrays, images, tables
from ane_trainer.training.datasets.splits import DataOptions, Parts


def open_hub(name: str, options: DataOptions) -> Parts:
    """A dataset of the hub: images with a column of classes, or a table."""
    found = read_hub(name)
    splits = {images.SPLIT_FOLDERS[key]: part for key, part in found.items() if key in images.SPLIT_FOLDERS}
    if "train" not in splits:
        raise DataError(
            f"hf:{name}: needs a split called train; got {', '.join(found)}. Choose another.", code="DATA115"
        )
    columns = list(splits["train"].column_names)
    first = splits["train"][0]
    picture = next((column for column in columns if arrays.is_image(first[column])), None)
    if picture is None:
        frames = {split: tables.table_of({c: part[c] for c in columns}) for split, part in splits.items()}
        return tables.open_tables(frames, f"hf:{name}", options)
    usual = tuple(c for c in columns if c in (*tables.USUAL_TARGETS, "labels", "fine_label"))[:1]
    target = options.target or usual
    if len(target) != 1 or target[0] not in columns:
        raise DataError(
            f"hf:{name}: needs the column of the classes; its columns are {', '.join(columns)}. "
            "Do: --target COLUMN.",
            code="DATA116",
        )
    pairs = {split: ColumnPairs(part, picture, target[0]) for split, part in splits.items()}
    return replace(arrays.open_datasets(pairs, f"hf:{name}", options), takes=frozenset({"target", "task"}))


def read_hub(name: str) -> dict[str, Any]:
    """The splits of a dataset of the Hugging Face hub, or in a folder, by `datasets`; MissingDependency without."""
    folder, _, config = name.partition(":")
    if not folder:
        raise DataError("hf: needs the name of a dataset; got none. Give hf:NAME.", code="DATA101")
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency(
            f'hf:{name}: needs the package datasets; got no such package. Do: pip install "ane_trainer[hf]".'
        ) from error
    try:
        if Path(folder, "dataset_dict.json").exists() or Path(folder, "dataset_info.json").exists():
            loaded = datasets.load_from_disk(folder)
        else:
            loaded = datasets.load_dataset(folder, config or None)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hf:{name}: needs a dataset that `datasets` can load; {str(error).splitlines()[0]}. Check the name.",
            code="DATA115",
        ) from None
    return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}


@dataclass(frozen=True)
class ColumnPairs:
    """Two columns of a dataset of `datasets` as items (x, y)."""

    dataset: Any
    x: str
    y: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[object, object]:
        item = self.dataset[row]
        return item[self.x], item[self.y]

    @property
    def targets(self) -> list[object]:
        """The targets of all items."""
        return list(self.dataset[self.y])

    @property
    def classes(self) -> list[str]:
        """The names of the classes, where the dataset has them."""
        return list(getattr(self.dataset.features[self.y], "names", None) or ())
