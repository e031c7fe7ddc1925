"""`Trainer.export` and `ane-trainer export`: a trained run becomes checked files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ane_trainer import Trainer, load_dataset
from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.cli import run_command
from ane_trainer.core import run_training
from ane_trainer.training.config import make_config
from ane_trainer.training.reporting.report import Reporter


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small mlp on digits."""
    folder = tmp_path_factory.mktemp("export") / "run"
    options = {"dataset": "digits", "hidden": [32], "epochs": 2, "batch_size": 64, "fidelity": "fast"}
    run_training(make_config(options), out=folder, report=Reporter())
    return folder


@pytest.mark.parametrize(
    "format", ["torch", "onnx", "aimodel", "mlpackage", "step-mlpackage", "step-aimodel"]
)
def test_every_format_of_a_run(run: Path, format: str, capfd: pytest.CaptureFixture[str]) -> None:
    for part, package in {"onnx": "onnxscript", "aimodel": "coreai", "mlpackage": "google.protobuf"}.items():
        if part in format:
            pytest.importorskip(package)
    assert run_command(["export", str(run), "--format", format, "--examples", "40", "--json"]) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert Path(report["path"]).exists()
    assert report["size_bytes"] > 1000
    if format.startswith("step"):
        assert report["examples"] == 20
        assert report["largest_difference"] <= (0 if format == "step-mlpackage" else 0.02)
    else:
        assert report["examples"] == 40
        assert report["accuracy"] == report["reference_accuracy"] > 0.5
        assert report["largest_difference"] < 0.02


def test_an_unknown_format_is_a_usage_error(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["export", str(run), "--format", "gguf"]) == 1
    assert "ANE115" in capfd.readouterr().err


_WITHOUT = """
import importlib.machinery, sys
hidden = sys.argv.pop(1)
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
from ane_trainer.cli import run_command
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [
        ("mlpackage", "coremltools", "coreml"),
        ("aimodel", "coreai", "coreai"), ("onnx", "onnxscript", "onnx"), ("onnx", "onnxruntime", "onnx"),
    ],
)  # fmt: skip
def test_without_its_extra_a_format_says_what_to_install(
    run: Path, tmp_path: Path, format: str, package: str, extra: str
) -> None:
    out = tmp_path / f"m.{format.removeprefix('step-')}"
    options = ["export", str(run), "--format", format, "--out", str(out), "--examples", "5"]
    done = subprocess.run([sys.executable, "-c", _WITHOUT, package, *options], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"ane_trainer[{extra}]" in done.stderr
    assert package in done.stderr or package == "coreai"


def test_without_its_extra_the_device_says_what_to_install(tmp_path: Path) -> None:
    options = ["train", "digits", "--device", "coreai", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, "coreai", *options], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert 'pip install "ane_trainer[coreai]"' in done.stderr


def test_trainer_export_reads_the_format_from_the_path(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    train, test = load_dataset("digits", batch_size=64, limit=256)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    trainer = Trainer(model, device="cpu", report=Reporter())
    trainer.fit(train, 3)
    report = trainer.export(tmp_path / "m.onnx", data=test, examples=50)
    assert (report.format, report.examples) == ("onnx", 50)
    assert report.accuracy is not None
    again = trainer.export(tmp_path / "t.onnx")  # on the first batch of training, which has no mean and std
    assert (again.examples, again.accuracy) == (64, again.reference_accuracy)


def test_what_an_export_needs() -> None:
    trainer = Trainer(nn.Linear(4, 2), "mse", device="cpu", report=Reporter())
    data = [(torch.zeros(8, 4), torch.zeros(8, 2))]
    with pytest.raises(UsageError, match="needs data with mean and std"):
        trainer.export("m.onnx", data=data, input="image")
    with pytest.raises(UsageError, match="needs one of auto, image, tensor"):
        trainer.export("m.onnx", data=data, input="sound")
    with pytest.raises(UsageError, match="batch and examples of at least 1"):
        trainer.export("m.onnx", data=data, batch=0)
    with pytest.raises(DataError, match="needs at least one batch"):
        trainer.export("m.onnx", data=[])


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("format", ["mlpackage", "aimodel", "onnx"])
def test_exports_keep_the_accuracy(dataset: str, format: str, tmp_path: Path) -> None:
    """All 10,000 test images: the file's accuracy within 0.1 points of the trained model's."""
    train, test = load_dataset(dataset, batch_size=128)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 10))
    trainer = Trainer(model, device="cpu", report=Reporter())
    trainer.fit(train, 2)
    suffix = {"mlpackage": "mlpackage", "aimodel": "aimodel", "onnx": "onnx"}[format]
    report = trainer.export(tmp_path / f"m.{suffix}", data=test, batch=100, examples=10_000)
    assert report.examples == 10_000
    assert report.accuracy == pytest.approx(trainer.evaluate(test).accuracy, abs=0.001)


@pytest.mark.slow
def test_mnist_through_core_ai_reaches_pytorch_fp32() -> None:
    """One epoch of the mlp: Apple's runtime in fp32 against plain PyTorch, 0.3 points."""
    pytest.importorskip("coreai")
    accuracies = []
    for device in ("coreai", "cpu"):
        train, test = load_dataset("mnist", batch_size=128, seed=0)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 10))
        precision = "fp32" if device == "coreai" else "auto"
        trainer = Trainer(model, device=device, precision=precision, report=Reporter())
        trainer.fit(train, 1)
        accuracies.append(trainer.evaluate(test).accuracy)
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.003)


@pytest.mark.parametrize(("words", "format"), [(22, "mlpackage"), (22, "aimodel"), (3000, "mlpackage")])
def test_models_of_tokens(words, format, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(words, 4), torch.nn.Flatten(), torch.nn.Linear(24, 3))
    data = [(torch.randint(words, (4, 6)), torch.arange(4) % 3)]
    trainer = Trainer(model, device="cpu", report=Reporter())
    path = tmp_path / f"net.{format}"
    if words > 2048:
        with pytest.raises(UsageError, match="2048"):
            trainer.export(path, data=data)
        return
    assert trainer.export(path, data=data).largest_difference < 5e-3
