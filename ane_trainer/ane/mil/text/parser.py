"""Reads MIL text back into a `Program`: folds constants, fetches weights, applies the type rules.

Reads what ANEForge, maderix/ANE, Orion, coremlc and `text.print_program` write. Text comes from
outside: whatever it holds, reading takes time linear in its length, and every failure is a
`ProgramError` with line and column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.opset import OpDef, infer, op_def
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Program, TensorType, Value
from ane_trainer.ane.mil.text.lexer import Lexer
from ane_trainer.ane.mil.text.syntax import RawArgument, RawFunction, Reference, Statement, read_program
from ane_trainer.ane.mil.weights import read_weight


class Refuse(Protocol):
    """Raises the `ProgramError` that names the place `start` of the source."""

    def __call__(self, reason: str, start: int | None = None, code: str = "MIL110") -> NoReturn: ...


def resolve(functions: Sequence[RawFunction], refuse: Refuse) -> tuple[Function, ...]:
    """The functions with constants folded into their users and every operation checked by its type rule."""
    if not functions:
        refuse("needs at least one function; got none")
    seen: set[str] = set()
    for function in functions:
        if function.name in seen:
            refuse(f"needs function names that differ; got {function.name} again", function.start)
        seen.add(function.name)
    return tuple(_Resolver(refuse, function).function() for function in functions)


class _Resolver:
    """Turns the statements of one function into operations; holds what each name stands for."""

    def __init__(self, refuse: Refuse, raw: RawFunction) -> None:
        self._refuse, self._raw = refuse, raw
        self._known: dict[str, Value | Literal] = {}
        self._returned = {reference.name for reference in raw.outputs}

    def function(self) -> Function:
        raw = self._raw
        inputs = tuple(self._define(*port) for port in raw.inputs)
        ops = tuple(op for statement in raw.statements if (op := self._statement(statement)) is not None)
        outputs = tuple(self._find(reference) for reference in raw.outputs)
        values = tuple(value for value in outputs if isinstance(value, Value))
        return Function(raw.name, inputs, ops, values, raw.opset)

    def _define(self, name: str, type_: TensorType, start: int) -> Value:
        if any(extent < 1 for extent in type_.shape) or type_.dtype == "string":
            self._refuse(f"{name} needs a numeric type without empty axes; got {type_}", start, "MIL101")
        return self._bind(name, Value(name, type_), start)

    def _bind(self, name: str, item: Value, start: int) -> Value:
        if name in self._known:
            self._refuse(f"needs each name once; got {name} again", start, "MIL104")
        self._known[name] = item
        return item

    def _find(self, reference: Reference) -> Value | Literal:
        found = self._known.get(reference.name)
        if found is None:
            self._refuse(
                f"needs a value that is defined above; got {reference.name}", reference.start, "MIL104"
            )
        return found

    def _statement(self, statement: Statement) -> Op | None:
        if statement.kind == "const":
            return self._constant(statement)
        try:
            definition = op_def(statement.kind)
        except ProgramError as fault:
            self._refuse(str(fault.args[0]).rstrip("."), statement.start, fault.code)
        arguments = self._arguments(statement, definition)
        try:
            types = infer(statement.kind, dict(arguments))
        except ProgramError as fault:
            self._refuse(str(fault.args[0]).rstrip("."), statement.start, fault.code)
        declared = tuple(type_ for _, type_, _ in statement.results)
        if declared != types:
            wanted, got = (", ".join(map(str, group)) or "no result" for group in (types, declared))
            self._refuse(
                f"{statement.kind}: needs the result type {wanted}; got {got}", statement.start, "MIL101"
            )
        return Op(statement.kind, arguments, tuple(self._define(*result) for result in statement.results))

    def _constant(self, statement: Statement) -> Op | None:
        value = statement.arguments.get("val")
        if len(statement.results) != 1 or not isinstance(value, Literal) or len(statement.arguments) != 1:
            self._refuse("const: needs one result and one typed val", statement.start, "MIL101")
        ((name, type_, start),) = statement.results
        if type_ != value.type:
            self._refuse(f"const: needs a value of type {type_}; got {value.type}", start, "MIL101")
        if name in self._returned:
            return Op("const", (("val", value),), (self._define(name, type_, start),))
        if name in self._known:
            self._refuse(f"needs each name once; got {name} again", start, "MIL104")
        self._known[name] = Literal(value.type, value.data, name)
        return None

    def _arguments(self, statement: Statement, definition: OpDef) -> tuple[tuple[str, Arg], ...]:
        """Arguments in the op's own order, references replaced by what they stand for."""
        order = {param.name: index for index, param in enumerate(definition.params)}
        variadic = {param.name for param in definition.params if param.role == "tensors"}
        found: list[tuple[str, Arg]] = []
        for name in sorted(statement.arguments, key=lambda key: order.get(key, len(order))):
            argument = self._argument(statement.arguments[name])
            if name in variadic and not isinstance(argument, tuple):
                argument = (argument,)
            elif name not in variadic and isinstance(argument, tuple) and len(argument) == 1:
                argument = argument[0]
            found.append((name, argument))
        return tuple(found)

    def _argument(self, raw: RawArgument) -> Arg:
        if isinstance(raw, tuple):
            return tuple(self._item(item) for item in raw)
        return self._item(raw)

    def _item(self, raw: Reference | Literal) -> Value | Literal:
        return self._find(raw) if isinstance(raw, Reference) else raw


Blob = Mapping[str, bytes] | bytes | None


def parse_program(text: str, blob: Blob = None) -> Program:
    """The program that `text` holds.

    `blob` is the weight file's content, or a mapping from the paths that the text names (whole, without
    `@model_path/`, or the last part) to contents. A `const` becomes a `Literal` of the operations that use
    it, unless the function returns it. Refused with `ProgramError`, naming line and column: text that does
    not follow the grammar, an unknown op or parameter, an undefined or repeated name, a weight that the
    blob does not hold, a result type that is not what the type rule gives.
    """
    weights = _Weights(blob)
    lexer = Lexer(text)
    weights.lexer = lexer
    version, attributes, raw = read_program(lexer, weights.read)
    return Program(resolve(raw, lexer.refuse), version, attributes)


class _Weights:
    """Finds the payload of a BLOBFILE constant; each place of a blob is read once per type."""

    lexer: Lexer

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._read: dict[tuple[str, int, TensorType], bytes] = {}

    def read(self, path: str, offset: int, type_: TensorType) -> bytes:
        key = (path, offset, type_)
        if key not in self._read:
            try:
                self._read[key] = read_weight(self._content(path), offset, type_)
            except ProgramError as fault:
                self.lexer.refuse(str(fault.args[0]).rstrip("."), code=fault.code)
        return self._read[key]

    def _content(self, path: str) -> bytes:
        if isinstance(self._blob, Mapping):
            for name in (path, path.removeprefix("@model_path/"), path.rsplit("/", 1)[-1]):
                if name in self._blob:
                    return self._blob[name]
        elif self._blob is not None:
            return self._blob
        raise ProgramError(f"weights: needs the content of {path}; it was not given.", code="MIL105")
