"""What a fingerprint of data sees: every number, every byte of a file, and no more than that."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ane_trainer.ane.errors import DataError
from ane_trainer.training.datasets import content, digests
from ane_trainer.training.datasets.arrays import open_items
from ane_trainer.training.datasets.batches import ArrayExamples, Examples, Subset
from ane_trainer.training.datasets.content import fingerprint
from ane_trainer.training.datasets.digests import digest_of


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(digests, "folder", lambda: tmp_path / "digests")
    return tmp_path / "digests"


def parts(x: np.ndarray, rows: tuple[int, ...] = (3, 1, 2)) -> dict[str, Examples]:
    whole = ArrayExamples(x, np.arange(len(x)) % 3)
    return {"train": Subset(whole, np.array(rows)), "val": Subset(whole, np.array([0]))}


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_every_number_and_every_row_counts(dtype: type) -> None:
    x = np.zeros((3000, 5), dtype)
    first = fingerprint(parts(x))
    assert fingerprint(parts(x.copy())) == first
    for row in (0, 1, 1777, 2999):
        other = x.copy()
        other[row, 3] = 1
        assert fingerprint(parts(other)) != first
    assert fingerprint(parts(x, (1, 3, 2))) != first


def test_of_arrays_beyond_the_limit_some_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "WHOLE", 1000)
    x = np.zeros((3000, 5), np.float32)
    first, other = fingerprint(parts(x)), x.copy()
    other[0] = 1
    assert fingerprint(parts(other)) != first
    assert fingerprint(parts(x[:2999])) != first


class Drawn(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Items with noise: of the generators that are seeded, or of the system."""

    def __init__(self, seeded: bool, shift: float = 0.0) -> None:
        self.seeded, self.shift = seeded, shift

    def __len__(self) -> int:
        return 90

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(4) if self.seeded else torch.from_numpy(np.random.default_rng().random(4)).float()
        return noise + self.shift, row % 3


def test_a_dataset_s_items_count_where_the_seed_settles_them() -> None:
    def of(*arguments: float) -> str:
        return fingerprint({"train": open_items(Drawn(*arguments))})  # type: ignore[arg-type]

    assert of(True) == of(True) != of(True, 1.0)
    assert of(False) == of(False) == of(False, 1.0)


def files(folder: Path, count: int = 20) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{k}.bin" for k in range(count)]
    for k, path in enumerate(paths):
        path.write_bytes(bytes([k]) * 100)
        os.utime(path, (1e9, 1e9))
    return paths


def test_every_byte_of_a_file_counts_and_a_file_is_read_once(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    of_file = digests._of_file
    monkeypatch.setattr(digests, "_of_file", lambda name: (read.append(name), of_file(name))[1])
    paths = files(tmp_path / "d")
    first = digest_of(paths)
    assert (digest_of(paths), len(read)) == (first, 20)
    paths[7].write_bytes(bytes([7]) * 99 + b"x")
    changed = digest_of(paths)
    assert (changed != first, read[20:]) == (True, [str(paths[7])])
    digest_of(paths)  # written to just now: a further change could have the same time
    assert read[21:] == [str(paths[7])]
    for damage in (b"", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000):
        for kept in place.iterdir():
            kept.write_bytes(damage)
        assert digest_of(paths) == changed
    paths[7].write_bytes(bytes([7]) * 100)
    assert digest_of(paths) == first
    paths[3].unlink()
    with pytest.raises(DataError, match=r"3\.bin: needs a file that can be read"):
        digest_of(paths)


def test_where_nothing_can_be_kept_files_are_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = files(tmp_path / "d")
    first = digest_of(paths)
    (tmp_path / "file").touch()
    monkeypatch.setattr(digests, "folder", lambda: tmp_path / "file" / "below")
    assert digest_of(paths) == first
    monkeypatch.setattr(digests, "WHOLE", 500)  # and of many bytes some files, but the sizes of all
    some = digest_of(paths)
    paths[1].write_bytes(b"x" * 101)
    assert digest_of(paths) != some
