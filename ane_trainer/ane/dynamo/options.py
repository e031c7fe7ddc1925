"""The options of `torch.compile(model, backend="ane", options={...})`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from ane_trainer.ane.errors import UsageError

FALLBACKS = ("none", "cpu")


@dataclass(frozen=True)
class Options:
    """Where and how the programs run; see `ane`."""

    chip: str = "m4"
    device: str = "sim"
    fidelity: str = "exact"
    precision: str = "auto"
    threads: int | None = None
    path: str = "e5rt"
    recompile_limit: int = 8
    fallback: str = "none"


def read_options(given: Any) -> Options:
    """The options as a value.

    Raises: UsageError for unknown names, a limit below 1, or an unknown fallback.
    """
    known = [field.name for field in fields(Options)]
    for name in given or {}:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UsageError(
                f"options: needs one of {', '.join(known)}; got {name!r}. {hint}Choose a known one."
            )
    options = Options(**(given or {}))
    if options.fallback not in FALLBACKS:
        raise UsageError(
            f"options: needs fallback none or cpu; got {options.fallback!r}. Choose one of them."
        )
    if not isinstance(options.recompile_limit, int) or options.recompile_limit < 1:
        raise UsageError(
            f"options: needs a recompile_limit of at least 1; got {options.recompile_limit!r}. Choose one."
        )
    return options
