"""Functions the engine lacks: acos, asin, atanh, cosh, sinh, tan, mod. Core ML runs them on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.simulator.memory.fp16 import F32, round_half_away
from ane_trainer.ane.simulator.registry import Context, kernel

F64 = NDArray[np.float64]

_HOST = (
    "refused on the e5rt path (ANEForge sweep, M5), on the host in Core ML: exact function, one rounding,"
    " NaN as 0"
)

_FUNCTIONS: dict[str, Callable[[F64], F64]] = {
    "acos": np.arccos,
    "asin": np.arcsin,
    "atanh": np.arctanh,
    "cosh": np.cosh,
    "sinh": np.sinh,
    "tan": np.tan,
}


def _rounded(values: NDArray[Any]) -> F32:
    return round_half_away(np.nan_to_num(values, nan=0.0, posinf=65536.0, neginf=-65536.0))


def _register(kind: str, function: Callable[[F64], F64]) -> None:
    def run(ctx: Context, call: Call, x: F32) -> F32:
        with np.errstate(all="ignore"):
            return _rounded(function(x.astype(np.float64)))

    kernel(kind, "assumed", _HOST)(run)


for _kind, _function in _FUNCTIONS.items():
    _register(_kind, _function)


@kernel("mod", "assumed", _HOST)
def mod(ctx: Context, call: Call, x: F32, y: F32) -> F32:
    """The remainder with the sign of the divisor."""
    with np.errstate(all="ignore"):
        return _rounded(np.mod(x.astype(np.float64), y.astype(np.float64)))
