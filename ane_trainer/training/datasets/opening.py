"""`open_data`: whatever a user names or passes as data, as described batches for training, validation and test.

A known name, a folder of images, a CSV, Parquet, .npz or text file, `hf:NAME`, `file.py:function`, arrays,
a data frame, or a torch dataset. What can be found out is found out; what was decided is in the description.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data import Subset as Part

from ane_trainer.ane.errors import DataError
from ane_trainer.training.datasets import arrays, hub, images, known, tables, text
from ane_trainer.training.datasets.array_files import read_npz
from ane_trainer.training.datasets.augment import parse_augmentations
from ane_trainer.training.datasets.batches import (
    AHEAD,
    ArrayExamples,
    Batches,
    Examples,
    Subset,
    in_background,
)
from ane_trainer.training.datasets.content import all_alike, fingerprint
from ane_trainer.training.datasets.kinds import other_kind
from ane_trainer.training.datasets.splits import DataOptions, Parts, Splits, divide_rows, limited
from ane_trainer.training.networks.user import load_model_class
from ane_trainer.utils import did_you_mean

#: Said of inputs that do not differ.
ALIKE = "the training examples are all alike: there is nothing in them to learn from"


def open_data(data: object, options: DataOptions | None = None) -> Splits:
    """Open `data` (see the module) as batches; DataError says what is wrong with it and where."""
    chosen = options or DataOptions()
    where = str(data) if isinstance(data, (str, Path)) else "data"
    chosen.check(where)
    parts = _open(data, chosen)
    parts.refuse_unused(chosen, where)
    return _assemble(parts, chosen, where)


def _open(data: object, options: DataOptions) -> Parts:
    if not isinstance(data, (str, Path)):
        return _open_object(data, "data", options)
    spec, path = str(data), Path(data).expanduser()
    if not spec:
        raise DataError("dataset: needs a name, a file or a folder; got nothing. Give one.", code="DATA101")
    if isinstance(data, str) and (info := known.find(spec)) is not None:
        parts = _open_known(info, options)
        if path.is_dir():
            note = f"this is the known dataset; for the folder of that name give ./{spec}"
            parts = replace(parts, description=replace(parts.description, notes=(note,)))
        return parts
    if spec.startswith("hf:"):
        return hub.open_hub(spec.removeprefix("hf:"), options)
    if ".py:" in spec:
        return _open_object(
            arrays.call_with_seed(load_model_class(spec, "data"), options.seed), spec, options
        )
    if path.is_dir():
        return _open_folder(path, options)
    if path.is_file():
        return _open_file(path, options)
    if path.exists():
        names = ", ".join(sorted(known.NAMES))
        got, help = ", which is neither a file nor a folder", f"Known: {names}."
    elif "://" in spec:
        got, help = ", an address", "Download it, and give the file."
    elif any(sign in spec for sign in "*?["):
        got, help = ", a pattern", "Give one file or folder."
    else:
        got, help = ", which does not exist", did_you_mean(spec, known.NAMES)
    raise DataError(
        f"dataset: needs a known name, a file or a folder; got {spec!r}{got}. {help}", code="DATA101"
    )


def _open_file(path: Path, options: DataOptions) -> Parts:
    suffix = path.suffix.lower()
    if suffix in tables.SUFFIXES:
        return tables.open_tables({"train": tables.read_table(path)}, str(path), options)
    if suffix == ".npz":
        return arrays.open_arrays(read_npz(path), str(path), options)
    if suffix in text.SUFFIXES:
        return text.open_text(path, options)
    if suffix == ".py":
        raise DataError(
            f"{path}: needs the name of a function in it that returns the data; got none. "
            f"Give {path}:FUNCTION.",
            code="DATA115",
        )
    got, help = other_kind(path) or (repr(suffix or "no ending"), "Rename or convert it.")
    raise DataError(
        f"{path}: needs a folder of images, or a file that ends in {', '.join(tables.SUFFIXES)}, .npz or "
        f"{', '.join(text.SUFFIXES)}; got {got}. {help}",
        code="DATA115",
    )


def _open_folder(path: Path, options: DataOptions) -> Parts:
    """Tables called train, val, test, or images by class."""
    found = {p.stem.lower(): p for p in sorted(path.iterdir()) if p.suffix.lower() in tables.SUFFIXES}
    by_split = {images.SPLIT_FOLDERS[name]: p for name, p in found.items() if name in images.SPLIT_FOLDERS}
    if "train" in by_split:
        read = {split: tables.read_table(p) for split, p in by_split.items()}
        return tables.open_tables(read, str(path), options)
    return images.open_image_folder(path, options)


def _open_known(info: known.DatasetInfo, options: DataOptions) -> Parts:
    loaded = known.load(info, options.root)
    description = info.describe()
    description = replace(
        description,
        source=loaded.source,
        class_names=loaded.class_names or description.class_names,
        mean=description.mean if options.mean is None else (options.mean,),
        std=description.std if options.std is None else (options.std,),
    )
    parts: dict[str, Examples] = {}
    for (split, (pixels, labels)), limit in zip(loaded.splits.items(), options.limit, strict=True):
        x = np.ascontiguousarray(pixels[:limit]).reshape(-1, *info.in_shape)
        parts[split] = ArrayExamples(x, labels[:limit].astype(np.int64))
    if options.val_split:
        rows = divide_rows(parts["train"].targets(), set(parts), options)
        parts |= {split: Subset(parts["train"], chosen) for split, chosen in rows.items()}
    return Parts(parts, description, is_known=True, takes=frozenset())


def _open_object(data: Any, where: str, options: DataOptions) -> Parts:
    """Arrays (x, y), (train, test) or (train, val, test), a mapping by split, a data frame, torch datasets."""
    by_split = {"train": data} if tables.is_frame(data) else _by_split(data)
    if by_split is None:
        got = (
            f"{type(data).__name__} of {len(data)}"
            if isinstance(data, (tuple, list))
            else type(data).__name__
        )
        raise DataError(
            f"{where}: needs arrays (x, y), a dataset, a data frame, or these by split; got {got}. "
            "Pass e.g. (x, y), or {'train': (x, y), 'test': (x, y)}.",
            code="DATA105",
        )
    if all(arrays.is_pair(part) for part in by_split.values()):
        pairs = {split: (arrays.as_array(x), arrays.as_array(y)) for split, (x, y) in by_split.items()}
        return arrays.open_arrays(pairs, where, options)
    if all(tables.is_frame(part) for part in by_split.values()):
        return tables.open_tables({k: tables.table_of(part) for k, part in by_split.items()}, where, options)
    return arrays.open_datasets(by_split, where, options)


def _by_split(data: object) -> dict[str, Any] | None:
    """Parts by split; None if it is nothing that can be opened."""

    def is_part(part: object) -> bool:
        return arrays.is_pair(part) or arrays.is_dataset(part) or tables.is_frame(part)

    if is_part(data):
        return {"train": data}
    if isinstance(data, Mapping):
        found = {images.SPLIT_FOLDERS[key]: part for key, part in data.items() if key in images.SPLIT_FOLDERS}
        return found if "train" in found and all(map(is_part, found.values())) else None
    if isinstance(data, (tuple, list)) and len(data) in (2, 3) and all(map(is_part, data)):
        names = ("train", "test") if len(data) == 2 else ("train", "val", "test")
        return dict(zip(names, data, strict=True))
    return None


def batches_of(data: object, where: str, seed: int, batch_size: int = 128) -> Any:
    """What can be run through as batches: arrays (x, y) and map-style datasets of examples are batched.

    Numbers stay as they are; PIL images and bytes of a dataset are scaled to 0 .. 1; examples that are dictionaries
    are put together by torch's DataLoader. Anything else that can be iterated is taken for batches. DataError DATA105
    for what cannot.
    """
    if arrays.is_pair(data) or (arrays.is_dataset(data) and arrays.holds_examples(data)):
        examples, description = arrays.unscaled(data, where)
        return Batches(examples, description, batch_size=batch_size, seed=seed, shuffle=where == "train")
    if arrays.is_dataset(data) and arrays.holds_records(cast("Sequence[object]", data)):
        return DataLoader(cast("Dataset[object]", data), batch_size, shuffle=where == "train")
    iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if not iterable or isinstance(data, (str, bytes, Path, Mapping)):
        got = f"a dictionary of {', '.join(map(repr, data))}" if isinstance(data, Mapping) else repr(data)
        raise DataError(
            f"{where}: needs batches (x, y), e.g. of a DataLoader, arrays (x, y) or a dataset; got {got}. Pass one of "
            "these; what has a name or lies in files is opened by train, test = load_dataset(...).",
            code="DATA105",
        )
    return data


#: Samplers whose order is settled before the first batch, so that batches can be made ahead.
_DRAWN_AT_FIRST = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def by_rows(data: Iterable[Any]) -> Iterable[Any]:
    """The data; a DataLoader over tensors as batches that are taken whole, and ahead in the background.

    The order, the numbers, and what is drawn of generators are those of the loader: it is asked for nothing but to
    pick examples one by one and stack them.
    """
    if type(data) is not DataLoader or data.num_workers or data.batch_sampler is None or data.pin_memory:
        return data
    held = data.dataset
    inner = held.dataset if type(held) is Part else held
    if type(inner) is not TensorDataset or data.collate_fn is not default_collate:
        return data
    return _Rows(data, inner.tensors, held.indices if type(held) is Part else None)


class _Rows:
    """The batches of a loader over tensors; `indices`: the rows that it is about, if not all."""

    def __init__(self, loader: Any, tensors: tuple[torch.Tensor, ...], indices: Any) -> None:
        self._loader, self._tensors = loader, tensors
        self._indices = None if indices is None else torch.as_tensor(indices)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        torch.empty((), dtype=torch.int64).random_(
            generator=self._loader.generator
        )  # as the loader's iterator
        batches = self._loader.batch_sampler
        if type(batches) is BatchSampler and type(batches.sampler) in _DRAWN_AT_FIRST:
            numbers = list(batches)
            yield from in_background(lambda k: self._picked(numbers[k]), range(len(numbers)), AHEAD)
        else:
            yield from map(self._picked, batches)

    def _picked(self, chosen: list[int]) -> tuple[torch.Tensor, ...]:
        rows = torch.as_tensor(chosen)
        rows = rows if self._indices is None else self._indices[rows]
        return tuple(tensor[rows] for tensor in self._tensors)


def _assemble(parts: Parts, options: DataOptions, where: str) -> Splits:
    limits = (None, None) if parts.is_known else options.limit
    examples = {
        split: limited(part, limits[0 if split == "train" else 1], options.seed)
        for split, part in parts.examples.items()
    }
    counts: dict[str, int] = {
        split: len(examples[split]) for split in ("train", "val", "test") if split in examples
    }
    description = replace(parts.description, examples=counts)
    if not parts.is_known:
        alike = (ALIKE,) if all_alike(parts.examples["train"]) else ()
        notes = (*description.notes, *alike)
        description = replace(description, content=fingerprint(parts.examples), notes=notes)
    augment = parse_augmentations(options.augment)
    if (
        augment
        and description.kind == "image"
        and any(
            change.name == "shift" and change.amount >= min(description.in_shape[1:]) for change in augment
        )
    ):
        size = "x".join(map(str, description.in_shape[1:]))
        raise DataError(
            f"{where}: needs shifts that leave something of images of {size}; got {', '.join(map(str, augment))}. "
            "Write e.g. shift=2.",
            code="DATA102",
        )
    if augment and description.kind != "image":
        raise DataError(
            f"{where}: augment needs images; got {description.kind} data. Leave it out.", code="DATA102"
        )
    train = Batches(
        examples["train"], description, split="train", batch_size=options.batch_size, seed=options.seed,
        shuffle=options.shuffle, augment=augment,
        drop_last=parts.is_known if options.drop_last is None else options.drop_last,
    )  # fmt: skip
    if not len(train):
        raise DataError(
            f"{where}: needs at least one full batch; got {train.num_examples:,} training examples for "
            f"batch_size {options.batch_size}. Lower batch_size, raise limit, or keep the smaller batch: "
            "drop_last=False, on the command line --last-batch train.",
            code="DATA102",
        )
    others = {
        split: Batches(part, description, split=split, batch_size=options.batch_size, seed=options.seed)
        for split, part in examples.items()
        if split != "train"
    }
    return Splits(train, others.get("val"), others.get("test"), description)
