"""Writes Core ML `.mlpackage` folders: specification, MIL program, weights, manifest.

Images, class labels, states and several functions follow coremltools 9.0's specification files: iOS 18 /
macOS 15 (specification version 9). coremltools is imported only here and takes seconds.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.coreml_proto import coreml_messages, program_to_proto
from ane_trainer.ane.mil.loading import SEAL, blank_seal, seal_package
from ane_trainer.ane.mil.program import Function, Program, Value

SPECIFICATION_VERSION = 9
LABEL = "classLabel"

#: Core ML's numbers for multi-array element types (FeatureTypes.proto).
_ARRAY_TYPES = {"fp16": 65552, "fp32": 65568, "int32": 131104}


@dataclass(frozen=True)
class Description:
    """What an app sees besides the tensors: which input is an image, labels, texts.

    `images` names inputs [1, 1 or 3, H, W] that take 8-bit pixels; `labels` with `probabilities`, the output
    they belong to, makes the model a classifier.
    """

    summary: str = ""
    author: str = ""
    license: str = ""
    version: str = ""
    images: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    probabilities: str = ""
    metadata: Mapping[str, str] | None = None


def write_package(path: str | Path, program: Program, description: Description) -> Path:
    """Write the package; replaces an older one. A program of several functions starts with `main`.

    Raises: MissingDependency without the extra `coreml`; UsageError for a name without `.mlpackage`.
    """
    target = Path(path)
    if target.suffix != ".mlpackage":
        raise UsageError(f"{target}: needs a name that ends in .mlpackage. Rename it.", code="ANE111")
    messages = coreml_messages()
    spec = messages.Model_pb2.Model(specificationVersion=SPECIFICATION_VERSION)
    proto, blob = program_to_proto(program)
    spec.mlProgram.CopyFrom(proto)
    _describe(spec, messages, program, description)
    if description.labels:
        _add_classifier(spec, messages, description)
    texts = spec.description.metadata.userDefined
    texts[SEAL] = blank_seal(0)
    texts[SEAL] = blank_seal(spec.ByteSize() + len(blob))
    _write_files(target, seal_package(spec.SerializeToString(deterministic=True), blob), blob)
    return target


def _describe(spec: Any, messages: object, program: Program, description: Description) -> None:
    texts = spec.description.metadata
    texts.shortDescription, texts.author = description.summary, description.author
    texts.license, texts.versionString = description.license, description.version
    texts.userDefined.update(description.metadata or {})
    if len(program.functions) == 1:
        _features(spec.description, program.main, description)
        return
    spec.description.defaultFunctionName = program.main.name
    for function in program.functions:
        _features(spec.description.functions.add(name=function.name), function, description)


def _features(message: Any, function: Function, description: Description) -> None:
    for value in function.inputs:
        feature = (message.state if value.type.state else message.input).add(name=value.name)
        if value.type.state:
            _array(feature.type.stateType.arrayType, value)
        elif value.name in description.images:
            image = feature.type.imageType
            image.height, image.width = value.type.shape[-2:]
            image.colorSpace = {1: 10, 3: 20}[value.type.shape[1]]  # GRAYSCALE, RGB
        else:
            _array(feature.type.multiArrayType, value)
    for value in function.outputs:
        _array(message.output.add(name=value.name).type.multiArrayType, value)


def _array(message: Any, value: Value) -> None:
    message.dataType = _ARRAY_TYPES[value.type.dtype]
    message.shape.extend(value.type.shape)


def _add_classifier(spec: Any, messages: Any, description: Description) -> None:
    """Append MIL's `classify`: probabilities fp32 [1, C] -> label, dictionary of label to probability."""
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    text = messages.MIL_pb2.ValueType()
    text.tensorType.dataType = messages.MIL_pb2.DataType.Value("STRING")
    classify = block.operations.add(type="classify")
    classify.inputs["probabilities"].arguments.add(name=description.probabilities)
    classes = classify.inputs["classes"].arguments.add().value
    classes.type.listType.type.CopyFrom(text)
    classes.type.listType.length.constant.size = len(description.labels)
    for label in description.labels:
        value = classes.immediateValue.list.values.add()
        value.type.CopyFrom(text)
        value.immediateValue.tensor.strings.values.append(label)
    name = classify.attributes["name"]
    name.type.CopyFrom(text)
    name.immediateValue.tensor.strings.values.append("classify")
    winner = classify.outputs.add(name=LABEL)
    winner.type.CopyFrom(text)
    table = classify.outputs.add(name=f"{LABEL}_probs")
    table.type.dictionaryType.keyType.CopyFrom(text)
    table.type.dictionaryType.valueType.tensorType.dataType = messages.MIL_pb2.DataType.Value("FLOAT64")
    del block.outputs[:]
    block.outputs.extend([winner.name, table.name])
    del spec.description.output[:]
    spec.description.output.add(name=winner.name).type.stringType.SetInParent()
    spec.description.output.add(name=table.name).type.dictionaryType.stringKeyType.SetInParent()
    spec.description.predictedFeatureName = winner.name
    spec.description.predictedProbabilitiesName = table.name


def _write_files(target: Path, specification: bytes, blob: bytes) -> None:
    if target.exists():
        shutil.rmtree(target)
    data = target / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(specification)
    (data / "weights" / "weight.bin").write_bytes(blob)
    items = [("model.mlmodel", "CoreML Model Specification"), ("weights", "CoreML Model Weights")]
    (target / "Manifest.json").write_text(json.dumps(_manifest(items), indent=4), encoding="utf-8")


def _manifest(items: Sequence[tuple[str, str]]) -> dict[str, object]:
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, name)).upper(): {
            "author": "com.apple.CoreML", "description": text, "name": name,
            "path": f"com.apple.CoreML/{name}",
        }
        for name, text in items
    }  # fmt: skip
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": next(iter(entries)),
    }
