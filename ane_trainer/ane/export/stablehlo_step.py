"""Writes a training step as StableHLO text in fp32, and runs such text: torch-mlir converts, IREE runs.

    step in fp32 -> ONNX (onnx_step.py) -> torch-mlir's ONNX importer -> Torch dialect -> StableHLO

One function `training_step`, whose arguments and results are the manifest's `inputs` and `outputs` in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ane_trainer.ane.export.inference import need
from ane_trainer.ane.export.manifest import read_manifest
from ane_trainer.ane.export.onnx_step import model_beside_state
from ane_trainer.ane.export.step import SingleStep, replay_beside
from ane_trainer.ane.mil.weights import Array

EXTRA = "stablehlo"
_FUNCTION = "training_step"
#: torch-mlir's passes; the last drop what nothing reads any more.
_PIPELINE = (
    "builtin.module(func.func(convert-torch-onnx-to-torch),torch-lower-to-backend-contract,"
    "torch-backend-to-stablehlo-backend-pipeline,func.func(canonicalize,cse))"
)


def write_step_stablehlo(path: Path, step: SingleStep, about: Mapping[str, object]) -> Path:
    """A step in fp32 as text, its manifest, and the state it starts from (`.safetensors`) beside it.

    Raises: UnsupportedModel with every op that has no form in ONNX here; MissingDependency without the extra.
    """
    for package in ("onnx", "torch_mlir", "iree", "iree.compiler", "iree.runtime"):
        need(package, EXTRA)
    from onnx import shape_inference
    from torch_mlir import ir
    from torch_mlir.dialects import torch as dialect
    from torch_mlir.extras import onnx_importer
    from torch_mlir.passmanager import PassManager

    model = shape_inference.infer_shapes(model_beside_state(path, step, about))
    with ir.Context() as context:
        dialect.register_dialect(context)
        info = onnx_importer.ModelInfo(model)
        module = info.create_module(context=context).operation
        onnx_importer.NodeImporter.define_function(info.main_graph, module).import_all()
        PassManager.parse(_PIPELINE).run(module)
        # Counts of a mean's elements come out as arith.constant, which reads as stablehlo.constant does.
        text = str(module).replace("arith.constant dense", "stablehlo.constant dense")
        path.write_text(f"{text}\n", encoding="utf-8")
    return path


def replay_step_stablehlo(
    path: Path, feeds: Sequence[Mapping[str, Array]]
) -> tuple[dict[str, Array], list[float]]:
    """(state, losses) after running what `write_step_stablehlo` wrote, on IREE."""
    return replay_beside(runner(path), path, feeds)


def runner(path: Path) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """One call of the step, compiled by IREE for this machine's processor."""
    from iree import compiler, runtime

    program = compiler.compile_str(
        path.read_text(encoding="utf-8"), input_type="stablehlo", target_backends=["llvm-cpu"],
        extra_args=["--iree-llvmcpu-target-cpu=host"],
    )  # fmt: skip
    context = runtime.SystemContext(config=runtime.Config("local-sync"))
    context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, program))
    call = context.modules.module[_FUNCTION]
    content = read_manifest(path)
    inputs, outputs = ([row["name"] for row in content[side]] for side in ("inputs", "outputs"))

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = call(*(np.asarray(feeds[name], np.float32) for name in inputs))
        return {name: np.array(value.to_host()) for name, value in zip(outputs, found, strict=True)}

    return run
