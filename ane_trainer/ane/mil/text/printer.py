"""Prints a `Program` as MIL text and its weight blob, in the dialect that the direct path and e5rt take.

Every constant is a statement of its own, also the attributes (Orion: inline ones are refused on the
direct path); floats are hexadecimal; floating tensors and large integer tensors go to the blob
(ANEForge's emitter keeps only scalars and short integer vectors in the text).

    tensor<int32, [1]> t1_axes = const()[name = string("t1_axes"), val = tensor<int32, [1]>([1])];
    tensor<fp16, [4, 1]> t1 = reduce_sum(axes = t1_axes, x = x)[name = string("t1")];
"""

from __future__ import annotations

import json
import math
import re
import struct

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.program import DTYPE_BYTES, Arg, Function, Literal, Op, Program, TensorType, Value
from ane_trainer.ane.mil.weights import BLOB_CODES, BlobWriter

#: Written when a program brings no attributes; the versions ANEForge 0.4.0 writes.
DEFAULT_ATTRIBUTES = (("coremlc-component-MIL", "3520.4.1"), ("coremlc-version", "3520.5.1"))

#: Integer and boolean tensors up to this many elements stay in the text.
INLINE_ELEMENTS = 64

#: Words of the text that cannot name a value.
RESERVED = frozenset(
    ("program", "func", "tensor", "state", "list", "tuple", "dict", "string", *DTYPE_BYTES)
) | {"true", "false", "const", "BLOBFILE", "inf", "nan"}

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def print_program(program: Program, *, blob_path: str = "@model_path/weights.bin") -> tuple[str, bytes]:
    """The MIL text and the blob that its BLOBFILE constants address (a bare header without weights).

    `blob_path` is how the text names the blob: `@model_path/weights.bin` for e5rt,
    `@model_path/weights/weight.bin` for the direct path. `ProgramError` when a value's name cannot be
    written.
    """
    blob = BlobWriter()
    pairs = ", ".join(f"{{{quote(k)}, {quote(v)}}}" for k, v in program.attributes or DEFAULT_ATTRIBUTES)
    lines = [f"program({program.version})", f"[buildInfo = dict<string, string>({{{pairs}}})]", "{"]
    for function in program.functions:
        lines += _FunctionPrinter(function, blob, blob_path).lines()
    return "\n".join([*lines, "}", ""]), blob.finish()


def quote(text: str) -> str:
    """A MIL string in quotes, with JSON's escapes; characters beyond ASCII are written as they are."""
    return json.dumps(text, ensure_ascii=False)


def type_text(type_: TensorType) -> str:
    """`fp16`, `tensor<fp16, [1, 4]>` or `state<tensor<fp16, [1, 4]>>`."""
    text = f"tensor<{type_.dtype}, [{', '.join(map(str, type_.shape))}]>" if type_.shape else type_.dtype
    return f"state<{text}>" if type_.state else text


def number_text(value: bool | int | float) -> str:
    """A number as MIL writes it: `true`, `-3`, `0x1.8p+1`, `-inf`, `nan`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    mantissa, exponent = value.hex().split("p")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}p{exponent}"


def literal_text(literal: Literal) -> str:
    """A constant written inline, e.g. `tensor<int32, [2]>([1, 0])` or `fp16(0x1p+0)`."""
    values = literal.to_python()
    flat = values if isinstance(values, tuple) else (values,)
    items = [quote(v) if isinstance(v, str) else number_text(v) for v in flat]
    if not items:
        return f"{type_text(literal.type)}([])"
    for extent in reversed(literal.type.shape):
        items = ["[" + ", ".join(items[i : i + extent]) + "]" for i in range(0, len(items), extent)]
    return f"{type_text(literal.type)}({items[0]})"


def goes_to_blob(literal: Literal) -> bool:
    """Whether a constant is stored in the weight blob: floating tensors, and integer ones above 64 elements.

    A NaN scalar with a payload of its own goes there too, because text can write only the ordinary one.
    """
    type_ = literal.type
    if type_.dtype not in BLOB_CODES or not isinstance(literal.data, bytes) or not type_.size:
        return False
    if type_.rank == 0:
        return type_.dtype in ("fp16", "fp32") and _unusual_nan(literal.data)
    return type_.dtype in ("fp16", "fp32") or type_.size > INLINE_ELEMENTS


def attributes_in_brackets(op: Op) -> bool:
    """Whether an op's arguments are written in the brackets: `const` and the constexpr ops of iOS 16."""
    if op.kind in ("const", "constexpr_affine_dequantize", "constexpr_cast"):
        return True
    return op.kind in ("constexpr_lut_to_dense", "constexpr_sparse_to_dense") and op.arg("shape") is not None


def _unusual_nan(data: bytes) -> bool:
    code = "<e" if len(data) == 2 else "<f"
    return math.isnan(struct.unpack(code, data)[0]) and data != struct.pack(code, math.nan)


class _FunctionPrinter:
    """Prints one function; holds the names that are taken and the constants already written."""

    def __init__(self, function: Function, blob: BlobWriter, blob_path: str) -> None:
        self._function, self._blob, self._path = function, blob, blob_path
        results = [value.name for op in function.ops for value in op.results]
        self._taken = {value.name for value in function.inputs} | set(results)
        for name in sorted(self._taken):
            _check_name(name, function.name)
        self._written: dict[tuple[str, Literal], str] = {}
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        function = self._function
        _check_name(function.name, function.name)
        ports = ", ".join(f"{type_text(v.type)} {v.name}" for v in function.inputs)
        self._lines = [f"    func {function.name}<{function.opset}>({ports}) {{"]
        for op in function.ops:
            self._op(op)
        return [*self._lines, f"    }} -> ({', '.join(v.name for v in function.outputs)});"]

    def _op(self, op: Op) -> None:
        declared = ", ".join(f"{type_text(v.type)} {v.name}" for v in op.results)
        head = f"{declared} = {op.kind}" if declared else op.kind
        named = [("name", f"string({quote(op.name)})")]
        if attributes_in_brackets(op):
            named += [
                (key, self._inline(value, op)) for key, value in sorted(op.args, key=lambda item: item[0])
            ]
            self._lines.append(f"        {head}()[{', '.join(f'{k} = {v}' for k, v in named)}];")
            return
        ordered = sorted(op.args, key=lambda item: item[0])
        args = ", ".join(f"{key} = {self._argument(key, value, op)}" for key, value in ordered)
        self._lines.append(f"        {head}({args})[name = string({quote(op.name)})];")

    def _inline(self, argument: Arg, op: Op) -> str:
        if not isinstance(argument, Literal):
            raise ProgramError(f"{op.name}: {op.kind} needs constants; got a runtime value.", code="MIL101")
        return self._payload(argument)

    def _argument(self, key: str, argument: Arg, op: Op) -> str:
        if isinstance(argument, Value):
            return argument.name
        if isinstance(argument, Literal):
            return self._constant(argument, f"{op.name}_{key}")
        names = (self._argument(f"{key}_{i}", item, op) for i, item in enumerate(argument))
        return f"({', '.join(names)})"

    def _constant(self, literal: Literal, fallback: str) -> str:
        wish = re.sub(r"[^A-Za-z0-9_]", "_", literal.name or fallback)
        if not _IDENTIFIER.match(wish) or wish in RESERVED:
            wish = f"_{wish}"
        if (wish, literal) in self._written:
            return self._written[wish, literal]
        name, number = wish, 1
        while name in self._taken:
            name, number = f"{wish}_{number}", number + 1
        self._taken.add(name)
        self._written[wish, literal] = name
        attributes = f"name = string({quote(name)}), val = {self._payload(literal)}"
        self._lines.append(f"        {type_text(literal.type)} {name} = const()[{attributes}];")
        return name

    def _payload(self, literal: Literal) -> str:
        if not goes_to_blob(literal):
            return literal_text(literal)
        where = f"path = string({quote(self._path)}), offset = uint64({self._blob.add(literal)})"
        return f"{type_text(literal.type)}(BLOBFILE({where}))"


def _check_name(name: str, function: str) -> None:
    if not _IDENTIFIER.match(name) or name in RESERVED:
        raise ProgramError(
            f"{function}: a name in MIL text needs letters, digits and _ and must not be a word of the "
            f"language; got {name!r}. Rename the value.",
            code="MIL104",
        )
