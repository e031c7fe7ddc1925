# ruff: noqa: E501  (calls of coremltools)
"""Programs from disk: MIL text with weights beside it, Core ML packages that coremltools wrote."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.coreml_proto import coreml_messages, program_from_proto, program_to_proto
from ane_trainer.ane.mil.loading import load_program
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, Literal, Program, TensorType, literal
from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.ane.mil.weights import from_array, to_array
from tests.ane.mil.text.test_parser import programs

WEIGHT = (np.arange(24, dtype=np.float32) / 8).astype(np.float16).reshape(8, 3)


def dense() -> Program:
    b = Builder()
    x = b.input("x", TensorType("fp16", (2, 8)))
    return Program((b.finish((b.op("matmul", x=x, y=from_array(WEIGHT, name="w")),)),))


@pytest.mark.parametrize(("file", "name"), [("weights.bin", "weights.bin"), ("weights/weight.bin", "weights/weight.bin"),
                                            ("weights/w.bin", "w.bin"), ("w.bin", "deep/w.bin")])  # fmt: skip
def test_text_with_its_weights(tmp_path: Path, file: str, name: str) -> None:
    text, blob = print_program(dense(), blob_path=f"@model_path/{name}")
    (tmp_path / "model.mil").write_text(text)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(blob)
    assert (
        load_program(tmp_path / "model.mil")
        == load_program(tmp_path)
        == load_program(str(tmp_path))
        == dense()
    )


def test_text_without_its_weights_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.mil").write_text(print_program(dense())[0])
    with pytest.raises(
        ProgramError, match=r"a\.mil: line 5, column .*needs the content of @model_path/weights\.bin"
    ):
        load_program(tmp_path / "a.mil")


def test_files_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    text, blob = print_program(dense(), blob_path="@model_path/../secret.bin")
    (tmp_path / "secret.bin").write_bytes(blob)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.mil").write_text(text)
    with pytest.raises(ProgramError, match="it was not given"):
        load_program(tmp_path / "inside" / "a.mil")


def test_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.mil").write_bytes(b"\xff\xfe")
    (tmp_path / "a.onnx").write_bytes(b"")
    (tmp_path / "a.mlpackage").mkdir()
    for name, words in (("a.mil", "UTF-8"), ("a.onnx", "something else"), ("b.mil", "nothing there"),
                        ("a.mlpackage", "Manifest")):  # fmt: skip
        with pytest.raises(ProgramError, match=words):
            load_program(tmp_path / name)


# --- Core ML -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ct() -> Any:
    """coremltools, without the noise it makes when it is imported off a Mac."""
    pytest.importorskip("coremltools")
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
    logging.disable(logging.NOTSET)
    return coremltools


@pytest.fixture(scope="module")
def packages(ct: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three packages written by coremltools: a state, several results with compressed weights, two functions."""
    folder = tmp_path_factory.mktemp("packages")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, program in (("state", state_model(ct)), ("several", several_model(ct))):
            model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
                               compute_precision=ct.precision.FLOAT32, compute_units=ct.ComputeUnit.CPU_ONLY)  # fmt: skip
            model.save(str(folder / f"{name}.mlpackage"))
        functions = ct.utils.MultiFunctionDescriptor()
        functions.add_function(str(folder / "several.mlpackage"), "main", "zeta")
        functions.add_function(str(folder / "state.mlpackage"), "main", "alpha")
        functions.default_function_name = "zeta"
        ct.utils.save_multifunction(functions, str(folder / "two.mlpackage"))
    return folder


def state_model(ct: Any) -> Any:
    mb, types = ct.converters.mil.Builder, ct.converters.mil.mil.types

    @mb.program(input_specs=[mb.TensorSpec((2, 32), dtype=types.fp16), mb.StateTensorSpec((2, 32), dtype=types.fp16)],
                opset_version=ct.target.iOS18)  # fmt: skip
    def model(x: Any, held: Any) -> Any:
        total = mb.add(x=mb.read_state(input=held), y=x)
        return mb.relu(x=mb.coreml_update_state(state=held, value=total))

    return model


def several_model(ct: Any) -> Any:
    mb, types = ct.converters.mil.Builder, ct.converters.mil.mil.types

    @mb.program(input_specs=[mb.TensorSpec((2, 8), dtype=types.fp16)], opset_version=ct.target.iOS18)
    def model(x: Any) -> Any:
        table = np.arange(16, dtype=np.float16).reshape(1, 1, 16, 1)
        indices = (np.arange(32) % 16).reshape(4, 8).astype(types.np_uint4_dtype)
        w = mb.constexpr_lut_to_dense(indices=indices, lut=table)
        y = mb.linear(x=x, weight=w)
        z = mb.matmul(x=x, y=WEIGHT)
        low, high = mb.split(x=y, num_splits=2, axis=1)
        return mb.softmax(x=z, axis=-1), low, mb.gelu(x=high, mode="TANH_APPROXIMATION")

    return model


@pytest.mark.filterwarnings("ignore")
def test_package_with_a_state(packages: Path) -> None:
    function = load_program(packages / "state.mlpackage").main
    assert [v.type for v in function.inputs] == [
        TensorType("fp16", (2, 32)),
        TensorType("fp16", (2, 32), True),
    ]
    assert [op.kind for op in function.ops] == ["read_state", "add", "write_state", "read_state", "relu"]


@pytest.mark.filterwarnings("ignore")
def test_package_with_several_results_and_compressed_weights(packages: Path) -> None:
    function = load_program(packages / "several.mlpackage").main
    kinds = [op.kind for op in function.ops]
    assert sorted(kinds) == sorted(["constexpr_lut_to_dense", "linear", "matmul", "split", "softmax", "gelu"])
    assert [v.type.shape for v in function.outputs] == [(2, 3), (2, 2), (2, 2)]
    by_kind = {op.kind: op for op in function.ops}
    indices, weight = by_kind["constexpr_lut_to_dense"].arg("indices"), by_kind["matmul"].arg("y")
    assert isinstance(indices, Literal)
    assert isinstance(weight, Literal)
    np.testing.assert_array_equal(to_array(indices), (np.arange(32) % 16).reshape(4, 8))
    np.testing.assert_array_equal(to_array(weight), WEIGHT)
    assert by_kind["gelu"].arg("mode") == literal("TANH_APPROXIMATION", "string")


@pytest.mark.filterwarnings("ignore")
def test_package_with_two_functions_has_the_default_first(packages: Path) -> None:
    program = load_program(packages / "two.mlpackage")
    assert [f.name for f in program.functions] == ["zeta", "alpha"]
    assert program.main.name == "zeta"
    single = load_program(packages / "several.mlpackage").main
    assert program.main.ops == single.ops


@pytest.mark.filterwarnings("ignore")
def test_package_that_is_damaged_is_refused(packages: Path, tmp_path: Path) -> None:
    for number, damage in enumerate((no_weights, no_model, bad_manifest, outside)):
        package = tmp_path / f"{number}.mlpackage"
        shutil.copytree(packages / "several.mlpackage", package)
        damage(package)
        with pytest.raises(ProgramError):
            load_program(package)


def no_weights(package: Path) -> None:
    next(package.rglob("weight.bin")).unlink()


def no_model(package: Path) -> None:
    next(package.rglob("model.mlmodel")).write_bytes(b"\xff" * 100)


def bad_manifest(package: Path) -> None:
    (package / "Manifest.json").write_text("[]")


def outside(package: Path) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../../etc/hostname"
    (package / "Manifest.json").write_text(json.dumps(manifest))


@pytest.mark.filterwarnings("ignore")
@given(programs())
@settings(max_examples=40, deadline=None)
def test_program_to_proto_to_program_is_identity(program: Program) -> None:
    pytest.importorskip("coremltools")
    message, blob = program_to_proto(program)
    again = program_from_proto(message, {"@model_path/weights/weight.bin": blob})
    assert {f.name: f for f in again.functions} == {f.name: f for f in program.functions}


@pytest.mark.filterwarnings("ignore")
def test_coremltools_reads_what_we_write(ct: Any, tmp_path: Path) -> None:
    """Its own reader, on our proto and our blob: same ops, same weights."""
    from coremltools.converters.mil.frontend.milproto.load import load

    message, blob = program_to_proto(Program((step(),)))
    (tmp_path / "weight.bin").write_bytes(blob)
    spec = coreml_messages().Model_pb2.Model(specificationVersion=9)
    spec.mlProgram.CopyFrom(message)
    read = load(spec, specification_version=9, file_weights_dir=str(tmp_path)).functions["main"]
    kinds = [op.op_type for op in read.operations if op.op_type != "const"]
    assert kinds == ["matmul", "read_state", "add", "coreml_update_state"]
    (product,) = (op for op in read.operations if op.op_type == "matmul")
    np.testing.assert_array_equal(product.y.val, WEIGHT)
    assert not product.transpose_y.val


def step() -> Function:
    b = Builder()
    x, held = b.input("x", TensorType("fp16", (2, 8))), b.input("s", TensorType("fp16", (2, 3), state=True))
    y = b.op("matmul", x=x, y=from_array(WEIGHT), transpose_x=False, transpose_y=False)
    z = b.op("add", x=y, y=b.op("read_state", input=held))
    return b.finish((b.op("coreml_update_state", state=held, value=z),))
