"""Tables and texts as people have them: other separators, alphabets and ways to write numbers."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ane_trainer.ane.errors import DataError
from ane_trainer.data import DataOptions, open_data

ROWS = [(k % 7, "aéz"[k % 3], k * 37 % 11 + 0.25, ("no", "yes")[k % 2]) for k in range(60)]


def table(delimiter: str = ",", comma: str = ".", thousands: str = "") -> str:
    def text(cell: object) -> str:
        if isinstance(cell, float):
            return f"{cell * 1000:_.2f}".replace(".", comma).replace("_", thousands)
        return str(cell)

    lines = [delimiter.join(("n", "kind", "size", "y"))]
    lines += [delimiter.join(map(text, row)) for row in ROWS]
    return "\n".join(lines) + "\n"


def opened(path: Path, data: bytes) -> torch.Tensor:
    path.write_bytes(data)
    splits = open_data(path, DataOptions(target=("y",), val_split=0.0, shuffle=False))
    assert [column.kind for column in splits.description.columns] == ["number", "category", "number"]
    return torch.cat([x for x, _ in splits.train])


FORMS = {
    "semicolons": table(";"), "tabs": table("\t"), "bars": table("|"), "decimal commas": table(";", ","),
    "decimal commas and points": table(";", ",", "."), "spaces": table("; "),
    "windows lines": table().replace("\n", "\r\n"), "old lines": table().replace("\n", "\r"),
    "quotes": "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in table().splitlines()),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_the_same_in_any_usual_form(form: str, tmp_path: Path) -> None:
    plain = opened(tmp_path / "t.csv", table().encode())
    assert torch.equal(opened(tmp_path / "u.csv", FORMS[form].encode()), plain)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_a_table_is_the_same_in_any_usual_alphabet(encoding: str, tmp_path: Path) -> None:
    plain = opened(tmp_path / "t.csv", table().encode())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(opened(tmp_path / "u.csv", table().encode(encoding)), plain)
    assert [("read as Windows-1252, where that byte is 'é'" in str(each.message)) for each in told] == (
        [True] if encoding == "cp1252" else []
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"n,y\n1,\xff\x90\n", "a byte 0xff in line 2 that is no UTF-8"), (b"n,y\n1,\0\n", "zero bytes"),
     (b"\xff\xfen\0,", "a byte 0x2c in line 1 that is no UTF-16"), (b"", "no line"),
     (b"0,1,0\n3,4,5\n", "numbers in its first line")],
)  # fmt: skip
def test_what_is_no_table_is_said(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(DataError, match=said):
        open_data(tmp_path / "t.csv", DataOptions(target=("y",)))


def test_texts_that_are_meant_as_numbers_or_dates_are_told(tmp_path: Path) -> None:
    lines = "\n".join(
        f'{k},$1.{k % 3},{1 + k % 12}/{1 + k % 28}/2024,"{k},000",{k % 9},1,2,3,4,5,6,{k % 4}.5'
        for k in range(60)
    )
    (tmp_path / "t.csv").write_text(f"key,price,day,many,a,c,d,e,f,g,h,y\n{lines}\n")
    notes = open_data(tmp_path / "t.csv", DataOptions(target=("y",))).description.notes
    assert notes[0] == "column 'price' holds texts such as '$1.0': each is a category, not a number"
    assert "'day' is left out: 5" in notes[1]
    assert "such as '1/1/2024'; write dates as 2024-12-31" in notes[1]
    assert "such as '0,000'; write numbers as 1234.5" in notes[2]
    assert (
        notes[3] == "columns 'c', 'd', 'e', 'f' and 2 more are left out: the same value in all training rows"
    )


def test_commas_with_three_digits_may_be_thousands_and_stay_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("n;y\n" + "\n".join(f"{k % 7},250;{k % 4}.5" for k in range(60)))
    notes = open_data(tmp_path / "t.csv", DataOptions(target=("y",))).description.notes
    assert notes == ("column 'n' holds texts such as '0,250': each is a category, not a number",)


def test_parquet_columns_of_lists_are_left_out_and_names_twice_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "a": [1, None, 3] * 20,
        "b": [[1, 2], [3], []] * 20,
        "s": ["[x]", "[y]", None] * 20,
        "y": [0.5, 1.5, 2] * 20,
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = open_data(tmp_path / "t.parquet", DataOptions(target=("y",))).description
    assert [column.name for column in found.columns] == ["a", "s"]
    assert found.notes == ("column 'b' is left out: lists or records, not single values",)
    twice = pa.table([pa.array([1, 2]), pa.array([1, 2]), pa.array([1.5, 2])], names=["a", "a", "y"])
    parquet.write_table(twice, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="two columns called 'a'"):
        open_data(tmp_path / "t.parquet", DataOptions(target=("y",)))


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
@pytest.mark.filterwarnings("ignore:.*read as Windows-1252")
def test_a_text_is_the_same_in_any_usual_alphabet(encoding: str, tmp_path: Path) -> None:
    text = "déjà vu. " * 60
    found = []
    for name, how in (("t.txt", "utf-8"), ("u.txt", encoding)):
        (tmp_path / name).write_bytes(text.encode(how))
        splits = open_data(tmp_path / name, DataOptions(context=8))
        found.append((splits.description.vocabulary, splits.train.images))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_floats_that_are_whole_and_few_are_classes_in_arrays_as_in_tables(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.eye(60), y=np.arange(60) % 3 * 1.0)
    found = open_data(tmp_path / "d.npz").description
    assert (found.task, found.class_names) == ("classify", ("0", "1", "2"))
    np.savez(tmp_path / "d.npz", x=np.eye(60), y=np.arange(60) * 1.0)
    assert open_data(tmp_path / "d.npz").description.task == "regress"
    np.savez(tmp_path / "d.npz", x=np.eye(60)[:1], y=np.zeros(1, int))
    with pytest.raises(DataError, match="two or more classes"):
        open_data(tmp_path / "d.npz")
