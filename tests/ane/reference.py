"""The package's double-precision meaning of MIL, held to the narrower form that lowered programs keep.

Lowering writes one form where MIL allows several (explicit padding, no ceil mode, masks of full shape, no
arithmetic on bool), because the engine takes no other; `evaluate` refuses the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ane_trainer.ane.mil import semantics
from ane_trainer.ane.mil.program import Function, Literal, Op

_NUMERIC = frozenset(
    "add sub mul real_div maximum minimum pow equal not_equal greater greater_equal less less_equal tile".split()
)


def evaluate(function: Function, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name, float64 (bool stays bool); asserts the form of every op."""
    for op in function.ops:
        _check(op)
    outputs = semantics.evaluate(function, feeds)
    return {name: y if y.dtype == np.bool_ else y.astype(np.float64) for name, y in outputs.items()}


def _check(op: Op) -> None:
    dtypes = {v.type.dtype for v in op.operands()}
    if op.kind in _NUMERIC:
        assert "bool" not in dtypes, f"{op.kind} on bool"
    if op.kind in ("conv", "max_pool", "avg_pool"):
        assert _constant(op, "pad_type") == "custom"
        assert not _constant(op, "ceil_mode")
    if op.kind == "pad":
        assert _constant(op, "mode") == "constant"
    if op.kind == "select":
        cond, a, b = (op.arg(name).type.shape for name in ("cond", "a", "b"))
        assert cond in (a, b)
        assert {a, b} <= {cond, ()}


def _constant(op: Op, name: str) -> object:
    argument = op.arg(name)
    return argument.to_python() if isinstance(argument, Literal) else None
