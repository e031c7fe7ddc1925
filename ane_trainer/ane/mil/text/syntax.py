"""The grammar of MIL text: tokens to statements, with constants read and nothing resolved yet.

    program(1.3) [buildInfo = dict<...>({...})] { functions }
    function: func main<ios18>(type name, ...) { statements } -> (name, ...);
    statement: [type name, ... =] op(key = argument, ...) [key = constant, ...] ;

Read as well: types spelled `fp16` or `tensor<fp16, []>`, constants inline or as statements, attributes of
functions (skipped), state inputs, comments. There is no recursion: nesting is counted.

Layer: between `weights` and `parser`, its only user.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ane_trainer.ane.mil.program import DTYPE_BYTES, Literal, TensorType
from ane_trainer.ane.mil.program import literal as make_literal
from ane_trainer.ane.mil.text.lexer import Lexer, Token
from ane_trainer.ane.mil.weights import integer_range

MAX_RANK = 16

#: Opsets whose ops are known here, of the deployment targets that have MIL programs.
OPSETS = ("ios15", "ios16", "ios17", "ios18", "ios26")
MAX_EXTENT = 2**31 - 1
_CLOSING = {"(": ")", "[": "]", "{": "}"}

#: Resolves a BLOBFILE: path, offset and type to the payload.
BlobReader = Callable[[str, int, TensorType], bytes]


@dataclass(frozen=True)
class Reference:
    """A use of a named value."""

    name: str
    start: int


RawArgument = Reference | Literal | tuple[Reference | Literal, ...]


@dataclass(frozen=True)
class Statement:
    """One operation as written; `start` is the offset of its op."""

    kind: str
    start: int
    results: tuple[tuple[str, TensorType, int], ...]
    arguments: dict[str, RawArgument]


@dataclass(frozen=True)
class RawFunction:
    """One function as written."""

    name: str
    start: int
    opset: str
    inputs: tuple[tuple[str, TensorType, int], ...]
    statements: tuple[Statement, ...]
    outputs: tuple[Reference, ...]


def read_program(
    lexer: Lexer, read_blob: BlobReader
) -> tuple[str, tuple[tuple[str, str], ...], list[RawFunction]]:
    """Version, header attributes and functions of a whole text."""
    lexer.expect("program")
    lexer.expect("(")
    version = lexer.kind("number", "a version").text
    lexer.expect(")")
    attributes = _header(lexer) if lexer.at("[") else ()
    lexer.expect("{")
    functions = []
    while not lexer.accept("}"):
        functions.append(_function(lexer, read_blob))
    lexer.kind("end", "nothing after the program")
    return version, attributes, functions


def _header(lexer: Lexer) -> tuple[tuple[str, str], ...]:
    """The string pairs `{"key", "value"}` of the header's dictionary."""
    tokens = _skip_brackets(lexer)
    texts = [(t.text, t.kind) for t in tokens]
    pairs = []
    for i in range(len(texts) - 4):
        (a, ka), (k, kk), (c, kc), (v, kv), (z, kz) = texts[i : i + 5]
        if (a, c, z) == ("{", ",", "}") and (ka, kk, kc, kv, kz) == (
            "mark",
            "string",
            "mark",
            "string",
            "mark",
        ):
            pairs.append((k, v))
    return tuple(pairs)


def _skip_brackets(lexer: Lexer) -> list[Token]:
    """Take everything from an opening bracket to the one that closes it."""
    tokens: list[Token] = []
    waiting: list[str] = []
    while True:
        token = lexer.token
        if token.kind == "end":
            lexer.refuse(f"needs `{waiting[-1]}`; got the end of the text")
        if token.kind == "mark" and token.text in _CLOSING:
            waiting.append(_CLOSING[token.text])
        elif token.kind == "mark" and token.text in ")]}" and token.text != waiting.pop():
            lexer.refuse(f"needs brackets that match; got {lexer.shown()}")
        tokens.append(lexer.take())
        if not waiting:
            return tokens


def _function(lexer: Lexer, read_blob: BlobReader) -> RawFunction:
    start = lexer.expect("func").start
    name = lexer.kind("name", "a function name").text
    lexer.expect("<")
    opset = lexer.kind("name", "an opset such as ios18").text
    if opset not in OPSETS:
        lexer.refuse(f"needs an opset of {OPSETS[0]} to {OPSETS[-1]}; got {opset}")
    lexer.expect(">")
    lexer.expect("(")
    inputs = [] if lexer.at(")") else _declarations(lexer)
    lexer.expect(")")
    if lexer.at("["):
        _skip_brackets(lexer)
    lexer.expect("{")
    statements = []
    while not lexer.accept("}"):
        statements.append(_statement(lexer, read_blob))
    lexer.expect("->")
    lexer.expect("(")
    outputs: list[Reference] = []
    while not lexer.accept(")"):
        if outputs:
            lexer.expect(",")
        token = lexer.kind("name", "an output")
        outputs.append(Reference(token.text, token.start))
    lexer.expect(";")
    return RawFunction(name, start, opset, tuple(inputs), tuple(statements), tuple(outputs))


def _declarations(lexer: Lexer) -> list[tuple[str, TensorType, int]]:
    found = []
    while True:
        type_ = read_type(lexer)
        token = lexer.kind("name", "a name")
        found.append((token.text, type_, token.start))
        if not lexer.accept(","):
            return found


def _statement(lexer: Lexer, read_blob: BlobReader) -> Statement:
    results: tuple[tuple[str, TensorType, int], ...] = ()
    if _at_type(lexer):
        results = tuple(_declarations(lexer))
        lexer.expect("=")
    op = lexer.kind("name", "an operation")
    arguments: dict[str, RawArgument] = {}
    lexer.expect("(")
    _arguments(lexer, read_blob, arguments, ")")
    if lexer.accept("["):
        _arguments(lexer, read_blob, arguments, "]")
    lexer.expect(";")
    arguments.pop("name", None)
    return Statement(op.text, op.start, results, arguments)


def _at_type(lexer: Lexer) -> bool:
    text = lexer.token.text
    return lexer.token.kind == "name" and (text in DTYPE_BYTES or text in ("tensor", "state", "string"))


def _arguments(lexer: Lexer, read_blob: BlobReader, into: dict[str, RawArgument], closing: str) -> None:
    first = True
    while not lexer.accept(closing):
        if not first:
            lexer.expect(",")
        first = False
        key = lexer.kind("name", "a parameter")
        lexer.expect("=")
        if key.text in into:
            lexer.refuse(f"needs each parameter once; got {key.text} again", key.start)
        into[key.text] = _argument(lexer, read_blob)


def _argument(lexer: Lexer, read_blob: BlobReader) -> RawArgument:
    if not lexer.accept("("):
        return _item(lexer, read_blob)
    items: list[Reference | Literal] = []
    while not lexer.accept(")"):
        if items:
            lexer.expect(",")
        items.append(_item(lexer, read_blob))
    return tuple(items)


def _item(lexer: Lexer, read_blob: BlobReader) -> Reference | Literal:
    if _at_type(lexer):
        return read_constant(lexer, read_blob)
    token = lexer.kind("name", "a value or a typed constant such as int32(1)")
    return Reference(token.text, token.start)


def read_type(lexer: Lexer) -> TensorType:
    """`fp16`, `tensor<fp16, [1, 4]>` or `state<tensor<fp16, [1, 4]>>`; static extents of at least 0."""
    if lexer.accept("state"):
        lexer.expect("<")
        inner = read_type(lexer) if not lexer.at("state") else lexer.refuse("needs a tensor type in a state")
        lexer.expect(">")
        return TensorType(inner.dtype, inner.shape, state=True)
    if not lexer.accept("tensor"):
        return TensorType(_dtype(lexer))
    lexer.expect("<")
    dtype = _dtype(lexer)
    lexer.expect(",")
    lexer.expect("[")
    shape: list[int] = []
    while not lexer.accept("]"):
        if shape:
            lexer.expect(",")
        if lexer.at("?"):
            lexer.refuse("needs static shapes; got `?`. Export the program with fixed input shapes")
        token = lexer.kind("number", "an extent")
        extent = _integer(token.text)
        if extent is None or not 0 <= extent <= MAX_EXTENT:
            lexer.refuse(f"needs an extent from 0 to {MAX_EXTENT}; got {token.text}", token.start)
        shape.append(extent)
        if len(shape) > MAX_RANK:
            lexer.refuse(f"needs at most {MAX_RANK} axes")
    lexer.expect(">")
    return TensorType(dtype, tuple(shape))


def _dtype(lexer: Lexer) -> str:
    if lexer.token.text not in DTYPE_BYTES and not lexer.at("string"):
        lexer.refuse(f"needs a type; got {lexer.shown()}")
    return lexer.take().text


def read_constant(lexer: Lexer, read_blob: BlobReader) -> Literal:
    """A typed constant: `fp16(0x1p+0)`, `tensor<int32, [2]>([1, 0])`, `tensor<...>(BLOBFILE(...))`."""
    start = lexer.token.start
    type_ = read_type(lexer)
    if type_.state:
        lexer.refuse("needs a constant; got a state", start)
    lexer.expect("(")
    if lexer.at("BLOBFILE"):
        path, offset = _blobfile(lexer)
        if type_.dtype == "string":
            lexer.refuse("needs strings in the text; got BLOBFILE", start)
        result = Literal(type_, read_blob(path, offset, type_))
    else:
        result = _inline(lexer, type_, start)
    lexer.expect(")")
    return result


def _blobfile(lexer: Lexer) -> tuple[str, int]:
    """`BLOBFILE(path = string("..."), offset = uint64(64))`, in either order and spelling of the types."""
    lexer.expect("BLOBFILE")
    lexer.expect("(")
    found: dict[str, str] = {}
    while not lexer.accept(")"):
        if found:
            lexer.expect(",")
        key = lexer.kind("name", "path or offset").text
        lexer.expect("=")
        type_ = read_type(lexer)
        lexer.expect("(")
        token = lexer.kind("string" if type_.dtype == "string" else "number", f"a {type_.dtype}")
        found[key] = token.text
        lexer.expect(")")
    offset = _integer(found.get("offset", ""))
    if set(found) != {"path", "offset"} or offset is None:
        lexer.refuse("needs BLOBFILE(path = string(...), offset = uint64(...))")
    return found["path"], offset


def _inline(lexer: Lexer, type_: TensorType, start: int) -> Literal:
    """Numbers or strings, nested as the shape says (a flat list is read as well)."""
    tokens, counts, depth = [], [0] * (MAX_RANK + 1), 0
    nested = type_.rank > 1
    while not (lexer.at(")") and depth == 0):
        if counts[depth]:
            lexer.expect(",")
            if depth == 0:
                lexer.refuse("needs one value; got more")
        if lexer.accept("["):
            depth += 1
            if depth > type_.rank:
                lexer.refuse(f"needs at most {type_.rank} levels of brackets for {type_}")
            counts[depth] = 0
            if not lexer.at("]"):
                continue
        else:
            counts[depth] += 1
            tokens.append(lexer.take())
            if depth == 1:
                nested = False
        while depth and lexer.accept("]"):
            if counts[depth] != type_.shape[depth - 1] and (nested or depth > 1):
                lexer.refuse(f"needs {type_.shape[depth - 1]} items for {type_}; got {counts[depth]}")
            depth -= 1
            counts[depth] += 1
    if len(tokens) != math.prod(type_.shape):
        lexer.refuse(f"needs {math.prod(type_.shape)} values for {type_}; got {len(tokens)}", start)
    return _literal(lexer, type_, tokens)


def _literal(lexer: Lexer, type_: TensorType, tokens: list[Token]) -> Literal:
    if type_.dtype == "string":
        for token in tokens:
            if token.kind != "string":
                lexer.refuse(f"needs a string; got {token.text}", token.start)
        return Literal(type_, tokens[0].text if type_.rank == 0 else tuple(t.text for t in tokens))
    values = [_number(lexer, type_.dtype, token) for token in tokens]
    return Literal(type_, make_literal(tuple(values), type_.dtype).data)


def _number(lexer: Lexer, dtype: str, token: Token) -> bool | int | float:
    if dtype == "bool":
        if token.text in ("true", "false") and token.kind == "name":
            return token.text == "true"
        lexer.refuse(f"needs true or false; got {token.text}", token.start)
    if token.kind != "number":
        lexer.refuse(f"needs a number; got {token.text}", token.start)
    if dtype.startswith("fp"):
        value = _float(token.text)
        if value is None:
            lexer.refuse(f"needs a number; got {token.text}", token.start)
        return _saturate(value, dtype)
    whole = _integer(token.text)
    low, high = integer_range(dtype)
    if whole is None or not low <= whole <= high:
        lexer.refuse(f"needs an integer from {low} to {high} for {dtype}; got {token.text}", token.start)
    return whole


def _integer(text: str) -> int | None:
    try:
        return int(text, 16 if "x" in text or "X" in text else 10)
    except ValueError:
        return None


def _float(text: str) -> float | None:
    try:
        return float.fromhex(text) if "x" in text or "X" in text else float(text)
    except OverflowError:
        return -math.inf if text[0] == "-" else math.inf
    except ValueError:
        return None


def _saturate(value: float, dtype: str) -> float:
    """Beyond the dtype's largest value is infinity, as rounding to it would give."""
    code = {"fp16": "<e", "fp32": "<f"}.get(dtype, "<d")
    try:
        struct.pack(code, value)
    except OverflowError:
        return math.copysign(math.inf, value)
    return value
