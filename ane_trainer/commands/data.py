"""What the command line shows of datasets: which are known, which are cached, and fetching one early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ane_trainer.data import DATASETS, default_root, find_dataset, load_dataset


def dataset_rows(root: str | Path | None = None) -> list[dict[str, Any]]:
    """One row a dataset: name, status (cached, to fetch, bundled), folder, shape and number of classes."""
    rows = []
    for info in DATASETS.values():
        folder = (Path(root) if root is not None else default_root()) / info.folder / "raw"
        cached = all(
            (folder / f.name).exists() and (folder / f.name).stat().st_size == f.raw_bytes for f in info.files
        )
        status = "bundled" if not info.files else "cached" if cached else "to fetch"
        place = "scikit-learn" if not info.files else str(folder)
        shape, classes = list(info.in_shape), len(info.class_names)
        rows.append(
            {"name": info.name, "status": status, "folder": place, "shape": shape, "classes": classes}
        )
    return rows


def fetch_dataset(name: str, root: str | Path | None = None) -> dict[str, Any]:
    """Fetch and verify a dataset; where it came from and where it lies."""
    info = find_dataset(name)
    train, test = load_dataset(info.name, root=root)
    row = next(row for row in dataset_rows(root) if row["name"] == info.name)
    return {**row, "source": train.source, "train": train.num_examples, "test": test.num_examples}
