"""New examples for a trained model: read with the preprocessing of training, answers in the task's own terms."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.errors import DataError, Diverged, UsageError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.datasets import images, tables, text
from ane_trainer.training.datasets.array_files import load_array
from ane_trainer.training.datasets.arrays import as_model_input
from ane_trainer.training.datasets.batches import Batches
from ane_trainer.training.datasets.cells import cell_text
from ane_trainer.training.datasets.description import Column, DataDescription
from ane_trainer.utils import as_text, atomic_write, printable

#: Image files that are decoded at a time.
CHUNK = 256


@dataclass(frozen=True)
class Inputs:
    """Examples as the model sees them, x [N, *in_shape], with a name for each, and their targets where known."""

    names: tuple[str, ...]
    x: torch.Tensor
    truth: tuple[str | None, ...] = ()

    def first(self, count: int) -> Inputs:
        """The first so many examples."""
        return Inputs(self.names[:count], self.x[:count], self.truth[:count])


def read_inputs(path: Path, description: DataDescription) -> Iterator[Inputs]:
    """The examples in a file or folder, a part at a time.

    DataError: DATA109 an array that is none, DATA115 a damaged file, DATA105 another shape, DATA116 other
    columns, DATA104 nothing there.
    """
    if not path.exists():
        raise DataError(f"predict: needs a file or folder; got {path}, which does not exist.", code="DATA109")
    suffix = path.suffix.lower()
    if description.kind == "image" and (path.is_dir() or suffix in images.SUFFIXES):
        yield from _read_images(path, description)
    elif suffix == ".npy":
        x = _from_array(load_array(path, "predict"), description, str(path))
        yield Inputs(tuple(str(number) for number in range(len(x))), x)
    elif suffix in tables.SUFFIXES and description.kind in ("table", "array"):
        yield _read_table(path, description)
    else:
        wanted = {"image": "an image, a folder of images", "table": "a .csv, .tsv or .parquet file",
                  "text": "--text", "array": "a .csv file"}[description.kind]  # fmt: skip
        raise DataError(f"predict: needs {wanted} or a .npy file for this run; got {path}.", code="DATA109")


def _read_images(path: Path, description: DataDescription) -> Iterator[Inputs]:
    files = images.image_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"predict: needs images; got none in {path}. Give another folder.", code="DATA104")
    channels, height, width = description.in_shape
    for start in range(0, len(files), CHUNK):
        part = files[start : start + CHUNK]
        pixels = np.stack([images.read_image(file, (channels, height, width)) for file in part])
        folders = [as_text(file.parent.name) for file in part]
        known = tuple(name if name in description.class_names else None for name in folders)
        yield Inputs(tuple(map(str, part)), _from_pixels(pixels, description), known)


def _from_pixels(pixels: NDArray[np.uint8], description: DataDescription) -> torch.Tensor:
    """Bytes 0 to 255 on the scale of the training data."""
    scaled = pixels if description.pixel_max == 255 else pixels * np.float32(description.pixel_max / 255)
    return torch.from_numpy(description.normalise(scaled))


def _from_array(array: Array, description: DataDescription, where: str) -> torch.Tensor:
    """Examples [N, *in_shape] from an array with or without batch and channel axes.

    Bytes are pixels of the training data's own scale and are normalised; other numbers are the model's inputs.
    """
    if array.dtype == np.uint8 and array.ndim >= 3 and array.shape[-1] == description.in_shape[0]:
        array = as_model_input(array.reshape(-1, *array.shape[-3:]))
    size = int(np.prod(description.in_shape))
    if not array.size or array.size % size or array.shape[-1] != description.in_shape[-1]:
        raise DataError(
            f"predict: needs examples of shape {list(description.in_shape)}; got {list(array.shape)}. Reshape it.",
            code="DATA105",
        )
    array = np.ascontiguousarray(array).reshape(-1, *description.in_shape)
    if description.kind == "text":
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype == np.uint8 or description.kind == "array":
        return torch.from_numpy(description.normalise(array))
    return torch.from_numpy(array.astype(np.float32))


def _read_table(path: Path, description: DataDescription) -> Inputs:
    table = tables.read_table(path)
    truth: tuple[str | None, ...] = ()
    if len(description.target) == 1 and description.target[0] in table:
        truth = tuple(cell_text(cell) or None for cell in table[description.target[0]].tolist())
    if description.kind == "array":
        numbers = np.stack([cells for cells in table.values() if cells.dtype == np.float64], axis=1)
        x = _from_array(numbers, description, str(path))
    else:
        warn_of_new_categories(table, description.columns, path)
        x = torch.from_numpy(tables.encode_columns(table, description.columns, str(path)))
    return Inputs(tuple(str(number) for number in range(len(x))), x, truth)


def warn_of_new_categories(table: tables.Table, columns: Sequence[Column], path: Path) -> None:
    """Warn of texts that the training rows have not; of a column with many, training knew the commonest only."""
    for column in columns:
        if (
            column.kind != "category"
            or len(column.categories) >= tables.MOST_CATEGORIES
            or column.name not in table
        ):
            continue
        found = {cell_text(cell) for cell in table[column.name].tolist()} - {"", *column.categories}
        if found:
            shown = ", ".join(repr(text) for text in sorted(found)[:3]) + (", ..." if len(found) > 3 else "")
            warnings.warn(
                f"{path}: column {column.name!r} has {shown}, which training has not seen: it counts as none of the "
                "known ones",
                stacklevel=2,
            )


# Answers -----------------------------------------------------------------------------------------------------


def check_output(output: torch.Tensor) -> torch.Tensor:
    """The model's output; Diverged (ANE401) where it is not finite, which no answer comes of."""
    if not bool(output.isfinite().all()):
        raise Diverged(
            "predict: needs outputs that are finite; got nan or inf of these weights. Train again with a lower "
            "learning rate, or look for outliers in the data.",
            code="ANE401",
        )
    return output


def answers(output: torch.Tensor, inputs: Inputs, description: DataDescription) -> list[dict[str, object]]:
    """One record an example: its name, what the model says in the task's terms, the truth where known."""
    tell = {"classify": _class_answer, "multilabel": _label_answer, "regress": _number_answer}.get(
        description.task, _token_answer
    )
    records = []
    for number, (name, row) in enumerate(zip(inputs.names, output, strict=True)):
        truth = {"truth": inputs.truth[number]} if inputs.truth else {}
        records.append({"input": name, **tell(row, description), **truth})
    return records


def target_text(y: Any, description: DataDescription) -> str:
    """A target of the run's own data in the task's terms."""
    if description.task == "classify":
        return description.class_names[int(y)]
    if description.task == "multilabel":
        return ", ".join(name for name, on in zip(description.class_names, y, strict=True) if on) or "(none)"
    if description.task == "regress":
        numbers = zip(np.ravel(y), description.target_mean, description.target_std, strict=True)
        return ", ".join(f"{v * std + mean:.6g}" for v, mean, std in numbers)
    return text.decode_text(np.ravel(y), description.vocabulary)


def _class_answer(logits: torch.Tensor, description: DataDescription) -> dict[str, object]:
    probabilities = logits.softmax(dim=0)
    best = int(probabilities.argmax())
    return {"class": best, "name": description.class_names[best], "probability": float(probabilities[best]),
            "probabilities": [float(p) for p in probabilities]}  # fmt: skip


def _label_answer(logits: torch.Tensor, description: DataDescription) -> dict[str, object]:
    probabilities = dict(zip(description.class_names, map(float, logits.sigmoid()), strict=True))
    return {"labels": [name for name, p in probabilities.items() if p > 0.5], "probabilities": probabilities}


def _number_answer(row: torch.Tensor, description: DataDescription) -> dict[str, Any]:
    mean, std = description.target_mean, description.target_std
    values = [float(v) * s + m for v, m, s in zip(row.reshape(-1), mean, std, strict=True)]
    return {"values": dict(zip(description.class_names, values, strict=True))}


def _token_answer(scores_VT: torch.Tensor, description: DataDescription) -> dict[str, object]:
    best = int(scores_VT[:, -1].argmax())
    return {"next": text.decode_text([best], description.vocabulary)}


def generate(
    predict: Callable[[torch.Tensor], torch.Tensor], prompt: str, description: DataDescription, *,
    tokens: int = 200, temperature: float = 0.0, seed: int = 0,
) -> str:  # fmt: skip
    """Go on with a prompt, a token at a time; temperature 0 takes the likeliest, others draw.

    The window that training used moves along; a prompt shorter than it stands at its beginning.
    """
    context = description.in_shape[0]
    known = text.encode_text(prompt, description.vocabulary, "predict: the prompt").tolist()
    if not known:
        raise DataError("predict: needs a prompt of one character or more; got none.", code="DATA104")
    random = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        window = known[-context:]
        padded = torch.tensor([window + [0] * (context - len(window))])
        scores_V = check_output(predict(padded)[0, :, len(window) - 1])
        if temperature > 0:
            choice = int(torch.multinomial((scores_V.double() / temperature).softmax(0), 1, generator=random))
        else:
            choice = int(scores_V.argmax())
        known.append(choice)
    return text.decode_text(known, description.vocabulary)


def inputs_by_index(held_out: Batches, selection: str) -> Inputs:
    """Held-out examples by number, see `parse_rows`, with their targets."""
    rows = np.array(parse_rows(selection, held_out.num_examples))
    x, y = held_out.examples.take(rows)
    truth = tuple(target_text(row, held_out.description) for row in y)
    return Inputs(tuple(map(str, rows)), held_out.normalise(torch.from_numpy(x)), truth)


def as_lines(records: Sequence[Mapping[str, object]]) -> str:
    """The answers for a terminal, a line each."""
    width = min(max((len(str(record["input"])) for record in records), default=0), 48)
    return "\n".join(f"{printable(str(record['input'])):<{width}}  {_as_text(record)}" for record in records)


def _as_text(record: Mapping[str, Any]) -> str:
    truth = f"   truth {record['truth']}" if record.get("truth") is not None else ""
    if "name" in record:
        return f"{printable(record['name'])}   probability {record['probability']:.4f}{truth}"
    if "labels" in record:
        return f"{', '.join(record['labels']) or '(none)'}{truth}"
    if "values" in record:
        return ", ".join(f"{name} {value:.6g}" for name, value in record["values"].items()) + truth
    return str(record.get("text", record.get("next", "")))


def write_answers(path: Path, records: Sequence[Mapping[str, object]], class_names: Sequence[str]) -> None:
    """Write the answers as .csv (a row each, a column for each probability) or .json.

    UsageError ANE104 for another ending.
    """
    if path.suffix.lower() == ".json":
        atomic_write(path, json.dumps(list(records), indent=2, ensure_ascii=False) + "\n")
        return
    if path.suffix.lower() != ".csv":
        raise UsageError(f"predict: needs --out FILE.csv or FILE.json; got {path}. Rename it.", code="ANE104")
    rows = [_flat(record, class_names) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, buffer.getvalue())


def _flat(record: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, object]:
    row: dict[str, object] = {}
    for key, value in record.items():
        if key == "probabilities":
            pairs = value.items() if isinstance(value, Mapping) else zip(class_names, value, strict=True)
            row |= {f"probability of {name}": p for name, p in pairs}
        elif isinstance(value, Mapping):
            row |= value
        else:
            row[key] = " ".join(value) if isinstance(value, list) else value
    return row


def parse_rows(selection: str, count: int) -> list[int]:
    """Example numbers of "7", "0:10", "3,5,8:12" (the end is not included); DataError DATA108 out of range."""
    chosen: list[int] = []
    for part in selection.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            start = int(first) if first or not colon else 0
            stop = (int(last) if last else count) if colon else start + 1
        except ValueError:
            start, stop = -1, -1
        if not 0 <= start < stop <= count:
            raise DataError(
                f"predict: needs an index from 0 to {count - 1}, or a range like 0:10; got {part!r}. "
                "Choose another.",
                code="DATA108",
            )
        chosen += range(start, stop)
    return chosen
