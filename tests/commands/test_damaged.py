"""Damaged files and impossible wishes: each ends in coded lines that name what is wrong, and nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

from ane_trainer import Trainer
from ane_trainer.ane.errors import AneTrainerError, Interrupted, NumericsWarning
from ane_trainer.ane.export.package import Description, write_package
from ane_trainer.ane.mil.loading import load_program
from ane_trainer.cli import run_command
from ane_trainer.core import run_training
from ane_trainer.training.config import make_config
from ane_trainer.training.datasets.description import DataDescription
from ane_trainer.training.reporting.report import Reporter

NET = """
import abc
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
class Bare(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]
class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
class Meta(Net):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10, device="meta")
class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.LazyLinear(10)
class Base(Net):
    def forward(self, x):
        raise BaseException("mine")
class Logarithm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
    def forward(self, x):
        return self.layer(x.flatten(1)).log()
class Root(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.shift = torch.nn.Parameter(torch.full((10,), 0.01))
    def forward(self, x):
        return self.layer(x.flatten(1)) + self.shift.sqrt()
class Abstract(Net, abc.ABC):
    @abc.abstractmethod
    def forward(self, x): ...
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
OWN = """
from torch import nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 4), nn.Linear(4, 10)
    def forward(self, x):
        return self.second(self.first(x.flatten(1)).relu())
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
    path.write_bytes(tensors(**WHOLE)(b""))  # of another program, or stripped of what tells damage
    for words in (["evaluate", "done", "--limit", "64"], ["predict", "done", "--index", "0"]):
        assert run_command(words) == 0
        told = capsys.readouterr()
        assert "weights.safetensors has no header of `train`" in told.out + told.err
    path.unlink()
    assert run_command(["evaluate", "done", "--limit", "64"]) == 0
    assert "these are the weights of checkpoint.safetensors" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="checkpoint.safetensors: the run has not come to its end"):
        assert run_command(["export", "cut", "--format", "torch"]) == 0


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


def test_a_number_beyond_all_floats_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "done" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 10**400}))
    assert run_command(["runs", "show", "done"]) == 0
    assert "steps of result.json are damaged" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["changed", "gone", "noise"])
def test_a_run_s_own_copy_of_a_model_s_file_is_as_it_was(
    damage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.py").write_text(OWN)
    assert run_command((*DIGITS, "--model", "own.py:Own")) == 0
    capsys.readouterr()
    copy, about = folder / "r" / "model.py", folder / "r" / "source.json"
    if damage == "changed":
        copy.write_text(OWN.replace("relu", "tanh"))
    elif damage == "gone":
        copy.unlink()
    else:
        about.write_bytes(b"\xff")
    refused(capsys, ("evaluate", "r"), 1, "needs what `train` wrote")


def test_a_run_in_use_is_not_deleted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ane_trainer.training.folder.records import locked

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
    "an opset to come": put("ios18", "ios99"),
    "a long number": put("uint64(64)", f"uint64({'9' * 5000})"), "utf-16": lambda data: data.decode().encode("utf-16"),
}  # fmt: skip


@pytest.mark.parametrize("damage", TEXTS)
def test_a_damaged_text_is_refused(damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows 49 to 58."""
    path = folder / "p" / "model.mil"
    path.write_bytes(TEXTS[damage](path.read_bytes()))
    refused(capsys, ("run", "p", "--random"), 1, "MIL1")


@pytest.mark.filterwarnings("always:M4 does not take")
@pytest.mark.parametrize("command", ["run p --random", "estimate p", "trace p", "debug p/model.mil"])
def test_a_program_that_the_engine_does_not_take_is_told(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Seven axes: the simulator computes them."""
    path = folder / "p" / "model.mil"
    path.write_text(path.read_text().replace("[2, 64]", "[1, 1, 1, 1, 1, 2, 64]"))
    assert run_command(command.split()) == 0
    told = capsys.readouterr().out + "".join(str(warning.message) for warning in recwarn)
    assert "M4 does not take this program" in told or "the engine refuses add" in told


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
    from ane_trainer.training.folder.runs import RunFolder

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


# Configurations ----------------------------------------------------------------------------------------------

SMALL = 'dataset = "digits"\nlimit = 64\nbatch_size = 16\nepochs = 1\ndevice = "cpu"\n'
SETTINGS: dict[str, tuple[str, str]] = {
    "empty": ("", "ANE104 train: dataset is missing"),
    "a table": (SMALL + "[train]\nlr = 1\n", "there is no option 'train'"),
    "twice": (SMALL + "epochs = 2", "ANE105"),
    "a truth as a number": (SMALL.replace("epochs = 1", "epochs = true"), "epochs: needs a number; got True"),
    "a list as a number": (SMALL + "lr = [1]", "lr needs a number or 'auto'; got [1]"),
    "a date as a number": (SMALL + "lr = 2020-01-01", "lr needs a number or 'auto'"),
    "a zero byte": (SMALL + 'model = "a\\u0000.py:Net"', "needs text without zero bytes"),
    "a target of known data": (SMALL + 'target = "x"', "got target (of tables)"),
    "a task of known data": (SMALL + 'task = "regress"', "got task (of own tables and arrays)"),
    "a size of known data": (SMALL + "size = 9", "got size (of folders of images)"),
    "tokens of known data": (SMALL + 'tokens = "bytes"\ncontext = 9', "got context (of text), tokens (of text)"),
    "a test twice": (SMALL + "test_split = 0.1", "got test_split (of data without a test part)"),
    "everything held out": (SMALL + "val_split = 0.6\ntest_split = 0.6", "below 1 together"),
    "no update": (SMALL + "accumulate = 1000000000", "no weight would change"),
    "logits to bce": (SMALL + 'loss = "bce"', "the outputs of mlp, which are logits; got 'bce'"),
    "logits to nll": (SMALL + 'loss = "nll"', "the outputs of mlp, which are logits; got 'nll'"),
    "a loss of its own": (SMALL + 'loss = "model"', "unexpected keyword argument"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_configuration_that_does_not_do_is_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = SETTINGS[kind]
    (folder / "c.toml").write_text(text)
    assert run_command(("train", "--config", "c.toml", "--out", "r")) in (1, 3)
    told = capsys.readouterr().err
    assert said in told
    assert told[:3] in ("ANE", "DAT")
    assert "Traceback" not in told
    assert not (folder / "r").exists()


def test_a_configuration_with_a_byte_order_mark_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "c.toml").write_text("\ufeff" + SMALL + "warmup = 99\n", encoding="utf-8")
    assert run_command(("train", "--config", "c.toml", "--out", "r")) == 0
    assert "the learning rate only rises" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("train", ""), ("train", "digits", "--out", ""), ("evaluate", "")])
def test_an_empty_word_is_refused(
    words: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, words, 1, "needs a value; got nothing")


# Data files --------------------------------------------------------------------------------------------------

ROWS = "\n".join(f"{k % 7},{'xyz'[k % 3]},{k % 5 + 0.5}" for k in range(60))
TABLES: dict[str, tuple[str, str]] = {
    "a stray text": (f"f,kind,price\n{ROWS}\n1,x,abc\n", "got 'abc' beside 60 numbers"),
    "a constant": ("f,price\n" + "\n".join(f"{k},2" for k in range(60)), "got '2' in all rows of 'price'"),
    "zero bytes": (f"f,kind,price\n{ROWS}\n1,\0,2\n", "zero bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_a_damaged_table_is_refused(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, said = TABLES[kind]
    (folder / "t.csv").write_text(text)
    refused(capsys, ("train", "t.csv", "--target", "price", *SHORT), 1, said)
    assert not (folder / "r").exists()


ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "single numbers": ({"x": np.float32(1), "y": np.int64(1)}, "DATA105"),
    "nan to predict": ({"x": np.eye(9), "y": np.full(9, np.nan)}, "d.npz: train: y: needs finite numbers"),
    "inf to predict": ({"x": np.eye(9), "y": np.full(9, np.inf)}, "d.npz: train: y: needs finite numbers"),
}  # fmt: skip
SOURCES = {
    "an argument": ("def f(path): return path\n", "without arguments"),
    "a negative length": ("class f:\n  def __len__(self): return -1\n  def __getitem__(self, i): return 1\n",
                          "__len__"),
    "other shapes": ("import numpy as np\nclass f:\n  def __len__(self): return 40\n  def __getitem__(self, i):\n"
                     "    return np.zeros(3 + (i == 17), np.float32), i % 2\n", "needs examples of one shape, [3]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRAYS)
def test_damaged_arrays_are_refused(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, said = ARRAYS[kind]
    np.savez(folder / "d.npz", **arrays)
    refused(capsys, ("train", "d.npz", *SHORT), 1, said)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_does_not_do_is_refused(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = SOURCES[kind]
    (folder / "source.py").write_text(text)
    refused(capsys, ("train", "source.py:f", *SHORT), 1, said)


def test_names_and_texts_that_hold_nothing_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_text("a" * 2000)
    refused(capsys, ("train", "a.txt", *SHORT), 1, "got only 'a'")
    np.savez(folder / "d.npz", x=np.eye(9), y=np.eye(9) / 2)
    refused(capsys, ("train", "d.npz", *SHORT, "--task", "multilabel"), 1, "needs 0 and 1")


@pytest.mark.parametrize("loss", ["cross_entropy", "nll"])
def test_a_loss_of_another_task_is_refused(
    loss: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.csv").write_text(f"f,kind,price\n{ROWS}\n")
    refused(capsys, ("train", "t.csv", "--target", "price", *SHORT, "--loss", loss), 1, f"got {loss!r}")


def test_a_target_of_huge_numbers_is_reported(folder: Path) -> None:
    (folder / "t.csv").write_text(f"f,kind,price\n{ROWS}\n1,x,1e38\n")
    assert run_command(("train", "t.csv", "--target", "price", *SHORT)) == 0
    assert (folder / "r" / "report.html").exists()


def test_images_that_no_memory_holds_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in ("a", os.fsdecode(b"\xff")):
        (folder / "imgs" / name).mkdir(parents=True)
        for k in range(4):
            Image.new("L", (8, 8), 40 * k).save(folder / "imgs" / name / f"{k}.png")
    refused(capsys, ("train", "imgs", *SHORT, "--size", "1000000"), 1, "needs batches that fit in memory")
    assert (
        run_command(("train", "imgs", *SHORT)) == 0
    )  # and a class whose name is no UTF-8 is reported as "?"
    assert "a, ?" in capsys.readouterr().out


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
    ((*DIGITS, "--model", "net.py"), 1, "got the file alone. It has: Net, "),
    *(((*DIGITS, "--model", spec), 1, said) for spec, said in (
        ("wrong.py:Net", "ANE102"), ("imports.py:Net", "nothing_like_it"), ("net.py:Missing", "ANE102"),
        ("net.py:three", "needs an nn.Module; got int"), ("net.py:Needs", "ANE103"), ("none.py:Net", "does not exist"),
        ("net.py:", "ANE102"), ("a.json:Net", "ANE102"), ("/etc/passwd:Net", "ANE102"), (".:Net", "ANE102"),
        ("net.py:Bare", "got a model without any"), ("net.py:Frozen", "got all frozen"), ("net.py:Abstract", "ANE103"),
        ("net.py:Meta", "layer.weight, layer.bias without"), ("net.py:Lazy", "layer.weight, layer.bias without"),
        ("net.py:Base", "in forward: BaseException: mine"),
        ("raises.py:Net", "raises.py, line 1"), ("net.py:Init", "in __init__: ValueError: not built"),
        ("net.py:Forward", "in forward: AttributeError"),
        ("net.py:Exits", "sys.exit(7)"), ("exits.py:Net", "sys.exit(7)"),
        *((f"net.py:{name}", "the model's output needs the shape [128, classes]") for name in ("Net", "One")),
    )),
    (("export", "done", "--format", "step-mlpackage"), 1, "ANE116 done"),
    (("export", "done", "--format", "onnx", "--out", "n.mlpackage"), 1, "ANE111 n.mlpackage"),
    (("export", "done", "--format", "torch", "--out", "m.onnx"), 1, "ANE111 m.onnx"),
    *((("predict", "done", "--index", "0", "--temperature", value), 1, "--temperature")
      for value in ("inf", "nan", "-1")),
    *(((command, "mlp", *words), 1, said) for command in ("check", "estimate", "debug", "trace", "bench")
      for words, said in (
          (("--chip", "m9"), "got 'm9'"), (("--input", "9" * 20), "ANE104 --input"), (("--input", "0x3"), "ANE104"),
          (("--classes", "0"), "ANE104"), (("--batch", "-1"), "ANE10"), (("--optimizer", "adamm"), "ANE104"),
    )),
    *(((command, "mlp", *words), 1, said) for command in ("check", "estimate", "trace", "debug") for words, said in (
        (("--path", "e5"), "got 'e5'"), (("--dtype", "half"), "got 'half'"), (("--loss", "mes"), "got 'mes'"),
    )),
    (("check", "mlp", "--blocks", "-1"), 1, "got '-1'"), (("estimate", "mlp", "--epochs", "0"), 1, "ANE104"),
    (("debug", "mlp", "--loss-scale", "3"), 1, "got 3.0"), (("debug", "mlp", "--clip-grad-norm", "inf"), 1, "got inf"),
    (("bench", "mlp", "--steps", "0"), 1, "ANE104"), (("bench", "mlp", "--threads", "0"), 1, "'--threads'"),
    (("bench", "mlp", "--devices", "cpu,gpu"), 1, "got 'gpu'"), (("trace", "mlp", "--out", "/dev/null/x"), 2, "ANE204"),
    (("train", "hf:"), 1, "DATA101"),
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


NAN = ("train", "digits", "--limit", "64", "--batch", "16", "--epochs", "2", "--out", "r", "--device")


@pytest.mark.parametrize("device", ["sim", "cpu"])
@pytest.mark.parametrize("words", [("Logarithm",), ("Root", "--optimizer", "sgd", "--lr", "0.5")])
def test_a_loss_that_is_nan_in_pytorch_ends_training(
    words: tuple[str, ...], device: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine has no nan, and computes a loss that looks well: at once, and once weights have become negative."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericsWarning)
        assert run_command((*NAN, device, "--model", f"net.py:{words[0]}", *words[1:])) == 4
    told = capsys.readouterr().err
    assert told.startswith("ANE401 train: epoch 1, batch ")
    if device == "sim":
        assert "nan in plain PyTorch" in told
    assert not (folder / "r" / "weights.safetensors").exists()


def test_check_says_that_a_loss_is_nan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(("check", "net.py:Logarithm", "--dataset", "digits")) == 3
    assert "nan in fp32" in capsys.readouterr().out


def test_a_batch_without_labels_that_count_ends_no_training() -> None:
    """Its mean is 0 / 0 in PyTorch, and it moves nothing."""
    none = (X, torch.full((8,), -100))
    trainer = Trainer(torch.nn.Linear(4, 3), device="sim", threads=1, report=Reporter())
    with pytest.warns(NumericsWarning, match="is nan in plain PyTorch"):
        assert trainer.fit([none, (X, Y), none], epochs=1).steps == 3


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
