"""A step file, its manifest and a driver that knows nothing of the package: the same bits as the trainer's run."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from ane_trainer import compile_step
from ane_trainer.ane.compiler.coreai import open_asset
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from ane_trainer.ane.export import DEFAULT_NAMES, ExportOptions, onnx_step, stablehlo_step
from ane_trainer.ane.export.manifest import read_manifest
from ane_trainer.ane.export.onnx_step import step_model
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.mil.weights import Array
from ane_trainer.training.exporting import export_training

Runtime = tuple[dict[str, Array], Callable[[Mapping[str, Array]], Mapping[str, Array]]]
DRIVER = Path(__file__).parents[3] / "examples" / "drive_step.py"


def driver() -> Any:
    spec = importlib.util.spec_from_file_location("drive_step", DRIVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Block(nn.Module):
    """A transformer block over characters, with a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embedding(x)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 4),
    )


def image(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(i)
    return torch.randn(8, 1, 8, 8, generator=draw), torch.randint(0, 4, (8,), generator=draw)


def text(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(i)
    return torch.randint(0, 11, (8, 6), generator=draw), torch.randint(0, 4, (8,), generator=draw)


class Frozen(nn.Module):
    """A layer that stays as it is, in front of one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(64, 24), nn.LayerNorm(24), nn.Linear(24, 4)
        self.first.requires_grad_(False)
        self.register_buffer("mean", torch.randn(64) / 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.relu(self.first(x.flatten(1) - self.mean))))


class Recurrent(nn.Module):
    """Characters through a GRU: some gradients of the first step are 1e-5 of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.cell = nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.embedding(x))[0][:, -1])


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "mlp": (mlp, image, lambda p: torch.optim.Adam(p, lr=3e-3)),
    "cnn": (cnn, image, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "transformer": (Block, text, lambda p: torch.optim.AdamW(p, lr=3e-3)),
    "frozen": (Frozen, image, lambda p: torch.optim.SGD(list(p)[2:], lr=0.05, momentum=0.9, nesterov=True)),
    "recurrent": (Recurrent, text, lambda p: torch.optim.Adam(p, lr=3e-3)),
}


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_driver_gives_the_trainers_bits(name: str, tmp_path: Path) -> None:
    """20 steps from the file alone; images become bright on the way, so that units of gradients move."""
    pytest.importorskip("coremltools")
    make, batch, optimizer_of = CASES[name]
    torch.manual_seed(0)
    model = make()
    optimizer = optimizer_of(model.parameters())
    step = compile_step(model, "cross_entropy", optimizer, batch(0), sync="lazy")
    step(*batch(0))
    path = tmp_path / "step.mlpackage"
    before = step.state_dict()
    export_training(step, optimizer, path, "step-mlpackage", [batch(0)], ExportOptions())
    step.load_state_dict(before)
    driven = driver().open_package(path)
    units = [p["unit"] for p in driven.parameters.values()]
    for i in range(1, 21):
        x, y = batch(i % 3)
        x = x * 30 if x.is_floating_point() and i > 4 else x
        expected = float(step(x, y))
        assert (
            driven.step({"x": x.numpy().astype(np.float16), "y": y.numpy().astype(np.float16)}) == expected
        ), i
    after = step.port_state()
    for port, value in driven.state.items():
        assert value.tobytes() == after[port].tobytes(), port
    assert name != "mlp" or units != [p["unit"] for p in driven.parameters.values()]
    step.sync()
    for parameter, value in driven.weights().items():
        own = dict(model.named_parameters())[parameter].detach().numpy()
        np.testing.assert_allclose(value.reshape(own.shape), own, rtol=1e-6, atol=1e-8)
    step.close()


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
def test_the_driver_accumulates_as_the_trainer_does(tmp_path: Path) -> None:
    """An update each third batch; one batch of the second is too large for any unit, so that its update is lost."""
    pytest.importorskip("coremltools")
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, amsgrad=True)
    step = compile_step(model, "cross_entropy", optimizer, image(0), sync="lazy", accumulate=3)
    path = tmp_path / "step.mlpackage"
    before = step.state_dict()
    export_training(step, optimizer, path, "step-mlpackage", [image(0)], ExportOptions())
    step.load_state_dict(before)
    driven = driver().open_package(path)
    for i in range(12):
        x, y = image(i % 4)
        x = x.clone() if i != 4 else x * 3000
        expected = float(step(x, y))
        assert (
            driven.step({"x": x.numpy().astype(np.float16), "y": y.numpy().astype(np.float16)}) == expected
        ), i
    after = step.port_state()
    assert [p for p, value in driven.state.items() if value.tobytes() != after[p].tobytes()] == []
    assert (driven.updates, driven.steps) == (step.applied_steps, 12)
    step.close()


def test_numbers_that_no_formula_gives_are_refused(tmp_path: Path) -> None:
    """A batch norm without momentum averages by the number of batches, which a driver would not know."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4, momentum=None))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = compile_step(model, "cross_entropy", optimizer, image(0))
    path = tmp_path / "step.mlpackage"
    with pytest.raises(UsageError, match=r"got average/2, which the model counts") as caught:
        export_training(step, optimizer, path, "step-mlpackage", [image(0)], ExportOptions())
    assert caught.value.code == "ANE116"
    assert not path.exists()
    step.close()


@pytest.mark.parametrize("format", ["step-mlpackage", "step-onnx"])
def test_an_export_leaves_training_as_it_was(format: str, tmp_path: Path) -> None:
    """State, draws of dropout and the generator of the process: a step after an export is the one without it."""
    pytest.importorskip({"step-mlpackage": "coremltools", "step-onnx": "onnxruntime"}[format])
    losses = []
    for exports in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Dropout(0.5), nn.Linear(24, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        step = compile_step(model, "cross_entropy", optimizer, image(0), sync="lazy")
        step(*image(0))
        if exports:
            path = tmp_path / DEFAULT_NAMES[format]
            export_training(step, optimizer, path, format, [image(0)], ExportOptions())
        losses.append([float(step(*image(i))) for i in range(3)])
        step.close()
    assert losses[0] == losses[1]


def test_the_driver_is_short_and_knows_the_simulator_only() -> None:
    lines = DRIVER.read_text().splitlines()
    assert len(lines) < 100
    ours = [
        line.strip()
        for line in lines
        if "ane_trainer" in line and line.strip().startswith(("from", "import"))
    ]
    assert ours == [
        "from ane_trainer.ane import load_program",
        "from ane_trainer.ane.simulator import make_context, prepare",
    ]


def assert_pure(path: Path) -> None:
    """The text holds StableHLO alone, and the manifest's ports in order."""
    text, content = path.read_text(), read_manifest(path)
    assert set(re.findall(r"= \"?([a-z]+)\.", text)) == {"stablehlo"}
    (signature,) = re.findall(r"func\.func @training_step\((.*)\) -> \((.*)\) \{", text)
    for side, types in zip(("inputs", "outputs"), signature, strict=True):
        shapes = [list(map(int, found.split("x")[:-1])) for found in re.findall(r"tensor<([^>]*)>", types)]
        assert shapes == [row["shape"] for row in content[side]]


def opened(format: str, path: Path) -> Runtime:
    """The state that a step in fp32 starts from, and what runs it."""
    if format == "step-aimodel":
        asset = open_asset(path)
        return {name: np.array(value) for name, value in asset.state().items()}, asset.run
    runner = onnx_step.runner if format == "step-onnx" else stablehlo_step.runner
    return load_file(path.with_suffix(".safetensors")), runner(path)


NEEDS = {
    "step-onnx": ("onnxruntime",), "step-stablehlo": ("torch_mlir", "iree.compiler"), "step-aimodel": ("coreai",),
}  # fmt: skip
CHECKED_BY = {
    "step-onnx": "onnxruntime, in fp32", "step-stablehlo": "IREE, in fp32",
    "step-aimodel": "Apple's Core AI runtime on this machine",
}  # fmt: skip
FP32 = [
    *((format, name) for format in ("step-onnx", "step-aimodel") for name in CASES),
    ("step-stablehlo", "mlp"), ("step-stablehlo", "cnn"),
    pytest.param("step-stablehlo", "transformer", marks=pytest.mark.slow),  # 25 s of IREE's compiler
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
@pytest.mark.parametrize(("format", "name"), FP32)
def test_the_step_in_fp32_trains_as_pytorch_does(format: str, name: str, tmp_path: Path) -> None:
    """20 steps on onnxruntime, Apple's runtime and IREE, from the files alone, against PyTorch in fp32."""
    for package in NEEDS[format]:
        pytest.importorskip(package)
    make, batch, optimizer_of = CASES[name]
    torch.manual_seed(0)
    model = make()
    own = copy.deepcopy(model)
    optimizer, plain = optimizer_of(model.parameters()), optimizer_of(own.parameters())
    step = compile_step(model, "cross_entropy", optimizer, batch(0), sync="lazy")
    path = tmp_path / DEFAULT_NAMES[format]
    options = ExportOptions(weights="fp32" if format == "step-aimodel" else "fp16")
    report = export_training(step, optimizer, path, format, [batch(0), batch(1)], options)
    assert report.largest_difference < 0.1
    assert (report.weights, report.checked_by) == ("fp32", CHECKED_BY[format])
    if format == "step-stablehlo":
        assert_pure(path)
    driven = driver().Driver(read_manifest(path), *opened(format, path))
    for i in range(20):
        x, y = batch(i % 3)
        loss = nn.functional.cross_entropy(own(x), y)
        plain.zero_grad()
        loss.backward()
        plain.step()
        fed = {"x": x.numpy().astype(np.float32), "y": y.numpy().astype(np.float32)}
        assert driven.step(fed) == pytest.approx(loss.item(), rel=1e-5)
    for parameter, value in driven.weights().items():
        if parameter.endswith("in_proj_bias"):  # keys' biases: gradients that are rounding alone
            continue
        want = dict(own.named_parameters())[parameter].detach().numpy()
        np.testing.assert_allclose(value.reshape(want.shape), want, atol=1e-5)
    step.close()


@pytest.mark.parametrize(
    ("kind", "parameters", "wanted"),
    [
        *((kind, {}, getattr(torch, kind)) for kind in ("ceil", "cos", "sin", "tan", "atan", "round")),
        ("softplus", {}, nn.functional.softplus), ("softsign", {}, nn.functional.softsign),
        ("elu", {"alpha": 0.5}, lambda x: nn.functional.elu(x, 0.5)),
        ("leaky_relu", {"alpha": 0.25}, lambda x: nn.functional.leaky_relu(x, 0.25)),
        ("clip", {"alpha": -0.5, "beta": 1.5}, lambda x: x.clamp(-0.5, 1.5)),
    ],
)  # fmt: skip
def test_functions_in_onnx_are_pytorchs(
    kind: str, parameters: dict[str, float], wanted: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    b = Builder()
    x = b.input("x", TensorType("fp32", (1, 41)))
    program = b.finish((b.op(kind, x=x, **parameters),))
    onnx.save(step_model(program, {}), tmp_path / "one.onnx")
    values = torch.linspace(-4, 4, 41)[None]
    (got,) = onnx_step.runner(tmp_path / "one.onnx")({"x": values.numpy()}).values()
    np.testing.assert_allclose(got, wanted(values).numpy(), rtol=1e-6, atol=1e-6)


def test_ops_without_a_form_in_onnx_are_named() -> None:
    def one(kind: str, **parameters: int) -> Any:
        b = Builder()
        x = b.input("x", TensorType("fp32", (2, 3)))
        return step_model(b.finish((b.op(kind, x=x, **parameters),)), {})

    with pytest.raises(UnsupportedModel, match="cumsum"):
        one("cumsum", axis=0)
    assert len(one("relu").graph.node) == 1
