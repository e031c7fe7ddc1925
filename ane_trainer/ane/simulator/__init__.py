"""The simulator: runs any MIL program and computes what the engine computes.

Rooms, each importing only from those above it:

    numbers/    decoded fp16: encode, decode, round half away; the 33-knot tables
    loops/      LLVM IR built, compiled and run on threads; pointwise groups, folds, conversions (numbers)
    mac/        the Q15.16 multiply-accumulate unit (loops)
    registry, arrays    what a kernel is and depends on; literals, parameters, values at the border (loops)
    kernels/    what each op computes, with its evidence; how pointwise ops fuse (all above)
    schedule, states, refusal, lifetimes, plan    the order of work, states as inputs, what a chip refuses; memory
                laid out and handed on, steps bound and run

It imports nothing of capture, compiler or `mil.semantics`: it must not share their mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Program
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import refusal
from ane_trainer.ane.simulator.kernels import (
    contraction,
    convolution,
    creation,
    host,
    movement,
    normalization,
    pointwise,
    pooling,
    quantized,
    rearrange,
    reduction,
    resize,
    selection,
    transposed,
)
from ane_trainer.ane.simulator.plan import Plan, prepare
from ane_trainer.ane.simulator.registry import KERNELS, EngineContext, Kernel

__all__ = ["KERNELS", "EngineContext", "Kernel", "Plan", "make_context", "prepare", "simulate"]

#: Importing a family registers its kernels.
_FAMILIES = (
    contraction, convolution, creation, host, movement, normalization, pointwise, pooling,
    quantized, rearrange, reduction, resize, selection, transposed,
)  # fmt: skip

#: Ops with a type rule and no kernel: kind -> why.
WITHOUT_KERNEL = {
    "read_state": "states become resident inputs before a plan is made (states.py)",
    "write_state": "states become resident inputs before a plan is made (states.py)",
    "coreml_update_state": "states become resident inputs before a plan is made (states.py)",
    **dict.fromkeys(
        sorted(refusal.RANDOM), "refused: the engine's generator of random numbers is not published"
    ),
}


def make_context(
    chip: str, fidelity: str = "exact", threads: int | None = None, path: str | None = None
) -> EngineContext:
    """A simulation context; `UsageError` for an unknown chip or fidelity. `threads` defaults to the
    machine's cores.
    """
    if fidelity not in ("exact", "fast"):
        raise UsageError(f"fidelity: needs exact or fast; got {fidelity!r}.", code="ANE104")
    return EngineContext(get_chip(chip), fidelity, threads or _cores(), path)


def simulate(
    program: Program,
    feeds: Mapping[str, Array],
    *,
    chip: str,
    fidelity: str = "exact",
    threads: int | None = None,
    path: str | None = "e5rt",
) -> dict[str, Array]:
    """Run `program` once on the simulated engine of `chip`.

    `feeds` maps every input to an array of its shape (fp16 inputs: float16, bit patterns count; wider floats
    are rounded to float16 first). Returns float16 arrays (or the output's own dtype) by output name, with the
    engine's inf as inf; Core ML states start at zero unless fed. Raises `SimulationError` for a missing or
    misshapen input, `UnsupportedModel` with every op that the chip refuses on `path` ("e5rt", "direct",
    "coreml", "netplist"; None: whatever the simulator can run).
    """
    context = make_context(chip, fidelity, threads, path)
    refusal.check(program.main, context.chip, path)
    return prepare(program.main, context).run({k: np.asarray(v) for k, v in feeds.items()})


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
