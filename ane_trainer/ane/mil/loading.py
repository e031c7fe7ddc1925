"""Reads a program from disk: MIL text with its weights beside it, or a Core ML `.mlpackage`.

Files come from outside: only files inside the program's own folder are read, and every failure is a
`ProgramError` that names the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.coreml_proto import coreml_messages, program_from_proto
from ane_trainer.ane.mil.program import Program
from ane_trainer.ane.mil.text.parser import parse_program

#: Where a weight file is looked for beside a text, when the path that the text names does not exist.
WEIGHT_FOLDERS = ("", "weights")

_MODEL_PATH = "@model_path/"

#: Ending of a file beside a text with the SHA-256 of text and weights, as `sha256sum` writes it.
SUMS = ".sha256"

#: The entry of a package's metadata with its SHA-256, and the number of bytes that it covers, see `seal_package`.
SEAL = "ane_trainer.sha256"
_BLANK = "0" * 64


def sums_of(files: Mapping[str, bytes]) -> str:
    """What a file of sums holds for these files."""
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())


def seal_package(specification: bytes, blob: bytes) -> bytes:
    """The specification, whose metadata has `blank_seal`, with its digest and the blob's in that place."""
    seal = blank_seal(len(specification) + len(blob)).encode()
    digest = hashlib.sha256(specification + blob).hexdigest().encode()
    return specification.replace(seal, seal.replace(_BLANK.encode(), digest))


def blank_seal(size: int) -> str:
    """The entry `SEAL` before the digest is known; its length is always the same."""
    return f"{_BLANK} {size:012d}"


def load_program(path: str | Path) -> Program:
    """The program in `path`.

    `path` is a `.mil` text, a folder that holds `model.mil` (an e5rt build, a compiled `.mlmodelc`) or
    `program.mil` (a training run), or an `.mlpackage` (needs the extra `coreml`).

    Weights named `@model_path/...` are read from the text's own folder (or its `weights` folder). Refused
    with `ProgramError`: a path that does not exist, another kind of file, what `parse_program` refuses.
    """
    path = Path(path)
    if path.suffix == ".mlpackage" and path.is_dir():
        return _load_package(path)
    for name in ("model.mil", "program.mil"):
        if (path / name).is_file():
            return _load_text(path / name)
    if path.suffix in (".mil", ".txt") and path.is_file():
        return _load_text(path)
    got = "nothing there" if not path.exists() else "something else"
    raise ProgramError(
        f"{path}: needs a .mil text, a folder with model.mil or program.mil, or an .mlpackage; got {got}.",
        code="MIL111",
    )


def _load_text(path: Path) -> Program:
    try:
        text = _read(path).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise ProgramError(f"{path}: needs UTF-8 text; got {fault.reason}.", code="MIL111") from None
    _check_sums(path.parent, path.with_suffix(SUMS))
    names = set(re.findall(rf'"({_MODEL_PATH}[^"\n]*)"', text))
    try:
        return parse_program(text, _weight_files(path.parent, names))
    except ProgramError as fault:
        raise ProgramError(f"{path}: {fault.args[0]}", code=fault.code) from None


def _check_sums(folder: Path, path: Path) -> None:
    """ProgramError if a file in `folder` is not the one that the sums in `path`, where it is there, tell of."""
    if not path.is_file():
        return
    for line in _read(path).decode("utf-8", "replace").splitlines():
        wanted, _, name = line.partition("  ")
        if (folder / name).parent != folder or not (folder / name).is_file():
            raise ProgramError(
                f"{path}: needs the digests of files beside it; got {line[:80]!r}.", code="MIL111"
            )
        if hashlib.sha256(_read(folder / name)).hexdigest() != wanted:
            raise ProgramError(
                f"{folder / name}: needs the content that was written; its SHA-256 is another one than in {path.name}. "
                f"Write it again, or delete {path.name} if the change is meant.",
                code="MIL111",
            )


def _weight_files(folder: Path, names: set[str]) -> dict[str, bytes]:
    """Contents of the weight files that exist, by the name the program uses."""
    found = {}
    for name in sorted(names):
        relative = name.removeprefix(_MODEL_PATH)
        candidates = [folder / relative, *(folder / where / Path(relative).name for where in WEIGHT_FOLDERS)]
        for candidate in candidates:
            if candidate.resolve().is_relative_to(folder.resolve()) and candidate.is_file():
                found[name] = _read(candidate)
                break
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise ProgramError(
            f"{path}: needs a file that can be read; got {fault.strerror}.", code="MIL111"
        ) from None


def _load_package(package: Path) -> Program:
    """An `.mlpackage`: the specification that the manifest names, its MIL program, the weights beside it."""
    model = _model_file(package)
    messages = coreml_messages()
    spec = _specification(messages, model)
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        raise ProgramError(f"{package}: needs an ML Program; got the model type {kind}.", code="MIL111")
    folder = model.parent
    blobs = _weight_files(folder, _blob_names(spec.mlProgram))
    _check_seal(package, spec.description.metadata.userDefined.get(SEAL, ""), model)
    _without_classifier(spec.mlProgram)
    program = program_from_proto(spec.mlProgram, blobs)
    default = spec.description.defaultFunctionName or "main"
    first = sorted(program.functions, key=lambda function: function.name != default)
    return Program(tuple(first), program.version, program.attributes)


def _check_seal(package: Path, seal: str, model: Path) -> None:
    """ProgramError if a package that `seal_package` sealed has other bytes now.

    A package of another size was rewritten by another tool, which kept the metadata; it is read as it is.
    """
    digest, _, size = seal.partition(" ")
    if not size.isdecimal():
        return
    weights = model.parent / "weights" / "weight.bin"
    content = _read(model).replace(seal.encode(), blank_seal(int(size)).encode())
    content += _read(weights) if weights.is_file() else b""
    if len(content) == int(size) and hashlib.sha256(content).hexdigest() != digest:
        raise ProgramError(
            f"{package}: needs the content that was written; its SHA-256 is another one than in its metadata. "
            "Export it again.",
            code="MIL111",
        )


def _without_classifier(message: Any) -> None:
    """Core ML's `classify` (label and dictionary of probabilities) gives way to the probabilities it reads."""
    for function in message.functions.values():
        for block in function.block_specializations.values():
            for op in [op for op in block.operations if op.type == "classify"]:
                made = {output.name for output in op.outputs}
                kept = [name for name in block.outputs if name not in made]
                block.operations.remove(op)
                del block.outputs[:]
                block.outputs.extend([*kept, op.inputs["probabilities"].arguments[0].name])


def _model_file(package: Path) -> Path:
    try:
        manifest = json.loads(_read(package / "Manifest.json"))
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        model = package / "Data" / str(root)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ProgramError(
            f"{package}: needs a Manifest.json that names its model; it is damaged. Export it again.",
            code="MIL111",
        ) from None
    if not model.resolve().is_relative_to(package.resolve()):
        raise ProgramError(f"{package}: needs a model inside the package; got {root}.", code="MIL111")
    return model


def _specification(messages: Any, model: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    spec = messages.Model_pb2.Model()
    try:
        spec.ParseFromString(_read(model))
    except DecodeError as fault:
        raise ProgramError(f"{model}: needs a Core ML specification; got {fault}.", code="MIL111") from None
    return spec


def _blob_names(message: Any) -> set[str]:
    """Every weight file that the program's constants name."""
    names = set()
    for function in message.functions.values():
        for block in function.block_specializations.values():
            for op in block.operations:
                values = [*op.attributes.values()]
                values += [
                    b.value
                    for a in op.inputs.values()
                    for b in a.arguments
                    if b.WhichOneof("binding") == "value"
                ]
                names |= {
                    v.blobFileValue.fileName for v in values if v.WhichOneof("value") == "blobFileValue"
                }
    return names
