"""Docstrings of this project as Markdown: paragraphs, and lists of names with their meaning as tables."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence

#: A name, or several, two spaces or more, and what it means.
_ITEM = re.compile(r"^(\S.*?) {2,}(\S.*)$")
_WIDTH = 88


def as_markdown(docstring: str) -> str:
    """The docstring with lines that a page breaks as it likes."""
    paragraphs = re.split(r"\n{2,}", inspect.cleandoc(docstring).strip("\n"))
    return "\n\n".join(_paragraph(paragraph.splitlines()) for paragraph in paragraphs if paragraph.strip())


def _paragraph(lines: Sequence[str]) -> str:
    if all(line.startswith("    ") for line in lines):
        return "\n".join(("```text", *textwrap.dedent("\n".join(lines)).splitlines(), "```"))
    if lines[0].startswith("- "):
        return "\n".join(_escaped(line) for line in lines)
    if (rows := _rows(lines)) is not None:
        table = [f"| {_escaped(name)} | {_escaped(text)} |" for name, text in rows]
        return "\n".join(("| | |", "|---|---|", *table))
    return _escaped(" ".join(line.strip() for line in lines))


def _rows(lines: Sequence[str]) -> list[tuple[str, str]] | None:
    """(names, meaning) of each item; None if it is no list of them."""
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(lines):
        follows = number + 1 < len(lines) and lines[number + 1].startswith(" ")
        if line.startswith(" "):
            if not rows:
                return None
            name, text = rows.pop()
            rows.append((name, f"{text} {line.strip()}".strip()))
        elif (found := _ITEM.match(line)) is not None:
            rows.append((found[1], found[2]))
        elif follows:
            rows.append((line.rstrip(), ""))
        else:
            return None
    return rows


def _escaped(text: str) -> str:
    """What Markdown would take for marks, outside of code, and what ends a cell."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")


def signature_lines(name: str, parameters: Sequence[str]) -> str:
    """`name(a, b=1)`, an argument a line where it is long."""
    whole = f"{name}({', '.join(parameters)})"
    if len(whole) <= _WIDTH:
        return whole
    whole_ones = ", ".join(parameter.replace(" ", "\0") for parameter in parameters)  # none is broken
    filled = textwrap.fill(whole_ones, _WIDTH - 4, break_long_words=False, break_on_hyphens=False).replace(
        "\0", " "
    )
    return f"{name}(\n{textwrap.indent(filled, '    ')},\n)"
