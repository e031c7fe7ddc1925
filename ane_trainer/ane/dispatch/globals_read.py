"""The globals that a function's code reads: its attributes may have the names of others (`self.q`, a global `q`)."""

from __future__ import annotations

import dis
import functools
import types


@functools.cache
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals and builtins, each once."""
    found = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return tuple(dict.fromkeys(found))
