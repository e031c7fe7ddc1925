"""Splits MIL text into tokens, one at a time, and names places by line and column.

Text is input from outside: every token is found in time linear in its length, numbers and names have a
largest length, and what is not a token is refused with its place.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from ane_trainer.ane.errors import ProgramError

#: Longest text, and longest name or number, that is read.
MAX_TEXT_CHARS = 2**28
MAX_WORD_CHARS = 4096
MAX_NUMBER_CHARS = 64

_GAP = r"(?:\s++|//[^\n]*+|/\*(?:[^*]++|\*(?!/))*+\*/)*+"
_TOKEN = re.compile(
    _GAP
    + r"""(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*+(?<!\binf)(?<!\bnan)(?<!\binfinity))
    |(?P<mark>->|[()\[\]{}<>=,;?])
    |(?P<number>[+-]?(?:0[xX](?:[0-9a-fA-F]*\.)?[0-9a-fA-F]*(?:[pP][+-]?[0-9]+)?
        |[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?|(?:infinity|inf|nan)\b))
    |(?P<string>"(?:[^"\\\n]|\\[^\n])*+"))""",
    re.VERBOSE,
)
_SPACE = re.compile(_GAP)

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class Token(NamedTuple):
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
        found = _TOKEN.match(self._text, self._end)
        if found is None:
            return self._no_token()
        kind = found.lastgroup or ""
        text, start = found.group(kind), found.start(kind)
        self._end = found.end()
        if kind == "string":
            text = unquote(text)
        elif len(text) > MAX_NUMBER_CHARS and (kind == "number" or len(text) > MAX_WORD_CHARS):
            limit = MAX_NUMBER_CHARS if kind == "number" else MAX_WORD_CHARS
            place = position(self._text, start)
            raise ProgramError(f"{place}: needs a {kind} of at most {limit} characters.", code="MIL110")
        return Token(kind, text, start)

    def _no_token(self) -> Token:
        """The end of the text; anything else that is no token is refused."""
        gap = _SPACE.match(self._text, self._end)
        start = gap.end() if gap else self._end
        if start < len(self._text):
            char = self._text[start]
            shown = {'"': "an unfinished string", "/": "an unfinished comment"}.get(char, repr(char))
            raise ProgramError(f"{position(self._text, start)}: needs MIL text; got {shown}.", code="MIL110")
        return Token("end", "", start)


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
