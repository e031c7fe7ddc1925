"""Damaged files and impossible wishes: each ends in coded lines that name what is wrong, and nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

from ane_trainer import Trainer
from ane_trainer.ane.errors import AneTrainerError, Interrupted
from ane_trainer.ane.export.package import Description, write_package
from ane_trainer.ane.mil.loading import load_program
from ane_trainer.cli import run_command
from ane_trainer.core import run_training
from ane_trainer.training.config import make_config
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.report import Reporter

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)
    def forward(self, x):
        return self.layer(x)
class Needs(Net):
    def __init__(self, width):
        super().__init__()
class Init(Net):
    def __init__(self):
        raise ValueError("not built")
class Forward(Net):
    def forward(self, x):
        return x.missing
class One(Net):
    def forward(self, x):
        return self.layer(x).mean(dim=(1, 2, 3))
class Exits(Net):
    def __init__(self):
        raise SystemExit(7)
def build():
    return Net()
def three():
    return 3
"""
PROGRAM = """program(1.3)
[buildInfo = dict<string, string>({{"coremlc-version", "1"}})]
{
    func main<ios18>(tensor<fp16, [2, 64]> x) {
            tensor<fp16, [2, 64]> w = const()[name = string("w"),
                val = tensor<fp16, [2, 64]>(BLOBFILE(
                path = string("@model_path/weights.bin"), offset = uint64(64)))];
            tensor<fp16, [2, 64]> y = add(x = x, y = w)[name = string("y")];
        } -> (y);
}
"""
SHORT = ("--limit", "128", "--epochs", "1", "--device", "cpu", "--out", "r")
FILL = ("predict", "cut", "--input")


class Stops(Reporter):
    """Sends Ctrl-C after the seventh step."""

    steps = 0

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        self.steps += 1
        if self.steps == 7:
            os.kill(os.getpid(), signal.SIGINT)


def blob(values: np.ndarray) -> bytes:
    """A weight file with one array: header, descriptor at 64, data at 128."""
    data = values.tobytes()
    head = (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
    descriptor = b"\xef\xbe\xad\xde" + (1).to_bytes(4, "little") + len(data).to_bytes(8, "little")
    return head.ljust(64, b"\0") + (descriptor + (128).to_bytes(8, "little")).ljust(64, b"\0") + data


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, an interrupted one, a program, a package, model files, arrays."""
    folder = tmp_path_factory.mktemp("template")
    options = {
        "dataset": "digits",
        "limit": 256,
        "batch_size": 64,
        "hidden": (8,),
        "device": "cpu",
        "threads": 1,
    }
    run_training(make_config({**options, "epochs": 1}), out=folder / "done", report=Reporter())
    with pytest.raises(Interrupted):
        run_training(make_config({**options, "epochs": 3}), out=folder / "cut", report=Stops())
    (folder / "p").mkdir()
    (folder / "p" / "model.mil").write_text(PROGRAM)
    (folder / "p" / "weights.bin").write_bytes(blob(np.arange(128, dtype=np.float16)))
    write_package(folder / "m.mlpackage", load_program(folder / "p"), Description())
    (folder / "net.py").write_text(NET)
    for name, text in (("raises.py", "1 / 0\n"), ("exits.py", "raise SystemExit(7)\n"), ("wrong.py", "def f(:\n"),
                       ("imports.py", "import nothing_like_it\n"), ("a.json", "{}")):  # fmt: skip
        (folder / name).write_text(text)
    (folder / "bytes.toml").write_bytes(b"\xff\x00\xfe" * 99)
    (folder / "deep.toml").write_bytes(b"a=" + b"[" * 100_000)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The template's copy as the working folder."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str) -> None:
    """The command ends with this exit code and a coded message that holds `said`."""
    assert run_command(words) == code
    told = capsys.readouterr().err
    assert said in told
    assert told[:3] in ("ANE", "DAT", "CKP", "MIL", "SIM")
    assert "Traceback" not in told


# Files that a run wrote --------------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]


def flip(place: int) -> Damage:
    def change(data: bytes) -> bytes:
        found = bytearray(data)
        found[place] ^= 4
        return bytes(found)

    return change


def put(old: str, new: str) -> Damage:
    def change(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode(), 1)

    return change


def tensors(**named: torch.Tensor) -> Damage:
    return lambda data: save_tensors({name.replace("__", "."): value for name, value in named.items()})


WHOLE = {"fc1__weight": torch.zeros(8, 64), "fc1__bias": torch.zeros(8), "fc2__weight": torch.zeros(10, 8),
         "fc2__bias": torch.zeros(10)}  # fmt: skip
HALF: Damage = lambda data: data[: len(data) // 2]  # noqa: E731
NONE: Damage = lambda data: b""  # noqa: E731
NOISE: Damage = lambda data: np.random.default_rng(0).bytes(1 << 20)  # noqa: E731
HUGE: Damage = lambda data: (1 << 60).to_bytes(8, "little") + data[8:]  # noqa: E731
DEEP: Damage = lambda data: b"[" * 100_000  # noqa: E731


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


PICKLE: Damage = lambda data: pickle.dumps(Evil())  # noqa: E731

CHECKPOINTS: dict[str, Damage] = {
    "truncated": HALF, "empty": NONE, "foreign": NOISE, "huge header": HUGE, "a bit of the tensors": flip(-9),
    "a bit of the header": flip(40), "a pickle": PICKLE, "an epoch": put('\\"epoch\\": 1', '\\"epoch\\": 2'),
    "a stage": put('\\"passed\\": 0', '\\"passed\\": 1'),
    "without tensors": tensors(), "other tensors": tensors(**WHOLE),
}  # fmt: skip


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(
    damage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 1 to 17: alone it is refused and nothing changes; with the one before, the run goes on from that."""
    path, before = folder / "cut" / "checkpoint.safetensors", folder / "cut" / "checkpoint-before.safetensors"
    kept = before.read_bytes()
    path.write_bytes(CHECKPOINTS[damage](path.read_bytes()))
    before.unlink()
    state = content(folder / "cut")
    for words in (("train", "--resume", "cut"), ("evaluate", "cut"), ("predict", "cut", "--index", "0"),
                  ("export", "cut", "--format", "torch")):  # fmt: skip
        refused(capsys, words, 1, "CKPT103 cut/checkpoint.safetensors")
    assert content(folder / "cut") == state
    assert not (folder / "ran").exists()
    before.write_bytes(kept)
    assert run_command(["evaluate", "cut", "--limit", "64"]) == 0
    assert "warning  CKPT103 cut/checkpoint.safetensors" in capsys.readouterr().out
    assert run_command(["train", "--resume", "cut"]) == 0
    assert "the one before is used: CKPT103" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["missing", "a folder"])
def test_a_checkpoint_that_is_none_is_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "cut" / "checkpoint.safetensors"
    path.unlink()
    (folder / "cut" / "checkpoint-before.safetensors").unlink()
    if kind == "a folder":
        path.mkdir()
    refused(capsys, ("evaluate", "cut"), 1, "CKPT102")


WEIGHTS: dict[str, tuple[Damage, str]] = {
    "truncated": (HALF, "CKPT103"), "empty": (NONE, "CKPT103"), "a pickle": (PICKLE, "CKPT103"),
    "a bit": (flip(-9), "CKPT103"), "a bit of the header": (flip(40), "CKPT103"),
    "a key missing": (tensors(fc1__weight=torch.zeros(8, 64)), "CKPT106"),
    "an extra key": (tensors(**WHOLE, other=torch.zeros(1)), "CKPT106"),
    "a shape": (tensors(**{**WHOLE, "fc2__bias": torch.zeros(11)}), "CKPT106"),
    "integers": (tensors(**{**WHOLE, "fc2__bias": torch.zeros(10, dtype=torch.int32)}), "CKPT106"),
    "nan": (tensors(**{**WHOLE, "fc2__bias": torch.full((10,), torch.nan)}), "CKPT107"),
}  # fmt: skip


@pytest.mark.parametrize("damage", WEIGHTS)
def test_damaged_weights_are_refused(damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows 18 to 28."""
    change, code = WEIGHTS[damage]
    path = folder / "done" / "weights.safetensors"
    path.write_bytes(change(path.read_bytes()))
    for words in (("evaluate", "done"), ("predict", "done", "--index", "0")):
        refused(capsys, words, 1, code)
    assert not (folder / "ran").exists()


def test_weights_beyond_the_engine_and_missing_ones_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "done" / "weights.safetensors"
    path.write_bytes(tensors(**{**WHOLE, "fc1__weight": torch.full((8, 64), 1e30)})(b""))
    assert run_command(["evaluate", "done", "--device", "sim", "--limit", "64"]) in (1, 4)
    assert "nan" not in capsys.readouterr().out
    path.unlink()
    assert run_command(["evaluate", "done", "--limit", "64"]) == 0
    assert "these are the weights of checkpoint.safetensors" in capsys.readouterr().out


CONFIGS: dict[str, tuple[Damage, str]] = {
    "bytes": (lambda data: b"\xff\x00" * 99, "ANE105"), "deep": (lambda data: b"a=" + b"[" * 100_000, "ANE105"),
    "empty": (NONE, "dataset is missing"), "cut": (lambda data: data[:-3], "ANE105"),
    "unknown": (lambda data: data + b"epoch = 3\n", "there is no option 'epoch'"),
    "a type": (put("hidden = [8]", 'hidden = ["x"]'), "ANE104"),
    "another model": (put('model = "mlp"', 'model = "cnn"'), "ANE107"),
    "another dataset": (put('dataset = "digits"', 'dataset = "mnist"'), "ANE107"),
    "another seed": (put("seed = 0", "seed = 1"), "seed of its config.toml differ"),
    "another activation": (put('"gelu"', '"relu"'), "activation of its config.toml differ"),
}  # fmt: skip


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_changed_configuration_is_refused(
    damage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 29 to 37, in an interrupted run and in a finished one."""
    change, said = CONFIGS[damage]
    for name in ("cut", "done"):
        path = folder / name / "config.toml"
        path.write_bytes(change(path.read_bytes()))
        before = content(folder / name)
        for words in (
            ("train", "--resume", name, "--epochs", "4"),
            ("evaluate", name),
            ("predict", name, "--index", "0"),
        ):
            refused(capsys, words, 1, said)
        assert content(folder / name) == before


@pytest.mark.parametrize(
    "change", [NONE, HALF, DEEP, put("16.0", "17.0"), put('"0"', '"zero"'), put('"image"', '"table"')]
)
def test_a_changed_description_of_the_data_is_refused(
    change: Damage, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cut", "done"):
        path = folder / name / "data.json"
        path.write_bytes(change(path.read_bytes()))
        for words in (
            ("evaluate", name),
            ("predict", name, "--index", "0"),
            ("train", "--resume", name, "--epochs", "4"),
        ):
            refused(capsys, words, 1, f"CKPT103 {name}/data.json")


@pytest.mark.parametrize("change", [NOISE, NONE, HALF, DEEP, lambda data: b"[]\n7\n", lambda data: b""])
@pytest.mark.parametrize(
    "name", ["result.json", "metrics.jsonl", "metrics.csv", "analysis.json", "report.html"]
)
def test_what_only_tells_of_a_run_blocks_nothing_and_its_damage_is_said(
    name: str, change: Damage, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 38 to 42; a resume writes the epochs anew, out of the checkpoint."""
    path = folder / "done" / name
    data = change(path.read_bytes())
    path.write_bytes(data)
    for words in ("list --root .", "show done", "compare done cut"):
        assert run_command(["runs", *words.split()]) == 0
    told = capsys.readouterr().out
    if name in ("result.json", "metrics.jsonl") and data:
        assert "damaged and left out" in told
    assert run_command(["train", "--resume", "done", "--epochs", "2"]) == 0
    rows = [json.loads(line) for line in (folder / "done" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]


def test_numbers_that_are_none_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in (("train_loss", [1]), ("val_accuracy", "x"), ("epoch", None), ("seconds", True)):
        path = folder / "done" / "metrics.jsonl"
        row = json.loads((path).read_text())
        path.write_text(json.dumps({**row, old: new}) + "\n" + json.dumps(row) + "\n")
        assert run_command(["runs", "show", "done"]) == 0
        assert "1 of 2 lines of metrics.jsonl are damaged" in capsys.readouterr().out
        path.write_text(json.dumps(row) + "\n")
    (folder / "done" / "metrics.jsonl").write_text("")
    refused(capsys, ("runs", "plot", "done"), 1, "needs epochs to draw")


def test_a_run_in_use_is_not_deleted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ane_trainer.training.records import locked

    with locked(folder / "cut"):
        refused(capsys, ("runs", "rm", "done", "cut", "--yes"), 1, "CKPT109 cut")
    assert (folder / "done" / "weights.safetensors").exists()
    assert run_command(["runs", "rm", "done", "cut", "--yes"]) == 0
    assert not (folder / "cut").exists()


# Programs ----------------------------------------------------------------------------------------------------

TEXTS: dict[str, Damage] = {
    "half": HALF, "empty": NONE, "a bit": put("func", "funk"),
    "huge extents": put("[2, 64]", "[99999999999, 99999999999]"),
    "brackets": lambda data: b"(" * 200_000, "an open string": lambda data: data + b'"', "noise": NOISE,
    "letters": lambda data: b"a" * 10_000_000, "zeros": lambda data: bytes(len(data)),
    "a long number": put("uint64(64)", f"uint64({'9' * 5000})"), "utf-16": lambda data: data.decode().encode("utf-16"),
}  # fmt: skip


@pytest.mark.parametrize("damage", TEXTS)
def test_a_damaged_text_is_refused(damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows 49 to 58."""
    path = folder / "p" / "model.mil"
    path.write_bytes(TEXTS[damage](path.read_bytes()))
    refused(capsys, ("run", "p", "--random"), 1, "MIL1")


@pytest.mark.parametrize("change", [lambda data: data[:130], NONE, NOISE, None])
def test_damaged_weights_of_a_program_are_refused(
    change: Damage | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 59 to 61."""
    path = folder / "p" / "weights.bin"
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    refused(capsys, ("run", "p", "--random"), 1, "MIL105")


@pytest.mark.parametrize("file", ["model.mil", "weights.bin", "program.sha256"])
def test_one_bit_of_a_run_s_program_is_noticed(
    file: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 62."""
    from ane_trainer.training.runs import RunFolder

    RunFolder(folder / "p").write_program(PROGRAM, (folder / "p" / "weights.bin").read_bytes())
    (folder / "p" / "model.mil").unlink()
    assert run_command(["run", "p", "--random"]) == 0
    path = folder / "p" / file.replace("model.mil", "program.mil")
    path.write_bytes(flip(-6)(path.read_bytes()))
    refused(capsys, ("run", "p", "--random"), 1, "MIL111 p/")


PACKAGE = "Data/com.apple.CoreML"
PACKAGES: dict[str, tuple[str, Damage | None]] = {
    "manifest foreign": ("Manifest.json", NOISE), "manifest missing": ("Manifest.json", None),
    "manifest deep": ("Manifest.json", DEEP), "manifest empty": ("Manifest.json", lambda data: b"{}"),
    "a path outside": ("Manifest.json", put("com.apple.CoreML/model.mlmodel", "../../../etc/passwd")),
    "model cut": (f"{PACKAGE}/model.mlmodel", HALF), "model foreign": (f"{PACKAGE}/model.mlmodel", NOISE),
    "a bit of the model": (f"{PACKAGE}/model.mlmodel", flip(-30)), "model missing": (f"{PACKAGE}/model.mlmodel", None),
    "weights cut": (f"{PACKAGE}/weights/weight.bin", lambda data: data[:130]),
    "weights missing": (f"{PACKAGE}/weights/weight.bin", None),
    "a bit of the weights": (f"{PACKAGE}/weights/weight.bin", flip(-2)),
}  # fmt: skip


@pytest.mark.parametrize("damage", PACKAGES)
def test_a_damaged_package_is_refused(damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows 63 to 71."""
    name, change = PACKAGES[damage]
    path = folder / "m.mlpackage" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    refused(capsys, ("run", "m.mlpackage", "--random"), 1, "MIL1")


def test_a_package_that_another_tool_wrote_anew_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ane_trainer.ane.mil.coreml_proto import coreml_messages

    assert run_command(["run", "m.mlpackage", "--random"]) == 0
    path = folder / "m.mlpackage" / PACKAGE / "model.mlmodel"
    spec = coreml_messages().Model_pb2.Model.FromString(path.read_bytes())
    spec.description.metadata.author = "somebody"
    path.write_bytes(spec.SerializeToString())
    assert run_command(["run", "m.mlpackage", "--random"]) == 0
    path.unlink()
    shutil.rmtree(folder / "m.mlpackage")
    (folder / "m.mlpackage").write_bytes(b"x")
    capsys.readouterr()
    refused(capsys, ("run", "m.mlpackage", "--random"), 1, "MIL111")


# Inputs of predict and run -----------------------------------------------------------------------------------


def npy(value: object, **options: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, value, **options)


INPUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another shape": (npy(np.zeros((3, 7))), "DATA105"), "no axes": (npy(np.float32(1)), "DATA105"),
    "no examples": (npy(np.zeros((0, 1, 8, 8))), "DATA105"),
    "strings": (npy(np.array(["a"] * 64)), "numbers"), "complex": (npy(np.zeros((1, 1, 8, 8), complex)), "DATA1"),
    "nan": (npy(np.full((1, 1, 8, 8), np.nan)), "DATA106"), "inf": (npy(np.full((1, 1, 8, 8), np.inf)), "DATA106"),
    "objects": (npy(np.array([Evil()], object), allow_pickle=True), "DATA109"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())) and None, "DATA109"),
    "noise": (lambda path: path.write_bytes(NOISE(b"")) and None, "DATA109"),
    "empty": (lambda path: path.write_bytes(b"") and None, "DATA109"),
    "missing": (lambda path: None, "DATA109"),
    "23 TiB": (
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, "
                                      b"'shape': (1048576, 6291456), }".ljust(117) + b"\n" + bytes(99)) and None,
        "DATA109",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", INPUTS)
def test_an_array_that_does_not_do_is_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 72 to 85, on the engine's simulator; what is beyond fp16 is scaled there."""
    write, said = INPUTS[kind]
    write(folder / "in.npy")
    refused(capsys, (*FILL, "in.npy", "--device", "sim"), 1, said)
    assert not (folder / "ran").exists()
    assert "allow_pickle" not in capsys.readouterr().err


def test_bytes_are_pixels_of_the_training_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 86."""
    pixels = np.random.default_rng(0).integers(0, 17, (3, 1, 8, 8))
    told = []
    about = DataDescription.from_json(json.loads((folder / "cut" / "data.json").read_text()))
    for array in (pixels.astype(np.uint8), about.normalise(pixels)):
        np.save("in.npy", array)
        assert run_command([*FILL, "in.npy"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("value", "name", "said"),
    [(np.zeros((3, 2), np.float16), "x", "SIM103"), (np.array([Evil()], object), "x", "SIM108"),
     (np.zeros((2, 64), np.float16), "z", "SIM102")],
)  # fmt: skip
def test_an_input_of_a_program_that_does_not_do_is_refused(
    value: np.ndarray, name: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 87 to 90."""
    np.save("in.npy", value, allow_pickle=True)
    refused(capsys, ("run", "p", "--input", f"{name}=in.npy"), 1, said)


# Words of the command line -----------------------------------------------------------------------------------

DIGITS = ("train", "digits", *SHORT)
WORDS: list[tuple[tuple[str, ...], int, str]] = [
    (("train", "--config", "bytes.toml"), 1, "ANE105 bytes.toml: not TOML"),
    (("train", "--config", "deep.toml"), 1, "ANE105 deep.toml: not TOML"),
    (("train", "digits", "--batch", "4000", "--out", "r"), 1, "DATA102"),
    (("train", "digits", "--limit", "1", "--out", "r"), 1, "DATA102"),
    (("train", "digits", "--limit", "0", "--out", "r"), 1, "got 0. Change --limit"),
    (("train", "digits", "--limit", "100", "--out", "r"), 1, "DATA102"),
    *(((*DIGITS, "--lr", value), 1, f"got {value}") for value in ("0", "-1", "nan", "inf")),
    ((*DIGITS, "--lr", "fast"), 1, "lr needs a number or 'auto'; got 'fast'"),
    ((*DIGITS, "--hidden", "wide"), 1, "got 'wide'"),
    *(((*DIGITS, "--epochs", value), 1, f"got {value}") for value in ("0", "-1")),
    ((*DIGITS, "--lr", "1e6", "--device", "sim"), 1, "got a learning rate of 1000000, which is"),
    *(((*DIGITS, *words), 1, f"got {words[1]}") for words in (
        ("--seed", "-1"), ("--seed", str(2**70)), ("--batch", "0"), ("--threads", "0"), ("--momentum", "2"),
        ("--weight-decay", "-1"), ("--hidden", "0"),
    )),
    ((*DIGITS, "--hidden", "1000000000000"), 2, "ANE211 memory: needs more"),
    *(((*DIGITS, *words), 1, words[1]) for words in (
        ("--model", "mpl"), ("--optimizer", "adamm"), ("--activation", "rel"), ("--loss", "mes"), ("--chip", "m9"),
        ("--device", "gpu"), ("--fidelity", "exakt"), ("--precision", "fp64"), ("--log", "nothing"),
        ("--schedule", "cos"), ("--augment", "turn"), ("--model-arg", "width"), ("--time-limit", "long"),
    )),
    (("train", "digitz", *SHORT), 1, "Did you mean 'digits'"),
    (("train", "digits", "--epoch", "3", "--out", "r"), 1, "--epoch"),
    ((*DIGITS, "--model", "net.py"), 1, "got the file alone. It has: Net, Needs"),
    *(((*DIGITS, "--model", spec), 1, said) for spec, said in (
        ("wrong.py:Net", "ANE102"), ("imports.py:Net", "nothing_like_it"), ("net.py:Missing", "ANE102"),
        ("net.py:three", "needs an nn.Module; got int"), ("net.py:Needs", "ANE103"), ("none.py:Net", "does not exist"),
        ("net.py:", "ANE102"), ("a.json:Net", "ANE102"), ("/etc/passwd:Net", "ANE102"), (".:Net", "ANE102"),
        ("raises.py:Net", "raises.py, line 1"), ("net.py:Init", "in __init__: ValueError: not built"),
        ("net.py:Forward", "net.py, line 17, in forward"),
        ("net.py:Exits", "sys.exit(7)"), ("exits.py:Net", "sys.exit(7)"),
        *((f"net.py:{name}", "the model's output needs the shape [128, classes]") for name in ("Net", "One")),
    )),
    (("check", "nothing.py"), 1, "There is no such file"),
    (("init", "--out", "/dev/null/x.toml"), 2, "ANE204 /dev/null"),
    (("run", "net.py"), 1, "MIL111 net.py: needs a .mil text"),
    (("conformance-read", "a.json"), 1, "DATA113 a.json"),
    (("runs", "show", "p"), 1, "CKPT101 p: needs a run folder"),
    (("evaluate", "p"), 1, "CKPT101"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "said"),
    WORDS,
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_an_impossible_wish_is_refused_and_leaves_nothing(
    words: tuple[str, ...], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 91 to 135."""
    refused(capsys, words, code, said)
    assert not (folder / "r").exists()


def test_a_loss_for_numbers_takes_rows_with_a_single_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 121."""
    assert run_command([*DIGITS, "--loss", "mse"]) == 0
    assert "class numbers become rows of 10" in capsys.readouterr().out


def test_training_that_goes_astray_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 101: by an error where the loss is lost, by a warning where it is finite and huge."""
    words = (
        "train",
        "digits",
        "--limit",
        "256",
        "--epochs",
        "3",
        "--optimizer",
        "sgd",
        "--device",
        "cpu",
        "--out",
        "r",
    )
    code = run_command([*words, "--lr", "50"])
    told = capsys.readouterr()
    assert code == 4 or "warning  the loss has grown from" in told.out


# Data from Python --------------------------------------------------------------------------------------------

X, Y = torch.rand(8, 4), torch.arange(8) % 3
BATCHES: dict[str, Any] = {
    "no batches": [], "label 10": [(X, Y + 8)], "label -1": [(X, Y - 1)], "label -100": [(X, Y - 100)],
    "label 2^40": [(X, Y + 2**40)], "nan": [(X * torch.nan, Y)], "inf": [(X + torch.inf, Y)],
    "a triple": [(X, Y, Y)], "strings": [("a", "b")], "a lone tensor": [X], "a number": 5,
    "another shape": [(X, Y), (torch.rand(8, 5), Y)], "pixels": [((X * 255).byte(), Y)],
    "complex": [(X.to(torch.complex64), Y)], "fractions as labels": [(X, Y + 0.5)], "lengths": [(X, Y[:3])],
    "an empty batch": [(X[:0], Y[:0])], "a dict of batches": {"train": X},
}  # fmt: skip


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_that_do_not_do_are_refused(kind: str) -> None:
    """Rows 136 to 157."""
    with pytest.raises(AneTrainerError) as caught:
        Trainer(torch.nn.Linear(4, 3), device="sim", threads=1, report=Reporter(), verify="off").fit(
            BATCHES[kind]
        )
    assert caught.value.code.startswith("DATA")
    assert "got tuple" not in str(caught.value) or kind in ("a triple", "strings")


@pytest.mark.parametrize(
    "kind", ["label 10", "another shape", "nan", "lengths", "fractions as labels", "pixels"]
)
def test_validation_batches_that_do_not_do_are_refused(kind: str) -> None:
    with pytest.raises(AneTrainerError) as caught:
        Trainer(torch.nn.Linear(4, 3), device="cpu", report=Reporter()).fit([(X, Y)], val=BATCHES[kind][-1:])
    assert caught.value.code.startswith("DATA")


@pytest.mark.parametrize("kind", ["numpy", "float64", "float labels", "generator", "lists"])
def test_batches_in_other_forms_do(kind: str) -> None:
    forms: dict[str, Any] = {
        "numpy": [(X.numpy(), Y.numpy())], "float64": [(X.double(), Y)], "float labels": [(X, Y.float())],
        "generator": ((X, Y) for _ in range(2)), "lists": [[X, Y]],
    }  # fmt: skip
    assert Trainer(torch.nn.Linear(4, 3), device="cpu", report=Reporter()).fit(forms[kind]).steps >= 1


@pytest.mark.parametrize("epochs", [-1, 1.5, True, "3"])
def test_a_number_of_epochs_that_is_none_is_refused(epochs: Any) -> None:
    with pytest.raises(AneTrainerError) as caught:
        Trainer(torch.nn.Linear(4, 3), device="cpu", report=Reporter()).fit([(X, Y)], epochs=epochs)
    assert caught.value.code == "ANE104"
