"""Damaged input by kinds: files that are something else, targets that are no classes, options of other data."""

from __future__ import annotations

import gzip
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ane_trainer.ane.errors import UsageError
from ane_trainer.core import resume_training
from ane_trainer.training.datasets.opening import open_data
from ane_trainer.training.datasets.splits import DataOptions
from ane_trainer.training.folder.runs import RunFolder
from ane_trainer.training.reporting.report import Reporter
from tests.commands.test_damaged_more import TRAIN, folder, images, parquet, refused, table
from tests.training.test_runs import interrupted

__all__ = ["folder"]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 123\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
TABLE = table(60, lambda k: k / 7).encode()

KINDS = {
    "a page": (PAGE, "got a web page. Download the file itself"),
    "a pointer": (LFS, "got a pointer of Git LFS, not the file itself. Fetch it: git lfs pull"),
    "gzip": (gzip.compress(TABLE), "got a gzip archive. Unpack it"),
    "pdf": (b"%PDF-1.7\n", "got a PDF"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.txt", "t.xls"])
def test_a_file_that_is_something_else_is_told_what_it_is(
    kind: str, name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = KINDS[kind]
    if (name, kind) == ("t.txt", "a page"):
        return  # a text may be the source of a page
    (folder / name).write_bytes(content)
    refused(capsys, ("train", name, *(("--target", "y") if name != "t.txt" else ()), *TRAIN), said)


def test_arrays_images_and_workbooks_are_told_what_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "d.npz").write_bytes(LFS)
    refused(capsys, ("train", "d.npz", *TRAIN), "it is a pointer of Git LFS")
    images(folder / "d")
    (folder / "d" / "b" / "3.png").write_bytes(LFS)
    refused(
        capsys, ("train", "d", *TRAIN), "3.png: needs an image that can be read; got a pointer of Git LFS"
    )
    with zipfile.ZipFile("t.xlsx", "w") as file:
        file.writestr("[Content_Types].xml", "")
    refused(capsys, ("train", "t.xlsx", *TRAIN), "got an Excel workbook. Save it as CSV")


TARGETS: dict[str, tuple[Callable[[int], object], str]] = {
    "percent": (lambda k: f"{k}%", "got texts such as '0%'. Write numbers as 1234.5"),
    "dates": (lambda k: f"2024-01-{k % 28 + 1:02d}", "got dates such as '2024-01-01'"),
    "one a row": (lambda k: f"name{k}", "got 60 different texts in 60 rows"),
    "lists": (lambda k: f'"[{k % 3}, 1]"', "got lists or records, such as [0, 1]"),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_texts_that_are_no_classes_are_not_taken_for_classes(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, said = TARGETS[kind]
    (folder / "t.csv").write_text(table(60, target))
    refused(capsys, ("train", "t.csv", "--target", "y", *TRAIN), said)


def opened(text: str, **options: object) -> tuple[str, ...]:
    """What is told of a table."""
    Path("t.csv").write_text(text)
    return open_data("t.csv", DataOptions(target=("y",), **options)).description.notes  # type: ignore[arg-type]


def test_tables_as_spreadsheets_write_them(folder: Path) -> None:
    """A line that names the separator, a column name over two lines, row numbers, a column without a name."""
    assert not opened("sep=;\n" + table(60, lambda k: k / 7).replace(",", ";"))
    assert not opened('"f\n(m2)",y\n' + "".join(f"{k % 7},{k / 7}\n" for k in range(60)))
    rows = "".join(f"{k},{k % 7},{k / 7},\n" for k in range(60))
    assert opened("id,f,y,\n" + rows) == (
        "column 'id' is left out: row numbers",
        "column '' is left out: no name",
    )
    assert opened("day,f,y,z\n" + rows.replace(",\n", ",1\n")) == (
        "column 'z' is left out: the same value in all training rows",
    )


def test_tables_that_do_not_fit_say_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train", "t.csv", "--target", "y", *TRAIN)
    for text, said in (
        ('f,y\n"1,2\n', "got quotes that do not fit together"),
        ("   \n1,2\n", "got a blank first line"),
        ("f,y\n1;2\n3;4\n", "got 1 value in row 2 for 2 columns. The separator is ','"),
    ):
        (folder / "t.csv").write_text(text)
        refused(capsys, words, said)


def test_bytes_of_parquet_are_text_and_lists_no_classes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet(folder / "t.parquet", f=list(range(60)), y=[b"a" if k % 2 else b"b" for k in range(60)])
    assert open_data("t.parquet", DataOptions(target=("y",))).description.class_names == ("a", "b")
    parquet(folder / "t.parquet", f=list(range(60)), y=[[k] for k in range(60)])
    refused(capsys, ("train", "t.parquet", "--target", "y", *TRAIN), "lists or records")


def test_targets_without_numbers_and_pixels_without_a_scale_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    days = np.arange("2020-01-01", "2020-03-01", dtype="datetime64[D]")
    np.savez("d.npz", x=np.eye(60), y=days)
    refused(capsys, ("train", "d.npz", *TRAIN), "needs numbers or texts as y; got dtype datetime64[D]")
    for name in "ab":
        (folder / "d" / name).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(np.full((8, 8), k / 4, np.float32)).save(folder / "d" / name / f"{k}.tif")
    refused(capsys, ("train", "d", *TRAIN), "pixels in floating point")


PLACES = {
    "https://example.com/t.csv": "an address. Download it",
    "d/*.png": "a pattern. Give one file or folder",
    "pipe.csv": "which is neither a file nor a folder",
    "tables": "among its files (2 .csv). Of tables name one: tables/a.csv",
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_told_why(place: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.csv")
    (folder / "tables").mkdir()
    for name in "ab":
        (folder / "tables" / f"{name}.csv").write_bytes(TABLE)
    refused(capsys, ("train", place, *TRAIN), PLACES[place])


UNFIT = {
    "a model of images": (("--model", "cnn"), "needs one for a table; got 'cnn', which is for images"),
    "a model of text": (("--model", "gpt"), "got 'gpt', which is for text"),
    "accuracy of numbers": (("--monitor", "val_accuracy", "--patience", "2"), "Do: --monitor val_loss"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_options_of_other_data_are_refused_by_name(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.csv").write_bytes(TABLE)
    words, said = UNFIT[kind]
    refused(capsys, ("train", "t.csv", "--target", "y", *TRAIN, *words), said)
    images(folder / "d")
    refused(capsys, ("train", "d", "--augment", "shift=8", *TRAIN), "needs shifts that leave something")


def test_a_resume_cannot_end_before_where_it_stands(tmp_path: Path) -> None:
    """It took the unfinished second epoch's weights for those of the first one's end."""
    interrupted(tmp_path / "cut", 7, device="cpu", epochs=3)
    before = RunFolder(tmp_path / "cut").read_checkpoint()[0]
    with pytest.raises(UsageError, match="it is in epoch 2"):
        resume_training(tmp_path / "cut", report=Reporter(), epochs=1)
    after = RunFolder(tmp_path / "cut").read_checkpoint()[0]
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert resume_training(tmp_path / "cut", report=Reporter(), epochs=2).epochs == 2


def test_something_else_in_a_file_s_place_is_told_apart_from_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ane_trainer.cli import run_command

    interrupted(tmp_path / "cut", device="cpu")
    (tmp_path / "cut" / "weights.safetensors").mkdir()
    assert run_command(("train", "--resume", str(tmp_path / "cut"))) == 2
    assert "Something else lies there: move it away" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cut" / "weights.safetensors")
    assert run_command(("train", "--resume", str(tmp_path / "cut"))) == 0


def test_a_model_that_hides_its_parameters_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended in torch's own exception for an optimizer without parameters."""
    (folder / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(64, 10)\n"
        "    def parameters(self, recurse=True):\n        return iter(())\n"
    )
    refused(
        capsys,
        ("train", "digits", "--model", "net.py:Net", *TRAIN),
        "Net.parameters(): needs parameters to train",
    )
