"""Reads MIL text back into a `Program`: folds constants, fetches weights, applies the type rules.

Reads what ANEForge, maderix/ANE, Orion, coremlc and `text.print_program` write. Text comes from
outside: whatever it holds, reading takes time linear in its length, and every failure is a
`ProgramError` with line and column.
"""

from __future__ import annotations

from collections.abc import Mapping

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.mil.text.lexer import Lexer
from ane_trainer.ane.mil.text.resolve import resolve
from ane_trainer.ane.mil.text.syntax import read_program
from ane_trainer.ane.mil.weights import read_weight

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
