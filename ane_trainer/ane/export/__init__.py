"""Exports: a trained model, or its training step, as a file for apps; each is run again on the spot.

Formats: mlpackage, aimodel, onnx, torch for inference; step-mlpackage, step-aimodel, step-onnx, step-stablehlo, app
(Swift) for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ane_trainer.ane.capture.calibrate import module_mode
from ane_trainer.ane.dispatch.devices import get_device
from ane_trainer.ane.dispatch.feeds import RANGES
from ane_trainer.ane.dispatch.parameters import check_parameters
from ane_trainer.ane.errors import DataError, UsageError
from ane_trainer.ane.export import inference, onnx_step, stablehlo_step, step
from ane_trainer.ane.export.freeze import Deployed, Signature, to_input
from ane_trainer.ane.export.report import (
    ExportOptions,
    ExportReport,
    accuracy,
    largest_difference,
    size_bytes,
)
from ane_trainer.ane.export.step import SingleStep
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Compiled

__all__ = [
    "DEFAULT_NAMES",
    "FORMATS",
    "SINGLE_FORMATS",
    "STEP_FORMATS",
    "UNVERIFIED",
    "ExportOptions",
    "ExportReport",
    "Signature",
    "SingleStep",
    "export_inference",
    "export_step",
    "format_of",
    "in_fp32",
]

_INFERENCE = {
    "mlpackage": (inference.write_mlpackage, inference.run_mlpackage, "our reader and the simulator"),
    "aimodel": (inference.write_aimodel, inference.run_aimodel, "Apple's Core AI runtime on this machine"),
    "onnx": (inference.write_onnx, inference.run_onnx, "onnxruntime"),
    "torch": (inference.write_torch, inference.run_torch, "torch.export.load"),
}
#: Formats that hold the training step; `app` is a Swift package around it.
STEP_FORMATS = ("step-mlpackage", "step-aimodel", "step-onnx", "step-stablehlo", "app")
#: Those that are lowered for fp32 -> writing, running again, and by what.
_SINGLE = {
    "step-onnx": (onnx_step.write_step_onnx, onnx_step.replay_step_onnx, "onnxruntime, in fp32"),
    "step-stablehlo": (
        stablehlo_step.write_step_stablehlo,
        stablehlo_step.replay_step_stablehlo,
        "IREE, in fp32",
    ),
}
SINGLE_FORMATS = tuple(_SINGLE)
FORMATS = (*_INFERENCE, *STEP_FORMATS)
#: How a format's file is called where nobody says.
DEFAULT_NAMES = {
    "mlpackage": "model.mlpackage", "aimodel": "model.aimodel", "onnx": "model.onnx", "torch": "torch",
    "step-mlpackage": "step.mlpackage", "step-aimodel": "step.aimodel", "step-onnx": "step.onnx",
    "step-stablehlo": "step.mlir", "app": "app",
}  # fmt: skip

_PRECISION = {"aimodel": "fp16", "onnx": "fp32", "torch": "fp32"}
UNVERIFIED = {
    "mlpackage": "Core ML itself, on a Mac or iPhone",
    "aimodel": "the Neural Engine, on macOS 27",
    "step-mlpackage": "Core ML itself, on macOS 15 or iOS 18",
    "step-aimodel": "the Neural Engine, on macOS 27",
    "step-onnx": "",
    "step-stablehlo": "",
    "app": "Apple's Swift compiler, Core ML and the Neural Engine",
}


def format_of(path: str | Path, format: str | None = None) -> str:
    """The export format: as given, else by the path's ending (.mlpackage, .aimodel, .onnx).

    Raises: UsageError (ANE115) for an unknown format, or where the path does not tell; ANE111 for the ending of
    another format than the given one.
    """
    ending = Path(path).suffix
    found = format or {f".{name}": name for name in ("mlpackage", "aimodel", "onnx")}.get(ending)
    if found not in FORMATS:
        raise UsageError(
            f"format: needs one of {', '.join(FORMATS)}; got {format or Path(path).suffix or path!r}. "
            "Give one of them.",
            code="ANE115",
        )
    own = Path(DEFAULT_NAMES[found]).suffix
    if ending != own and ending in {Path(name).suffix for name in DEFAULT_NAMES.values()} - {""}:
        fix = f"Rename it, e.g. {Path(path).with_suffix(own).name}" if own else "Give a folder's name"
        raise UsageError(
            f"{path}: needs a name that fits the format {found}; got {ending}. {fix}, or choose another --format.",
            code="ANE111",
        )
    return found


def in_fp32(format: str, weights: str) -> bool:
    """Whether a step in this format, asked for with these weights, is one in fp32.

    Raises: UsageError (ANE118) for weights that it does not come with.
    """
    if weights != "fp16" and (weights != "fp32" or format not in ("step-aimodel", *SINGLE_FORMATS)):
        raise UsageError(
            f"weights: needs fp16, or fp32 in a step-aimodel; got {weights} and the format {format}. "
            "Leave --weights out.",
            code="ANE118",
        )
    return format in SINGLE_FORMATS or weights == "fp32"


def export_inference(
    model: nn.Module,
    path: str | Path,
    format: str,
    signature: Signature,
    x: torch.Tensor,
    labels: torch.Tensor | None = None,
    options: ExportOptions | None = None,
) -> ExportReport:
    """Write the model and run the file again on examples x [N, ...] as training saw them.

    Raises: UnsupportedModel, MissingDependency (naming the extra), UsageError, DataError DATA106 for parameters beyond
    fp16 and for outputs that are not finite.
    """
    options = options or ExportOptions()
    write, run, checked_by = _INFERENCE[format]
    check_parameters(model, RANGES["fp16"])
    with module_mode(model, training=False):
        inputs = to_input(x, signature)
        with torch.no_grad():
            wanted = Deployed(model, signature)(inputs).numpy()
        _check_finite(wanted, "the model in PyTorch")
        written = write(Path(path), model, signature, options.weights, options.texts)
    runner = run(written, signature, options.chip, options.fidelity)
    got = _in_batches(runner, inputs.numpy(), signature.batch)
    _check_finite(got, f"{written} in {checked_by}")
    truth = None if labels is None else labels.numpy()
    if format == "mlpackage":
        checked_by += f" of {options.chip}, {options.fidelity}"
    return ExportReport(
        written, format, size_bytes(written), _PRECISION.get(format, options.weights), checked_by,
        "the same model in PyTorch, fp32", len(inputs), largest_difference(got, wanted),
        accuracy(got, truth), accuracy(wanted, truth), UNVERIFIED.get(format, ""),
    )  # fmt: skip


def _check_finite(output: Array, where: str) -> None:
    """Raises: DataError DATA106."""
    if not bool(np.isfinite(output).all()):
        raise DataError(
            f"export: needs outputs that are finite; {where} gives nan or inf on the examples of the check. "
            "Train again with a lower learning rate, or look for outliers in the data.",
            code="DATA106",
        )


def export_step(
    compiled: Compiled,
    state: Mapping[str, Array],
    feeds: Sequence[Mapping[str, Array]],
    path: str | Path,
    format: str,
    options: ExportOptions | None = None,
    about: Mapping[str, object] | None = None,
    single: SingleStep | None = None,
) -> ExportReport:
    """Write a compiled fp16 training step with its state, and run the file for `feeds`, one feed a step.

    The reference is the same program from the same state on the simulator: a package must agree in every bit
    of the state; an asset, ONNX and StableHLO are compared in losses and parameters, where IEEE numbers stay near the
    engine's. `single`: the step in fp32, for ONNX and StableHLO, and for an asset with weights in fp32.
    """
    lowered, options = compiled.legalized.lowered, options or ExportOptions()
    if lowered.program.main.inputs[0].type.dtype != "fp16":
        raise UsageError("export: needs a step in fp16; got one in fp32. Compile it for fp16.", code="ANE116")
    if options.state not in step.FORMS:
        raise UsageError(
            f"state: needs one of {', '.join(step.FORMS)}; got {options.state!r}. Choose one of them.",
            code="ANE116",
        )
    fidelity = options.fidelity
    if format == "step-mlpackage":
        written = step.write_step_mlpackage(Path(path), lowered, state, about or {}, options.state)
        got, losses = step.replay_mlpackage(written, feeds, compiled.chip, fidelity)
        checked_by = f"our reader and the simulator of {compiled.chip}, {fidelity}"
    elif format in _SINGLE:
        assert single is not None
        write, replay, checked_by = _SINGLE[format]
        written = write(Path(path), single, about or {})
        got, losses = replay(written, feeds)
    else:
        own = single or step.with_constants(lowered, state)
        written = step.write_step_aimodel(Path(path), own, about or {}, options.state)
        dtype = np.float16 if single is None else np.float32
        got, losses = step.replay_aimodel(
            written, [{k: v.astype(dtype) for k, v in f.items()} for f in feeds]
        )
        checked_by = "Apple's Core AI runtime on this machine"
    wanted, reference = _simulate(compiled, state, feeds, fidelity)
    wanted = {name: wanted[name] for name in step.changing(lowered)}
    if format != "step-mlpackage":  # optimizer state is in units of its own
        parameters = {p.name for p in compiled.inputs if p.role == "state" and "/" not in p.target}
        got, wanted = ({k: v for k, v in arrays.items() if k in parameters} for arrays in (got, wanted))
    difference = step.state_difference(got, wanted)
    difference = max(difference, largest_difference(np.asarray(losses), np.asarray(reference)))
    return ExportReport(
        written, format, size_bytes(written), "fp16" if single is None else "fp32", checked_by,
        "the same steps on the simulator",
        len(feeds), difference, unverified=UNVERIFIED[format],
    )  # fmt: skip


def _simulate(
    compiled: Compiled,
    state: Mapping[str, Array],
    feeds: Sequence[Mapping[str, Array]],
    fidelity: str,
) -> tuple[dict[str, Array], list[float]]:
    session = get_device("sim").device.load(compiled, fidelity=fidelity, threads=None)
    for name, value in state.items():
        session.write(name, value)
    losses = [float(session.run(feed)["loss"][0]) for feed in feeds]
    after = {name: session.read(name) for name in state}
    session.close()
    return after, losses


def _in_batches(run: inference.Runner, inputs: Array, batch: int) -> Array:
    """Outputs [N, ...]; the last batch is filled up with the first examples."""
    parts = []
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        filled = part if len(part) == batch else np.resize(part, (batch, *part.shape[1:]))
        parts.append(np.array(run(filled))[: len(part)])
    return np.concatenate(parts)
