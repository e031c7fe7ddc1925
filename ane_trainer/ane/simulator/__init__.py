"""The simulator: runs any MIL program and computes what the engine computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.chips import get_chip
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil import Program
from ane_trainer.ane.simulator import contraction, convolution, movement, pointwise, pooling, reduction
from ane_trainer.ane.simulator.plan import Plan, prepare
from ane_trainer.ane.simulator.registry import KERNELS, Context, Kernel

__all__ = ["KERNELS", "Context", "Kernel", "Plan", "make_context", "prepare", "simulate"]

#: Importing a family registers its kernels.
_FAMILIES = (contraction, convolution, movement, pointwise, pooling, reduction)


def make_context(chip: str, fidelity: str = "exact", threads: int | None = None) -> Context:
    """A simulation context; `UsageError` for an unknown chip or fidelity. `threads` defaults to the machine's cores."""
    if fidelity not in ("exact", "fast"):
        raise UsageError(f"fidelity: needs exact or fast; got {fidelity!r}.", code="ANE104")
    return Context(get_chip(chip), fidelity, threads or _cores())


def simulate(
    program: Program,
    feeds: Mapping[str, NDArray[Any]],
    *,
    chip: str,
    fidelity: str = "exact",
    threads: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Run `program` once on the simulated engine of `chip`.

    `feeds` maps every input to an array of its shape (fp16 inputs: float16, bit patterns count; wider floats
    are rounded to float16 first). Returns float16 arrays (or the output's own dtype) by output name, with the
    engine's inf as inf. Raises `SimulationError` for a missing or misshapen input or an op without a kernel.
    """
    return prepare(program.main, make_context(chip, fidelity, threads)).run({k: np.asarray(v) for k, v in feeds.items()})


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
