"""The kernel registry: what each MIL op computes on the engine, and how sure we are of it.

A kernel is `(EngineContext, Call, *arrays) -> array | tuple of arrays` over decoded fp16 (float32 arrays whose
values are what the engine sees, see `fp16.py`; bool arrays for bool tensors). `Call` is the opset's typed
view of the op's parameters; arrays arrive in the order of the op's tensor parameters (None for an absent
optional one, a tuple for a variadic one). Literals that are tensors arrive as arrays too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ane_trainer.ane.chips.lookup import Chip

EVIDENCE_LEVELS = ("exact", "bounded", "assumed")


@dataclass(frozen=True)
class EngineContext:
    """What a kernel may depend on besides its operands: chip, fidelity mode, number of threads, dispatch path.

    `path` is one of `chips.PATHS`, or None where no path's peculiarities should show.
    """

    chip: Chip
    fidelity: str = "exact"
    threads: int = 1
    path: str | None = None

    @property
    def fast(self) -> bool:
        """True when accumulation may be the machine's fp32 instead of Q15.16."""
        return self.fidelity == "fast"


@dataclass(frozen=True)
class Kernel:
    """One op's meaning. `level`, the evidence level, is "exact" (published hardware vectors reproduce), "bounded"
    (`bound` says by how much it may differ from the engine) or "assumed"; `evidence` names the source.
    """

    kind: str
    run: Callable[..., Any]
    level: str
    evidence: str
    bound: str = ""


KERNELS: dict[str, Kernel] = {}


def kernel(
    kinds: str, level: str, evidence: str, bound: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the meaning of the space-separated op `kinds`."""
    if level not in EVIDENCE_LEVELS:
        raise ValueError(f"evidence level: needs one of {EVIDENCE_LEVELS}; got {level!r}")

    def register(function: Callable[..., object]) -> Callable[..., Any]:
        for kind in kinds.split():
            if kind in KERNELS:
                raise ValueError(f"kernel for {kind} is registered twice")
            KERNELS[kind] = Kernel(kind, function, level, evidence, bound)
        return function

    return register


#: Ops that write their results in place: kind -> `(EngineContext, Call, outputs, *arrays) -> step`.
#: The meaning is that of the kernel of the same op; this form only saves a copy.
WRITES: dict[str, Callable[..., Callable[[], None]]] = {}


def writes(kinds: str) -> Callable[[Callable[..., Callable[[], None]]], Callable[..., Callable[[], None]]]:
    """Register an in-place form of the space-separated op `kinds`."""

    def register(function: Callable[..., Callable[[], None]]) -> Callable[..., Callable[[], None]]:
        for kind in kinds.split():
            WRITES[kind] = function
        return function

    return register
