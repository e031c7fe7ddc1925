"""Tests of the datasets that come as archives, on small files of the published formats that the test writes."""

import gzip
import hashlib
import io
import pickle
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from ane_trainer.ane.errors import DataError
from ane_trainer.training.datasets import known
from ane_trainer.training.datasets.local import build_idx
from ane_trainer.training.datasets.table import CIFAR_10, CIFAR_100, DATASETS, DIGITS, EMNIST, KMNIST, Archive

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (7, 28, 28)).astype(np.uint8)
LABELS = (np.arange(7) % 10).astype(np.uint8)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home and working folder."""
    for variable in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def publish(info, folder, bodies):
    """Lay the archives where torchvision does; the table's entry with their real checksums, and no mirrors."""
    folder.mkdir(parents=True, exist_ok=True)
    for archive, body in zip(info.archives, bodies, strict=True):
        (folder / archive.name).write_bytes(body)
    archives = tuple(Archive(archive.name, hashlib.md5(body).hexdigest())
                     for archive, body in zip(info.archives, bodies, strict=True))  # fmt: skip
    return replace(info, archives=archives, mirrors=())


def test_kmnist(tmp_path):
    idx = [build_idx(array) for array in (IMAGES, LABELS, IMAGES[:3], LABELS[:3])]
    info = publish(KMNIST, tmp_path / "work" / "data" / "KMNIST" / "raw", [gzip.compress(raw) for raw in idx])
    loaded = known.load(info)
    assert np.array_equal(loaded.splits["train"][0], IMAGES)
    assert np.array_equal(loaded.splits["test"][1], LABELS[:3])


def test_emnist_is_turned_upright_and_letters_count_from_one(tmp_path):
    letters = next(info for info in EMNIST if info.name == "emnist-letters")
    assert "".join(letters.class_names) == "abcdefghijklmnopqrstuvwxyz"
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as box:
        for part in ("train", "test"):
            for what, array in (
                ("images-idx3", IMAGES.transpose(0, 2, 1)),
                ("labels-idx1", LABELS + np.uint8(1)),
            ):
                name = f"gzip/emnist-letters-{part}-{what}-ubyte.gz"
                box.writestr(name, gzip.compress(build_idx(np.ascontiguousarray(array))))
    loaded = known.load(publish(letters, tmp_path / "root", [body.getvalue()]), tmp_path / "root")
    assert np.array_equal(loaded.splits["train"][0], IMAGES)
    assert np.array_equal(loaded.splits["train"][1], LABELS)
    assert [len(info.class_names) for info in EMNIST] == [47, 26, 10, 10, 62, 47]


def cifar_archive(info, contents):
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as box:
        for name, content in contents.items():
            data = pickle.dumps(content, protocol=3)
            entry = tarfile.TarInfo(f"{info.folder}/{name}")
            entry.size = len(data)
            box.addfile(entry, io.BytesIO(data))
    return body.getvalue()


def test_cifar(tmp_path):
    pixels = RANDOM.integers(0, 256, (4, 3072)).astype(np.uint8)
    batches = {name: {"data": pixels + np.uint8(n), "labels": [0, 9, 3, n]}
               for n, name in enumerate(CIFAR_10.members)}  # fmt: skip
    info = publish(CIFAR_10, tmp_path / "root", [cifar_archive(CIFAR_10, batches)])
    loaded = known.load(info, tmp_path / "root")
    assert loaded.splits["train"][0].shape == (20, 3072)
    assert loaded.splits["train"][1][3::4].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(loaded.splits["test"][0], pixels + np.uint8(5))
    fine = {name: {"data": pixels, "fine_labels": [0, 1, 2, 99], "coarse_labels": [0] * 4}
            for name in CIFAR_100.members}  # fmt: skip
    fine["meta"] = {"fine_label_names": [f"name {n}" for n in range(100)]}
    info = publish(CIFAR_100, tmp_path / "root", [cifar_archive(CIFAR_100, fine)])
    loaded = known.load(info, tmp_path / "root")
    assert loaded.class_names[99] == "name 99"
    assert loaded.splits["test"][1].tolist() == [0, 1, 2, 99]


def test_a_wrong_or_harmful_archive_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    contents = {name: Evil() for name in CIFAR_10.members}
    info = publish(CIFAR_10, tmp_path / "root", [cifar_archive(CIFAR_10, contents)])
    with pytest.raises(DataError, match=r"builtin.*print") as caught:
        known.load(info, tmp_path / "root")
    assert caught.value.code == "DATA112"
    with pytest.raises(DataError, match="wrong content") as caught:
        known.load(replace(CIFAR_10, mirrors=()), tmp_path / "root")
    assert caught.value.code == "DATA110"


def test_names():
    assert known.find("EMNIST").name == "emnist-balanced"
    assert known.find("CIFAR10") is CIFAR_10
    assert known.find("emnist_letters").name == "emnist-letters"
    assert known.find("nothing") is None
    assert len(DATASETS) == 12


def test_examples_stated_ahead_are_those_of_the_files():
    for info in DATASETS.values():
        if info.files:
            assert info.files[0].raw_bytes == 16 + 28 * 28 * info.train_examples
    assert DIGITS.train_examples == len(known.load(DIGITS).splits["train"][1])
