"""Splits MIL text into tokens, one at a time, and names places by line and column.

Text is input from outside: every token is found in time linear in its length, numbers and names have a
largest length, and what is not a token is refused with its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from ane_trainer.ane.errors import ProgramError

#: Longest text, and longest name or number, that is read.
MAX_TEXT_CHARS = 2**28
MAX_WORD_CHARS = 4096
MAX_NUMBER_CHARS = 64

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*(?:[^*]|\*(?!/))*\*/)
    |(?P<string>"(?:[^"\\\n]|\\[^\n])*")
    |(?P<number>[+-]?(?:0[xX](?:[0-9a-fA-F]*\.)?[0-9a-fA-F]*(?:[pP][+-]?[0-9]+)?
        |[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?|(?:infinity|inf|nan)\b))
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<mark>->|[()\[\]{}<>=,;?])""",
    re.VERBOSE,
)

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is name, number, string, mark or end; a string's `text` is its content; `start` its offset."""

    kind: str
    text: str
    start: int


class Lexer:
    """Reads tokens from a text with one token of look-ahead (`token`)."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._end = 0
        if len(text) > MAX_TEXT_CHARS:
            raise ProgramError(
                f"MIL text: needs at most {MAX_TEXT_CHARS} characters; got {len(text)}.", code="MIL110"
            )
        self.token = self._scan()

    def take(self) -> Token:
        """The look-ahead token; the one after it becomes the look-ahead."""
        token = self.token
        if token.kind != "end":
            self.token = self._scan()
        return token

    def at(self, mark: str) -> bool:
        """Whether the look-ahead is this mark or word."""
        return self.token.text == mark and self.token.kind in ("mark", "name")

    def accept(self, mark: str) -> bool:
        """Take the look-ahead if it is this mark or word."""
        found = self.at(mark)
        if found:
            self.take()
        return found

    def expect(self, mark: str) -> Token:
        """Take this mark or word; anything else is refused."""
        if not self.at(mark):
            self.refuse(f"needs `{mark}`; got {self.shown()}")
        return self.take()

    def kind(self, kind: str, what: str) -> Token:
        """Take a token of this kind; anything else is refused, naming `what` was needed."""
        if self.token.kind != kind:
            self.refuse(f"needs {what}; got {self.shown()}")
        return self.take()

    def shown(self) -> str:
        """The look-ahead as a message shows it."""
        if self.token.kind == "end":
            return "the end of the text"
        text = self.token.text
        return f"`{text[:40]}...`" if len(text) > 40 else f"`{text}`"

    def refuse(self, reason: str, start: int | None = None, code: str = "MIL110") -> NoReturn:
        """Raise the `ProgramError` for the place `start` (the look-ahead by default)."""
        place = position(self._text, self.token.start if start is None else start)
        raise ProgramError(f"{place}: {reason}.", code=code)

    def _scan(self) -> Token:
        text, start = self._text, self._end
        while True:
            found = _TOKEN.match(text, start)
            if found is None or found.end() == start:
                break
            if found.lastgroup != "space":
                return self._token(found.lastgroup or "", found.group(), start, found.end())
            start = found.end()
        if start < len(text):
            kind = "an unfinished string" if text[start] == '"' else repr(text[start])
            raise ProgramError(f"{position(text, start)}: needs MIL text; got {kind}.", code="MIL110")
        self._end = start
        return Token("end", "", start)

    def _token(self, kind: str, text: str, start: int, end: int) -> Token:
        limit = {"number": MAX_NUMBER_CHARS, "name": MAX_WORD_CHARS}.get(kind)
        if limit is not None and len(text) > limit:
            place = position(self._text, start)
            raise ProgramError(f"{place}: needs a {kind} of at most {limit} characters.", code="MIL110")
        self._end = end
        return Token(kind, unquote(text) if kind == "string" else text, start)


def unquote(text: str) -> str:
    """The content of a string in quotes; the inverse of `text.quote`."""
    if "\\" not in text:
        return text[1:-1]
    return _ESCAPE.sub(
        lambda m: chr(int(m.group(1), 16)) if m.group(1) else _ESCAPED.get(m.group(2), m.group(2)), text[1:-1]
    )


def position(text: str, start: int) -> str:
    """`line 3, column 17` (both from 1)."""
    return f"line {text.count(chr(10), 0, start) + 1}, column {start - text.rfind(chr(10), 0, start)}"
