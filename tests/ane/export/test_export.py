"""Exported files: written, validated by coremltools, run again by independent readers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ane_trainer import TrainingStep, compile_step
from ane_trainer.ane.errors import MissingDependency, UsageError
from ane_trainer.ane.export import ExportOptions, Signature, export_inference, export_step, format_of, in_fp32
from ane_trainer.ane.export.compress import LEVELS, compress, quantize
from ane_trainer.ane.export.freeze import freeze, to_input
from ane_trainer.ane.export.inference import need
from ane_trainer.ane.export.manifest import read_manifest
from ane_trainer.ane.export.step import changing, replay_mlpackage
from ane_trainer.ane.mil.loading import load_program

CLASSES = ("zero", "one", "two", "three")
PIXELS = Signature((1, 8, 8), normalise=(0.4, 0.25), class_names=CLASSES)


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 16), nn.GELU(), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model that has learnt which quarter of an image is bright, and test data as training feeds it."""
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (160,))
    pixels = torch.randint(0, 120, (160, 1, 8, 8))
    for image, label in zip(pixels, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 60
    x = (pixels / 255 - 0.4) / 0.25
    model = cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:96]), labels[:96]).backward()
        optimizer.step()
    return model.eval(), x[96:], labels[96:]


def reimport(path: Path) -> Any:
    """The specification, and the MIL program as coremltools reads it, every op against its type rules."""
    ct = coremltools()
    model = ct.models.MLModel(str(path), skip_model_load=True)
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = model.get_spec()
    return spec, load(
        spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir
    )


def coremltools() -> Any:
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytest.importorskip("coremltools")
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_mlpackage_of_an_image_classifier(trained: Any, tmp_path: Path, weights: str) -> None:
    model, x, y = trained
    coremltools()
    report = export_inference(
        model, tmp_path / "m.mlpackage", "mlpackage", PIXELS, x, y, ExportOptions(weights=weights)
    )
    assert report.largest_difference < {"fp16": 0.01, "int8": 0.05, "int4": 0.3}[weights]
    assert report.accuracy is not None
    assert report.reference_accuracy is not None
    assert report.reference_accuracy > 0.9
    assert (
        abs(report.accuracy - report.reference_accuracy) <= {"fp16": 0, "int8": 0.02, "int4": 0.05}[weights]
    )
    spec, program = reimport(report.path)
    (image,) = spec.description.input
    assert (image.name, image.type.imageType.width, image.type.imageType.height) == ("image", 8, 8)
    assert [output.name for output in spec.description.output] == ["classLabel", "classLabel_probs"]
    assert spec.description.metadata.userDefined["preprocessing"].startswith("inside: pixels")
    (labels,) = (op.classes.val for op in program.functions["main"].operations if op.op_type == "classify")
    assert tuple(labels) == CLASSES
    packed = [op for op in program.functions["main"].operations if op.op_type.startswith("constexpr")]
    assert bool(packed) == (weights != "fp16")
    assert any(op.op_type == "conv" for op in program.functions["main"].operations)


@pytest.mark.parametrize(
    ("format", "package"), [("aimodel", "coreai"), ("onnx", "onnxscript"), ("torch", "torch")]
)
def test_other_formats_agree_with_pytorch(trained: Any, tmp_path: Path, format: str, package: str) -> None:
    pytest.importorskip(package)
    model, x, y = trained
    name = {"aimodel": "m.aimodel", "onnx": "m.onnx", "torch": "m"}[format]
    report = export_inference(model, tmp_path / name, format, PIXELS, x, y)
    assert report.largest_difference < (0.01 if format == "aimodel" else 1e-5)
    assert report.accuracy == report.reference_accuracy
    assert report.examples == len(x)
    assert report.size_bytes > 1000


def test_a_tensor_input_takes_what_training_fed_in_batches(trained: Any, tmp_path: Path) -> None:
    model, x, y = trained
    coremltools()
    signature = Signature((1, 8, 8), batch=24)
    report = export_inference(model, tmp_path / "m.mlpackage", "mlpackage", signature, x, y)
    spec, _ = reimport(report.path)
    assert list(spec.description.input[0].type.multiArrayType.shape) == [24, 1, 8, 8]
    assert spec.description.output[0].name == "output"
    assert report.largest_difference < 0.05
    assert report.examples == 64


@pytest.fixture(scope="module")
def step() -> Iterator[TrainingStep]:
    """An Adam step after three updates, with a frozen layer."""
    torch.manual_seed(0)
    model = cnn().train()
    model[0].weight.requires_grad_(False)
    x, y = batch(0)
    made = compile_step(
        model, "cross_entropy", torch.optim.Adam(model.parameters(), lr=1e-3), (x, y), sync="lazy"
    )
    for i in range(3):
        made(*batch(i))
    yield made
    made.close()


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(8, 1, 8, 8, generator=draw), torch.randint(0, 4, (8,), generator=draw)


@pytest.mark.parametrize("form", ["io", "state", "both"])
def test_the_step_as_mlpackage_trains_on_bit_for_bit(step: TrainingStep, tmp_path: Path, form: str) -> None:
    """The file, read back, against the run that it came from, for 20 steps."""
    coremltools()
    lowered, before = step.compiled.legalized.lowered, step.state_dict()
    feeds = [step.feeds(*batch(i), ahead=i) for i in range(20)]
    report = export_step(
        step.compiled, step.port_state(), feeds, tmp_path / "s.mlpackage", "step-mlpackage",
        ExportOptions(state=form),
    )  # fmt: skip
    assert report.largest_difference == 0
    state, losses = replay_mlpackage(report.path, feeds, "m4", "exact")
    wanted = [float(step._loaded.session.run(fed)["loss"][0]) for fed in feeds]  # with units that stay
    assert losses == wanted
    after = step.port_state()
    step.load_state_dict(before)
    assert set(state) == set(changing(lowered))
    for name, value in state.items():
        assert value.tobytes() == after[name].tobytes(), name

    spec, program = reimport(report.path)
    functions = {f.name: f for f in spec.description.functions}
    assert spec.description.defaultFunctionName == "main"
    assert (
        set(functions)
        == set(program.functions)
        == {"main", "initial_state"} | ({"stateful"} if form == "both" else set())
    )
    fed = {port.name for port in lowered.inputs if port.role != "state"}
    results = {"loss", "applied", "health"}
    for name, function in functions.items():
        shapes = {s.name: tuple(s.type.stateType.arrayType.shape) for s in function.state}
        if name == "stateful" or (name == "main" and form == "state"):
            assert shapes == {key: value.shape for key, value in state.items()}
            assert {i.name for i in function.input} == fed
            assert {output.name for output in function.output} == results
        elif name == "main":
            assert not shapes
            assert {i.name for i in function.input} == fed | set(state)
            assert {o.name for o in function.output} == results | {a.output for a in lowered.aliases}


def test_the_manifest_says_what_each_port_is(step: TrainingStep, tmp_path: Path) -> None:
    coremltools()
    feeds = [step.feeds(*batch(0))]
    report = export_step(step.compiled, step.port_state(), feeds, tmp_path / "s.mlpackage", "step-mlpackage")
    found = read_manifest(report.path)
    roles = {row["target"]: row["role"] for row in found["inputs"]}
    assert {"weight", "residual", "moment", "scaling", "batch", "scalar"} <= set(roles.values())
    frozen = "0.weight"
    assert frozen not in roles  # a constant of the program
    state = step.port_state()
    step.sync()
    for name, terms in found["weights"].items():
        folded = sum(state[term["port"]].astype(np.float64) * term["factor"] for term in terms)
        parameter = dict(step._subject.model.named_parameters())[name].detach().numpy()
        np.testing.assert_allclose(folded.reshape(parameter.shape), parameter, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["io", "state"])
def test_the_step_as_aimodel_trains_on(step: TrainingStep, tmp_path: Path, form: str) -> None:
    pytest.importorskip("coreai")
    feeds = [step.feeds(*batch(i), ahead=i) for i in range(5)]
    report = export_step(
        step.compiled, step.port_state(), feeds, tmp_path / "s.aimodel", "step-aimodel",
        ExportOptions(state=form),
    )  # fmt: skip
    assert 0 < report.largest_difference < 0.02
    assert report.examples == 5


@pytest.mark.parametrize(("format", "form"), [("aimodel", "both"), ("mlpackage", "neither")])
def test_forms_that_a_file_cannot_have_are_refused(
    step: TrainingStep, tmp_path: Path, format: str, form: str
) -> None:
    with pytest.raises(UsageError, match="state: needs"):
        export_step(
            step.compiled, step.port_state(), [], tmp_path / f"s.{format}", f"step-{format}",
            ExportOptions(state=form),
        )  # fmt: skip


def test_weights_that_a_step_cannot_have_are_refused() -> None:
    for format, weights in (("step-mlpackage", "int8"), ("step-mlpackage", "fp32"), ("step-onnx", "int8")):
        with pytest.raises(UsageError, match=f"got {weights} and the format {format}") as caught:
            in_fp32(format, weights)
        assert caught.value.code == "ANE118"
    assert in_fp32("step-aimodel", "fp32")
    assert not in_fp32("step-aimodel", "fp16")
    assert in_fp32("step-onnx", "fp16")


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize(
    ("shape", "contracted"), [((64, 12), (0,)), ((12, 40), (1,)), ((8, 6, 3, 3), (1, 2, 3))]
)
def test_quantized_weights_stay_within_half_a_step(
    kind: str, shape: tuple[int, ...], contracted: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    data, scale = quantize(values, kind, contracted)
    assert np.abs(data).max() == LEVELS[kind]
    assert all(n % m == 0 for n, m in zip(shape, scale.shape, strict=True))
    spread = scale.astype(np.float32)
    for axis, (n, m) in enumerate(zip(shape, scale.shape, strict=True)):
        spread = np.repeat(spread, n // m, axis=axis)
    # The scale is rounded to fp16, so the largest weight may be cut by 2^-11 of itself.
    assert (np.abs(data * spread - values) <= 0.5 * spread + 2.0**-10 * np.abs(values)).all()


def test_small_constants_are_not_compressed() -> None:
    function = freeze(cnn(), PIXELS).program.main
    packed = compress(function, "int8")
    assert sum(op.kind == "constexpr_blockwise_shift_scale" for op in packed.ops) == 1
    assert compress(function, "fp16") is function


def test_pixels_and_tensors_are_the_same_examples() -> None:
    pixels = torch.arange(64.0).reshape(1, 1, 8, 8)
    x = (pixels / 255 - 0.4) / 0.25
    assert torch.equal(to_input(x, PIXELS), pixels)
    assert to_input(x, Signature((1, 8, 8))) is x


def test_what_cannot_be_exported_is_said(trained: Any, tmp_path: Path) -> None:
    model, x, y = trained
    with pytest.raises(UsageError, match="needs one of mlpackage, aimodel"):
        format_of("model.bin")
    assert format_of("a/model.onnx") == "onnx"
    with pytest.raises(UsageError, match="int8 is for mlpackage"):
        export_inference(model, tmp_path / "m.onnx", "onnx", PIXELS, x, y, ExportOptions(weights="int8"))
    with pytest.raises(UsageError, match="needs one of fp16, int8, int4"):
        export_inference(
            model, tmp_path / "m.mlpackage", "mlpackage", PIXELS, x, y, ExportOptions(weights="int2")
        )
    with pytest.raises(UsageError, match=r"ends in \.mlpackage"):
        export_inference(model, tmp_path / "m.model", "mlpackage", PIXELS, x, y)
    with pytest.raises(MissingDependency, match=r'pip install "ane_trainer\[onnx\]"'):
        need("a_package_that_is_not_there", "onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_the_package_reads_back_as_written(trained: Any, tmp_path: Path) -> None:
    model, x, y = trained
    coremltools()
    report = export_inference(model, tmp_path / "m.mlpackage", "mlpackage", PIXELS, x[:2], y[:2])
    program = load_program(report.path)
    assert [(v.name, v.type.dtype) for v in program.main.inputs] == [("image", "fp32")]
    assert [(v.name, v.type.dtype) for v in program.main.outputs] == [("probabilities", "fp32")]
