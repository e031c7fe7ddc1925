"""A program to and from Core ML's MIL protobuf (the inside of an `.mlpackage`), by coremltools' messages.

Needs the extra `coreml`. Constants become literals and every operation passes its type rule, as when text
is read; states, several functions and several results carry over. Refused: control flow, lists,
flexible shapes, and specifications that are not ML Programs.
"""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

from ane_trainer.ane.errors import MissingDependency, ProgramError
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Program, TensorType, Value
from ane_trainer.ane.mil.program import literal as make_literal
from ane_trainer.ane.mil.text.parser import resolve
from ane_trainer.ane.mil.text.syntax import (
    MAX_EXTENT,
    MAX_RANK,
    RawArgument,
    RawFunction,
    Reference,
    Statement,
)
from ane_trainer.ane.mil.weights import BLOB_CODES, BlobWriter, pack, packed_bytes, read_weight, unpack

#: MIL dtype -> number in the proto's DataType.
_DATA_TYPES = {
    "bool": 1, "string": 2, "fp16": 10, "fp32": 11, "fp64": 12,
    "int8": 21, "int16": 22, "int32": 23, "int64": 24, "int4": 25,
    "uint8": 31, "uint16": 32, "uint32": 33, "uint64": 34,
    "uint4": 35, "uint2": 36, "uint1": 37, "uint6": 38, "uint3": 39,
}  # fmt: skip
_DTYPES = {number: dtype for dtype, number in _DATA_TYPES.items()}

#: Opset tag of text -> opset of the proto.
_OPSETS = {"ios15": "CoreML5", "ios16": "CoreML6", "ios17": "CoreML7", "ios18": "CoreML8"}

#: Immediate values that are not raw bytes, and the field that holds them.
_FIELDS = {
    "bool": "bools", "string": "strings", "fp32": "floats", "fp64": "doubles", "int16": "ints",
    "uint16": "ints", "int32": "ints", "int64": "longInts", "uint64": "longInts",
}  # fmt: skip

#: Ops whose constants are attributes of the operation; so are those of iOS 16's constexpr ops with a shape.
_BRACKETED = ("const", "constexpr_affine_dequantize", "constexpr_cast")

#: Weights of at least this many elements go to the blob (coremltools' choice).
BLOB_ELEMENTS = 10


def coreml_messages() -> Any:
    """coremltools' `proto` module; `MissingDependency` when it is not installed. Takes seconds to import."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from coremltools import proto
    except ImportError as fault:
        raise MissingDependency(
            "reading or writing an .mlpackage: needs coremltools; it is not installed. "
            "Do pip install 'ane_trainer[coreml]'."
        ) from fault
    finally:
        logging.disable(level)
    return proto


def program_from_proto(message: Any, blobs: Mapping[str, bytes]) -> Program:
    """The program in a `MIL_pb2.Program`; `blobs` maps the file names it uses to their contents."""
    functions = [
        _Reader(name, message.functions[name], blobs).function() for name in sorted(message.functions)
    ]
    return Program(resolve(functions, _refuse), "1.0", _attributes(message))


def _attributes(message: Any) -> tuple[tuple[str, str], ...]:
    """The string pairs of the program's buildInfo dictionary."""
    info = message.attributes.get("buildInfo")
    entries = info.immediateValue.dictionary.values if info is not None else ()
    texts = ((entry.key.immediateValue.tensor, entry.value.immediateValue.tensor) for entry in entries)
    pairs = ((key.strings.values, value.strings.values) for key, value in texts)
    return tuple((key[0], value[0]) for key, value in pairs if len(key) == len(value) == 1)


def _refuse(reason: str, start: int | None = None, code: str = "MIL110") -> NoReturn:
    place = "Core ML program" if start is None else f"Core ML program, operation {start}"
    raise ProgramError(f"{place}: {reason}.", code=code)


class _Reader:
    """Reads one function of the proto; `start` of what it makes is the operation's number, from 1."""

    def __init__(self, name: str, message: Any, blobs: Mapping[str, bytes]) -> None:
        self._name, self._message, self._blobs = name, message, blobs
        self._number = 0

    def function(self) -> RawFunction:
        block = self._message.block_specializations.get(self._message.opset)
        if block is None:
            self._fail(f"function {self._name} needs a block for its opset {self._message.opset!r}")
        statements = []
        for number, op in enumerate(block.operations, 1):
            self._number = number
            statements.append(self._statement(op))
        opset = next((tag for tag, name in _OPSETS.items() if name == self._message.opset), "ios18")
        inputs = tuple((v.name, self._type(v.type), 0) for v in self._message.inputs)
        outputs = tuple(Reference(name, self._number) for name in block.outputs)
        return RawFunction(self._name, 0, opset, inputs, tuple(statements), outputs)

    def _fail(self, reason: str) -> NoReturn:
        _refuse(reason, self._number or None)

    def _statement(self, op: Any) -> Statement:
        if op.blocks:
            self._fail(
                f"{op.type}: needs an operation without blocks; control flow has no form on the engine"
            )
        arguments: dict[str, RawArgument] = {}
        for key, value in sorted(op.attributes.items()):
            if key != "name":
                arguments[key] = self._literal(value)
        for key, argument in sorted(op.inputs.items()):
            items = tuple(self._binding(binding) for binding in argument.arguments)
            arguments[key] = items[0] if len(items) == 1 else items
        results = tuple((v.name, self._type(v.type), self._number) for v in op.outputs)
        return Statement(op.type, self._number, results, arguments)

    def _binding(self, binding: Any) -> Reference | Literal:
        if binding.WhichOneof("binding") == "name":
            return Reference(binding.name, self._number)
        return self._literal(binding.value)

    def _type(self, message: Any) -> TensorType:
        which = message.WhichOneof("type")
        if which == "stateType":
            inner = self._type(message.stateType.wrappedType)
            return TensorType(inner.dtype, inner.shape, state=True)
        if which != "tensorType":
            self._fail(f"needs a tensor or a state; got {which}")
        tensor = message.tensorType
        dtype = _DTYPES.get(tensor.dataType)
        if dtype is None or len(tensor.dimensions) > MAX_RANK:
            self._fail(f"needs a known dtype and at most {MAX_RANK} axes; got dtype number {tensor.dataType}")
        shape = []
        for dimension in tensor.dimensions:
            if dimension.WhichOneof("dimension") != "constant" or dimension.constant.size > MAX_EXTENT:
                self._fail(
                    "needs static shapes; got a flexible one. Export the model with fixed input shapes"
                )
            shape.append(int(dimension.constant.size))
        return TensorType(dtype, tuple(shape))

    def _literal(self, value: Any) -> Literal:
        type_ = self._type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            name = value.blobFileValue.fileName
            if name not in self._blobs:
                self._fail(f"needs the weight file {name}; it is not in the package")
            return Literal(type_, read_weight(self._blobs[name], value.blobFileValue.offset, type_))
        if value.immediateValue.WhichOneof("value") != "tensor":
            self._fail(f"needs tensor constants; got {value.immediateValue.WhichOneof('value')}")
        return self._immediate(type_, value.immediateValue.tensor)

    def _immediate(self, type_: TensorType, tensor: Any) -> Literal:
        field = tensor.WhichOneof("value")
        values = getattr(tensor, field).values if field else ()
        if type_.dtype == "string":
            texts = tuple(map(str, values))
            if field != "strings" or len(texts) != type_.size:
                self._fail(f"needs {type_.size} strings; got {len(texts)} {field}")
            return Literal(type_, texts[0] if type_.rank == 0 else texts)
        if field == "bytes":
            if len(values) != packed_bytes(type_):
                self._fail(f"needs {packed_bytes(type_)} bytes for {type_}; got {len(values)}")
            return Literal(type_, unpack(bytes(values), type_.dtype, type_.size))
        if field == "strings" or len(values) != type_.size:
            self._fail(f"needs {type_.size} numbers for {type_}; got {len(values)} {field}")
        try:
            return Literal(type_, make_literal(tuple(values), type_.dtype).data)
        except (struct.error, OverflowError) as fault:
            self._fail(f"needs numbers that {type_.dtype} holds ({fault})")


def program_to_proto(
    program: Program, *, blob_path: str = "@model_path/weights/weight.bin"
) -> tuple[object, bytes]:
    """The `MIL_pb2.Program` and the weight blob it addresses under `blob_path`.

    `coreml_update_state` is written as coremltools writes it: a `write_state` and a `read_state`.
    """
    writer = _Writer(coreml_messages().MIL_pb2, blob_path)
    message = writer.messages.Program(version=1)
    for function in program.functions:
        writer.function(message.functions[function.name], function)
    return message, writer.blob.finish()


class _Writer:
    """Fills messages; holds the blob that the constants of all functions share."""

    def __init__(self, messages: Any, blob_path: str) -> None:
        self.messages, self.blob, self._path = messages, BlobWriter(), blob_path

    def function(self, message: Any, function: Function) -> None:
        message.opset = _OPSETS.get(function.opset, "CoreML8")
        block = message.block_specializations[message.opset]
        for port in function.inputs:
            self._named(message.inputs.add(), port)
        block.outputs.extend(v.name for v in function.outputs)
        taken = {v.name for op in function.ops for v in op.results} | {v.name for v in function.inputs}
        for op in function.ops:
            self._op(block, op, taken)

    def _op(self, block: object, op: Op, taken: set[str]) -> None:
        args = dict(op.args)
        if op.kind == "coreml_update_state":
            self._plain(
                block,
                "write_state",
                {"input": args["state"], "data": args["value"]},
                (),
                op.name + "_write",
                taken,
            )
            self._plain(block, "read_state", {"input": args["state"]}, op.results, op.name, taken)
        elif op.kind in _BRACKETED or (op.kind.startswith("constexpr_") and op.arg("shape") is not None):
            self._attributes(block, op)
        else:
            self._plain(block, op.kind, args, op.results, op.name, taken)

    def _attributes(self, block: Any, op: Op) -> None:
        message = block.operations.add(type=op.kind)
        self._value(message.attributes["name"], make_literal(op.name, "string"))
        for key, literal in op.literals():
            self._value(message.attributes[key], literal)
        self._named(message.outputs.add(), op.result)

    def _plain(
        self,
        block: Any,
        kind: str,
        args: Mapping[str, Arg],
        results: tuple[Value, ...],
        name: str,
        taken: set[str],
    ) -> None:
        bindings = {key: self._names(block, key, argument, name, taken) for key, argument in args.items()}
        message = block.operations.add(type=kind)
        self._value(message.attributes["name"], make_literal(name, "string"))
        for key, names in bindings.items():
            for bound in names:
                message.inputs[key].arguments.add().name = bound
        for result in results:
            self._named(message.outputs.add(), result)

    def _names(self, block: object, key: str, argument: Arg, name: str, taken: set[str]) -> list[str]:
        """What an argument is called; a literal becomes a const operation before its user."""
        found = []
        for i, item in enumerate(argument if isinstance(argument, tuple) else (argument,)):
            if isinstance(item, Value):
                found.append(item.name)
                continue
            wish = candidate = f"{name}_{key}_{i}" if isinstance(argument, tuple) else f"{name}_{key}"
            number = 1
            while candidate in taken:
                candidate, number = f"{wish}_{number}", number + 1
            taken.add(candidate)
            self._attributes(block, Op("const", (("val", item),), (Value(candidate, item.type),)))
            found.append(candidate)
        return found

    def _named(self, message: Any, value: Value) -> None:
        message.name = value.name
        self._type(message.type, value.type)

    def _type(self, message: Any, type_: TensorType) -> None:
        tensor = message.stateType.wrappedType.tensorType if type_.state else message.tensorType
        tensor.dataType = _DATA_TYPES[type_.dtype]
        tensor.rank = type_.rank
        for extent in type_.shape:
            tensor.dimensions.add().constant.size = extent

    def _value(self, message: Any, literal: Literal) -> None:
        self._type(message.type, literal.type)
        dtype, tensor = literal.type.dtype, message.immediateValue.tensor
        if dtype in BLOB_CODES and literal.type.size >= BLOB_ELEMENTS and literal.type.rank:
            message.blobFileValue.fileName = self._path
            message.blobFileValue.offset = self.blob.add(literal)
            return
        values = literal.to_python()
        flat = values if isinstance(values, tuple) else (values,)
        if dtype in _FIELDS:
            getattr(tensor, _FIELDS[dtype]).values.extend(flat)
        elif isinstance(literal.data, bytes):
            tensor.bytes.values = pack(literal.data, dtype)
