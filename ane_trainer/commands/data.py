"""`data list`, `data fetch`: which datasets are known, which are cached, and fetching one early."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ane_trainer.commands.options import Output, table


def data_list() -> Output:
    """List the known datasets, and which of them are in the cache."""
    rows = dataset_rows()
    lines = table([(row["name"], row["status"], row["folder"]) for row in rows], left=range(3))
    return Output({"datasets": rows}, "\n".join(lines))


def data_fetch(
    dataset: Annotated[str, typer.Argument(help="A name that `data list` shows.", metavar="DATASET")],
    root: Annotated[
        Path | None, typer.Option(help="Folder for the files (default: the user's cache).", metavar="DIR")
    ] = None,
) -> Output:
    """Download a dataset, verified, so that training works offline."""
    found = fetch_dataset(dataset, root)
    return Output(found, f"{found['name']}: verified, from {found['source']}; in {found['folder']}")


def dataset_rows(root: str | Path | None = None) -> list[dict[str, Any]]:
    """One row a dataset: name, status (cached, to fetch, bundled), folder, shape and number of classes."""
    from ane_trainer.training.datasets.fetch import default_root
    from ane_trainer.training.datasets.table import DATASETS

    rows = []
    for info in DATASETS.values():
        folder = (Path(root) if root is not None else default_root()) / info.folder / "raw"
        cached = all(
            (folder / f.name).exists() and (folder / f.name).stat().st_size == f.raw_bytes for f in info.files
        ) and all((folder / archive.name).exists() for archive in info.archives)
        bundled = not info.files and not info.archives
        status = "bundled" if bundled else "cached" if cached else "to fetch"
        place = "scikit-learn" if bundled else str(folder)
        shape, classes = list(info.in_shape), len(info.class_names)
        rows.append(
            {"name": info.name, "status": status, "folder": place, "shape": shape, "classes": classes}
        )
    return rows


def fetch_dataset(name: str, root: str | Path | None = None) -> dict[str, object]:
    """Fetch and verify a dataset; where it came from and where it lies."""
    from ane_trainer.data import find_dataset, load_dataset

    info = find_dataset(name)
    train, test = load_dataset(info.name, root=root)
    row = next(row for row in dataset_rows(root) if row["name"] == info.name)
    return {**row, "source": train.source, "train": train.num_examples, "test": test.num_examples}
