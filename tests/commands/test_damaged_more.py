"""More damaged input than in test_damaged.py: data of other content, and files that are nearly right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ane_trainer.cli import run_command

TRAIN = ("--epochs", "1", "--device", "cpu", "--threads", "1", "--out", "r")

Write = Callable[[Path], Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str, code: int = 1) -> None:
    """The command ends with this exit code and a coded message that holds `said`."""
    capsys.readouterr()
    assert run_command(words) == code
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert told[0][:3] in ("ANE", "DAT", "CKP")
    assert said in "\n".join(told)
    assert "Traceback" not in "\n".join(told)


def images(root: Path, value: Callable[[int, int], int] = lambda label, k: 90 * label + k) -> None:
    for label, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for k in range(12):
            Image.new("RGB", (8, 8), (value(label, k),) * 3).save(root / name / f"{k}.png")


def table(
    rows: int, target: Callable[[int], object], feature: Callable[[int], object] = lambda k: k % 7
) -> str:
    return "f,y\n" + "".join(f"{feature(k)},{target(k)}\n" for k in range(rows))


def parquet(path: Path, **columns: object) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as file

    file.write_table(pa.table(columns), path)


TABLES: dict[str, tuple[str, str]] = {
    "infinite targets": (table(60, lambda k: (1.5, 2.5, "inf")[k % 3]), "got 'inf'"),
    "a target beyond all floats": (table(60, lambda k: f"{k % 5}e400"), "got '1e400'"),
    "a feature beyond single precision": (table(60, lambda k: k / 7, lambda k: f"{k + 1}e307"), "got '1e307'"),
    "no value of the target": (table(60, lambda k: ""), "DATA104"),
    "one class": (table(60, lambda k: "x"), "There is nothing to learn"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_says_nothing_or_too_much_is_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = TABLES[kind]
    (folder / "t.csv").write_text(text)
    refused(capsys, ("train", "t.csv", "--target", "y", *TRAIN), said)
    assert not (folder / "r").exists()


def test_classes_beyond_2_53_stay_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.csv").write_text(table(60, lambda k: 2**60 + k % 3))
    np.savez(folder / "d.npz", x=np.eye(60), y=np.arange(60) % 3 + 2**60)
    for words in (("t.csv", "--target", "y"), ("d.npz",)):
        assert run_command(("train", *words, *TRAIN)) == 0
        assert f"3 classes ({2**60}, {2**60 + 1}, {2**60 + 2})" in capsys.readouterr().out
        shutil.rmtree(folder / "r")


def test_a_target_twice_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.csv").write_text(table(60, lambda k: k / 7))
    refused(capsys, ("train", "t.csv", "--target", "y,y", *TRAIN), "got 'y' twice")


@pytest.mark.parametrize("kind", ["no rows", "nulls", "no columns"])
def test_an_empty_parquet_file_is_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa = pytest.importorskip("pyarrow")
    columns = {"no rows": {"f": pa.array([], pa.float32()), "y": pa.array([], pa.float32())},
               "nulls": {"f": list(range(60)), "y": pa.nulls(60)}, "no columns": {}}[kind]  # fmt: skip
    parquet(folder / "t.parquet", **columns)
    refused(capsys, ("train", "t.parquet", "--target", "y", *TRAIN), "DATA1")


ARRAYS: dict[str, tuple[Write, str]] = {
    "a .npy in it": (lambda path: (np.save("d.npy", np.eye(9)), os.rename("d.npy", path)), "it holds one array"),
    "no columns": (lambda path: np.savez(path, x=np.zeros((60, 0)), y=np.arange(60) % 3), "got [60, 0]"),
    "x beyond single precision": (lambda path: np.savez(path, x=np.eye(60) * 1e300, y=np.arange(60) % 3), "1e+300"),
    "y beyond single precision": (lambda path: np.savez(path, x=np.eye(60), y=np.arange(60) * 1e300), "5.9e+301"),
    "one class": (lambda path: np.savez(path, x=np.eye(60), y=np.full(60, 2**64 - 1, np.uint64)),
                  "all targets are 18446744073709551615"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_do_not_do_are_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, said = ARRAYS[kind]
    write(folder / "d.npz")
    refused(capsys, ("train", "d.npz", *TRAIN), said)


ITEMS = "class f:\n  def __len__(self): return 40\n  def __getitem__(self, i): return"
SOURCES = {
    "without data": ("def f(): return torch.empty(60, 4, device='meta'), torch.arange(60) % 3", "got Tensor"),
    "rows of unlike lengths": (f"{ITEMS} [[1], [2, 3]], i % 3", "got list"),
    "nothing as x": (f"{ITEMS} None, i % 3", "got NoneType"), "text as x": (f"{ITEMS} 'hello', i % 3", "got text"),
    "targets of unlike lengths": (f"{ITEMS} torch.rand(4), torch.rand(1 + i % 2)", "needs targets of one shape"),
    "one class": ("def f(): return torch.rand(60, 4), torch.zeros(60, dtype=torch.int64)", "all targets are 0"),
    "a length of 10^12": (f"{ITEMS} [1.], 0".replace("40", "10**12"), "its __len__ is 1,000,000,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_a_function_s_data_that_does_not_do_is_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = SOURCES[kind]
    (folder / "source.py").write_text(f"import torch\n{text}\n")
    refused(capsys, ("train", "source.py:f", *TRAIN), said)


def test_sparse_and_half_tensors_are_data(folder: Path) -> None:
    for text in ("torch.eye(60).to_sparse()", "torch.eye(60).bfloat16()"):
        (folder / "source.py").write_text(f"import torch\ndef f(): return {text}, torch.arange(60) % 3\n")
        assert run_command(("train", "source.py:f", *TRAIN)) == 0
        shutil.rmtree(folder / "r")


def test_folders_of_images_that_are_not_as_they_look(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images without a class, an empty class, a link that leads back, names that break lines."""
    images(folder / "imgs")
    refused(capsys, ("train", "imgs/a", *TRAIN), "got 12 images that are in no class")
    (folder / "imgs" / "empty").mkdir()
    os.symlink("..", folder / "imgs" / "a" / "loop")
    os.rename(folder / "imgs" / "b", folder / "imgs" / "b\n\u202eb")
    assert run_command(("train", "imgs", *TRAIN)) == 0
    told = capsys.readouterr().out
    assert "22 train / 2 val" in told
    assert "empty holds no image: left out" in told
    assert r"2 classes (a, b\n\u202eb)" in told


def test_inputs_that_are_all_alike_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(folder / "imgs", lambda label, k: 255)
    np.savez(folder / "d.npz", x=np.ones((60, 3)), y=np.arange(60) % 3)
    for words in ("imgs", "d.npz"):
        assert run_command(("train", words, *TRAIN)) == 0
        assert "the training examples are all alike" in capsys.readouterr().out
        shutil.rmtree(folder / "r")


ITEM = """import torch
class f(torch.utils.data.Dataset):
    def __len__(self): return 60
    def __getitem__(self, k): return torch.rand(4) * {x} + k, k % 3
"""
COUNTED = np.ones((2000, 9)) * np.arange(9)
CHANGES: dict[str, tuple[Write, tuple[str, ...], Write]] = {
    "images between classes": (
        images, (), lambda place: (os.rename(place / "a" / "3.png", place / "x"),
                                   os.rename(place / "b" / "3.png", place / "a" / "3.png"),
                                   os.rename(place / "x", place / "b" / "3.png"))),
    "labels": (lambda place: np.savez(place, x=np.eye(60), y=np.arange(60) % 3), (),
               lambda place: np.savez(place, x=np.eye(60), y=np.arange(60)[::-1] % 3)),
    "order of rows": (lambda place: place.write_text(table(60, lambda k: k / 7)), ("--target", "y"),
                      lambda place: place.write_text(table(60, lambda k: (59 - k) / 7, lambda k: (59 - k) % 7))),
    "text": (lambda place: place.write_text("to be or not to be. " * 200), ("--context", "8"),
             lambda place: place.write_text("eb to or not to be. " * 200)),
    "one pixel": (images, (), lambda place: Image.effect_noise((8, 8), 1).convert("RGB").save(place / "b" / "7.png")),
    "one number of many": (lambda place: np.savez(place, x=COUNTED, y=np.arange(2000) % 3), (),
                           lambda place: np.savez(place, x=COUNTED + np.eye(2000, 9, -1777), y=np.arange(2000) % 3)),
    "an item": (lambda place: place.write_text(ITEM.format(x=1)), (), lambda place: place.write_text(ITEM.format(x=2))),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_data_of_the_same_form_and_other_content_is_noticed(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, options, change = CHANGES[kind]
    name = {"images between classes": "d", "one pixel": "d", "order of rows": "d.csv", "text": "d.txt",
            "an item": "d.py"}.get(kind, "d.npz")  # fmt: skip
    write(folder / name)
    assert run_command(("train", "d.py:f" if kind == "an item" else name, *options, *TRAIN)) == 0
    assert run_command(("evaluate", "r")) == 0
    change(folder / name)
    for words in (("train", "--resume", "r", "--epochs", "2"), ("evaluate", "r")):
        refused(capsys, words, "content of d")


@pytest.fixture
def run(folder: Path) -> Path:
    (folder / "t.csv").write_text(
        "f,kind,y\n" + "".join(f"{k % 7},{'xyz'[k % 3]},{k / 7}\n" for k in range(60))
    )
    assert run_command(("train", "t.csv", "--target", "y", *TRAIN, "--device", "sim")) == 0
    return folder / "r"


def fill(run: Path, value: float) -> None:
    path = run / "weights.safetensors"
    save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(path).items()}, path)


@pytest.mark.filterwarnings("ignore:.*has no header of .train.")
def test_what_a_run_cannot_answer_or_overwrite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exports and answers of weights that are none, outputs on top of inputs, links, other endings."""
    before = {path: path.read_bytes() for path in (*run.iterdir(), Path("t.csv")) if path.is_file()}
    Path("n.csv").write_text("f,kind\n1,q\n")
    with pytest.warns(UserWarning, match="'kind' has 'q', which training has not seen"):
        assert run_command(("predict", "r", "n.csv")) == 0
    refused(capsys, ("predict", "r", "t.csv", "--out", "t.csv"), "needs another file than what is read")
    refused(
        capsys, ("runs", "plot", "r", "--what", "val_loss", "--out", "r/weights.safetensors"), "ends in .svg"
    )
    os.symlink("r", "link")
    refused(capsys, ("runs", "rm", "link", "--yes"), "Name that")
    assert {path: path.read_bytes() for path in before} == before
    fill(run, 1e30)
    for form in ("torch", "mlpackage"):
        refused(
            capsys,
            ("export", "r", "--format", form),
            "DATA106 model: needs parameters that are finite",
        )
    fill(run, 3e38)
    refused(capsys, ("predict", "r", "t.csv", "--device", "cpu"), "ANE401 predict", 4)


MODEL = """import torch
class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
    def forward(self, x):
        x = x.flatten(1)
        {line}
        return self.layer(x)
"""
DIGITS = ("train", "digits", "--limit", "64", "--batch", "64", "--model", "net.py:Net", *TRAIN)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize(
    ("line", "said"),
    [("open('missing.txt')", "FileNotFoundError: [Errno 2] No such file or directory: 'missing.txt'"),
     ("torch.empty(10**13)", "you tried to allocate"), ("raise MemoryError", "line 8, in forward: MemoryError")],
)  # fmt: skip
def test_a_machine_s_fault_in_a_user_s_model_is_told_with_its_line(
    line: str, said: str, device: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "net.py").write_text(MODEL.format(line=line))
    refused(capsys, (*DIGITS, "--device", device), said)


def test_options_that_do_nothing_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "net.py").write_text(MODEL.format(line="pass"))
    refused(capsys, (*DIGITS, "--model-arg", "width=3", "--model-arg", "width=4"), "needs each name once")
    assert run_command((*DIGITS, "--momentum", "0.5", "--lr-decay", "0.5", "--min-delta", "0.1")) == 0
    told = capsys.readouterr().out
    assert "--momentum does nothing: it is of --optimizer sgd, and this is adam" in told
    assert "--lr-decay does nothing: it is of --schedule step or plateau" in told
    assert "--min-delta does nothing without --patience" in told


def test_data_that_was_moved_is_told_its_place_and_has_to_be_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(folder / "d")
    assert run_command(("train", "d", *TRAIN)) == 0
    os.rename("d", "e")
    images(folder / "f", lambda label, k: 80 * label + 2 * k)
    resume = ("train", "--resume", "r", "--epochs", "2")
    for words in (("evaluate", "r"), ("predict", "r", "--index", "0"), ("export", "r", "--format", "torch")):
        refused(capsys, words, "d does not exist any more. If it was moved, say where it is: --data PATH")
        refused(capsys, (*words, "--data", "f"), "content of f differ")
        refused(capsys, (*words, "--data", "digits"), "ANE107 r: needs its own data")
        assert run_command((*words, "--data", "e")) == 0
    refused(capsys, resume, "ane-trainer train NEW-PLACE --resume r")
    refused(capsys, (*resume, "f"), "content of f differ")
    refused(capsys, (*resume, "digits"), "ANE107")
    assert run_command((*resume, "e")) == 0
    assert run_command(("evaluate", "r")) == 0


def test_all_damaged_images_are_counted_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(folder / "d")
    for k in (3, 5, 7):
        (folder / "d" / "b" / f"{k}.png").write_bytes(b"<html>")
    refused(capsys, ("train", "d", *TRAIN), "3.png: needs an image that can be read")
    refused(capsys, ("train", "d", *TRAIN), "So are 2 more.")
