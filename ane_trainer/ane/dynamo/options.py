"""The options of `torch.compile(model, backend="ane", options={...})`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

from ane_trainer.ane.dispatch import Target, resolve_target
from ane_trainer.ane.dispatch.options import FALLBACKS
from ane_trainer.ane.errors import UsageError
from ane_trainer.utils import did_you_mean


@dataclass(frozen=True)
class Options:
    """Where the programs run (`target`), and how many there may be; see `ane`."""

    target: Target
    recompile_limit: int = 8
    fallback: str = "none"

    def __post_init__(self) -> None:
        if self.fallback not in FALLBACKS:
            raise UsageError(
                f"options: needs fallback none or cpu; got {self.fallback!r}. Choose one of them."
            )
        if not isinstance(self.recompile_limit, int) or self.recompile_limit < 1:
            raise UsageError(
                f"options: needs a recompile_limit of at least 1; got {self.recompile_limit!r}. Choose one."
            )


def read_options(given: Any) -> Options:
    """The options as a value, the device resolved.

    Raises: UsageError for unknown names, a limit below 1, or an unknown fallback; EnvironmentFault for a device
    that is not here.
    """
    places = inspect.signature(resolve_target).parameters
    own = [field.name for field in fields(Options) if field.name != "target"]
    known = [*places, *own]
    for name in given or {}:
        if name not in known:
            raise UsageError(f"options: needs a known one; got {name!r}. {did_you_mean(str(name), known)}")
    chosen = {"device": "sim", **(given or {})}
    target = resolve_target(**{name: value for name, value in chosen.items() if name in places})
    return Options(target, **{name: value for name, value in chosen.items() if name in own})
