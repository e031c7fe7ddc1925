"""Exports of a trained model for inference: a function per file format, and one that runs the file again."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ane_trainer.ane.capture.rewrites.keras_variables import copy_of
from ane_trainer.ane.compiler.coreai import open_asset, save_asset
from ane_trainer.ane.errors import MissingDependency, UsageError
from ane_trainer.ane.export.compress import compress
from ane_trainer.ane.export.freeze import Deployed, Signature, freeze, single_precision_border
from ane_trainer.ane.export.package import Description, write_package
from ane_trainer.ane.mil.loading import load_program
from ane_trainer.ane.mil.program import Program
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.utils import without_warnings_of

Runner = Callable[[Array], Array]


def write_mlpackage(
    path: Path, model: nn.Module, signature: Signature, weights: str, texts: Mapping[str, str]
) -> Path:
    """Core ML, fp16 (weights fp16, int8 or int4); an image input and class labels as the signature says."""
    function = compress(freeze(model, signature).program.main, weights)
    labels = signature.class_names if signature.batch == 1 else ()
    image = (signature.input_name,) if _is_image(signature) else ()
    single = frozenset((*image, *([signature.output_name] if labels else [])))
    described = {key: texts.get(key, "") for key in ("author", "license", "version")}
    description = Description(
        summary=texts.get("description", ""), images=image, labels=labels,
        probabilities=signature.output_name,
        metadata={**_preprocessing(signature), **texts}, **described,
    )  # fmt: skip
    return write_package(path, Program((single_precision_border(function, single),)), description)


def write_aimodel(
    path: Path, model: nn.Module, signature: Signature, weights: str, texts: Mapping[str, str]
) -> Path:
    """Core AI, fp16; the input is a tensor (of pixels where the signature normalises)."""
    _only_fp16("aimodel", weights)
    return save_asset(path, freeze(model, signature), metadata={**_preprocessing(signature), **texts})


def write_onnx(
    path: Path, model: nn.Module, signature: Signature, weights: str, texts: Mapping[str, str]
) -> Path:
    """ONNX, fp32, by torch.onnx."""
    _only_fp16("onnx", weights)
    need("onnxscript", "onnx")
    need("onnxruntime", "onnx")
    with warnings.catch_warnings(), without_warnings_of("torch.onnx._internal.exporter._registration"):
        warnings.simplefilter("ignore")  # and, of the logger, that torchvision is not installed
        program = torch.onnx.export(
            _deployed(model, signature), (_example(signature),), dynamo=True, verbose=False,
            input_names=[signature.input_name], output_names=[signature.output_name],
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update({**_preprocessing(signature), **texts})
    program.save(str(path))
    return path


def write_torch(
    path: Path, model: nn.Module, signature: Signature, weights: str, texts: Mapping[str, str]
) -> Path:
    """A folder with model.safetensors (the state_dict) and model.pt2 (torch.export), fp32."""
    from safetensors.torch import save_file

    _only_fp16("torch", weights)
    if path.is_dir():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(state, path / "model.safetensors", {**_preprocessing(signature), **texts})
    exported = torch.export.export(_deployed(model, signature), (_example(signature),))
    torch.export.save(exported, path / "model.pt2")
    return path


def run_mlpackage(path: Path, signature: Signature, chip: str, fidelity: str) -> Runner:
    """The package, read back by our reader, on the simulator of a chip."""
    plan = prepare(load_program(path).main, make_context(chip, fidelity))
    return lambda x: plan.run({signature.input_name: x.astype(np.float32)})[signature.output_name]


def run_aimodel(path: Path, signature: Signature, chip: str, fidelity: str) -> Runner:
    """The asset on Apple's runtime."""
    asset = open_asset(path)
    return lambda x: asset.run({signature.input_name: x.astype(np.float16)})[signature.output_name]


def run_onnx(path: Path, signature: Signature, chip: str, fidelity: str) -> Runner:
    """The file on onnxruntime's CPU provider."""
    need("onnxruntime", "onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Array) -> Array:
        result: Array = session.run(None, {signature.input_name: x.astype(np.float32)})[0]
        return result

    return run


def run_torch(path: Path, signature: Signature, chip: str, fidelity: str) -> Runner:
    """model.pt2 with the weights read from model.safetensors."""
    from safetensors.torch import load_file

    with warnings.catch_warnings():  # torch 2.10 reads its own file through a buffer of which it warns
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        module = torch.export.load(path / "model.pt2").module()
    stored = {f"model.{name}": value for name, value in load_file(path / "model.safetensors").items()}
    known = module.state_dict()
    module.load_state_dict({name: value for name, value in stored.items() if name in known}, strict=False)

    def run(x: Array) -> Array:
        result: Array = module(torch.from_numpy(x.astype(np.float32))).detach().numpy()
        return result

    return run


def need(package: str, extra: str) -> None:
    """Raises: MissingDependency (ANE201) naming the extra that brings `package`."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(
            f'export: needs {package}; it is not installed. Install it: pip install "ane_trainer[{extra}]"'
        )


def _only_fp16(format: str, weights: str) -> None:
    if weights != "fp16":
        raise UsageError(
            f"weights: {weights} is for mlpackage; got the format {format}. Leave --weights out.",
            code="ANE118",
        )


def _is_image(signature: Signature) -> bool:
    shape = signature.batch_shape
    return signature.normalise is not None and len(shape) == 4 and shape[0] == 1 and shape[1] in (1, 3)


def _deployed(model: nn.Module, signature: Signature) -> nn.Module:
    return Deployed(copy_of(model).cpu().float(), signature).eval()


def _example(signature: Signature) -> torch.Tensor:
    return torch.zeros(signature.batch_shape)


def _preprocessing(signature: Signature) -> dict[str, str]:
    """The metadata that says what goes in and out."""
    if signature.normalise is None:
        text = "none: the input is the tensor that training fed"
    else:
        mean, std = signature.normalise
        text = f"inside: pixels 0..255, (pixel / 255 - {mean:g}) / {std:g}"
    return {"preprocessing": text, "classes": ",".join(signature.class_names)}
