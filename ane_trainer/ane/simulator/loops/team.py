"""Runs compiled loops on the threads of PyTorch's OpenMP: handing work over takes microseconds, and both share cores.

A loop is a compiled function `void (ptr arguments, i64 first, i64 last)`. A `Team` calls one loop, or a chain of
loops, on ranges of one outermost axis; a chain takes a range block by block, so that what one loop leaves is still
in the cache when the next one reads it. Without OpenMP (and in a forked child, whose copy of it has lost its
threads) Python threads do the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.ir import I32, I64, PTR, Definition, Function, module

#: Elements below which one thread is as fast as two (hand-over costs a few us).
PARALLEL_ELEMENTS = 1 << 16

_FIELDS = 3  # of a job before its stages: number of ranges, items per block, number of stages


@dataclass(frozen=True)
class Stage:
    """One loop of a chain: addresses of its function and arguments, and its steps per item of the chain's axis."""

    function: int
    arguments: int
    scale: int = 1


class Team:
    """Stages to be called on each of `ranges`, at most `threads` at a time."""

    def __init__(
        self, stages: Sequence[Stage], ranges: Sequence[tuple[int, int]], threads: int, block: int = 1 << 62
    ) -> None:
        numbers = [len(ranges), block, len(stages)]
        numbers += [n for stage in stages for n in (stage.function, stage.arguments, stage.scale)]
        numbers += [n for bounds in ranges for n in bounds]
        self._job = (ctypes.c_int64 * len(numbers))(*numbers)
        self._address = ctypes.addressof(self._job)
        self._threads = min(threads, len(ranges))

    def run(self) -> None:
        """Call every stage on every range; return when all ended."""
        entry = _entry()
        if self._threads <= 1:
            entry.some(self._address, 0, 1)
        elif entry.parallel is not None and not _forked:
            entry.parallel(entry.share, self._address, self._threads, 0)
        else:
            pieces = [(self._address, i, self._threads) for i in range(self._threads)]
            jit.run_parallel(entry.some, pieces, self._threads)


def divided(outer: int, elements: int, threads: int, unit: int = 1) -> list[tuple[int, int]]:
    """About equal parts of the outermost axis, each but the last a multiple of `unit`."""
    parts = threads if elements >= PARALLEL_ELEMENTS else 1
    bounds = [min(outer, -(-outer * i // (parts * unit)) * unit) for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(bounds) if a < b]


def addresses(*values: int) -> Any:
    """The arguments of a loop: keep the result alive, and hand its address over."""
    return (ctypes.c_int64 * len(values))(*values)


@dataclass(frozen=True)
class _Entry:
    """`some(job, first, step)` takes each `step`-th range; `parallel(share, job, threads, 0)` all of them at once."""

    some: Any
    parallel: Any = None
    share: int = 0


@cache
def _entry() -> _Entry:
    openmp = _openmp()
    if openmp is None:
        return _Entry(jit.compile_ir(module([_some()]), ["some"])["some"])
    functions = jit.compile_ir(module([_some(), _share(openmp)]), ["some", "share"])
    openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    openmp.GOMP_parallel.restype = None
    return _Entry(functions["some"], openmp.GOMP_parallel, jit.address(functions["share"]))


def _openmp() -> Any:
    """The OpenMP library that PyTorch has loaded, where it is one with GNU's entry points."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "GOMP_parallel") else None


def _some() -> Definition:
    """Ranges `first`, `first + step`, ...: block by block, and for each block stage by stage."""
    f = Function("some", job=PTR, first=I64, step=I64)
    job, first, step = f.parameters
    count, block, stages = (job.at(i, I64).load(I64) for i in range(_FIELDS))
    ranges = job.at(stages * 3 + _FIELDS, I64)
    with f.loop(first, count, step) as i:
        begin, end = (ranges.at(i * 2 + side, I64).load(I64) for side in range(2))
        with f.loop(begin, end, block) as low, f.loop(0, stages) as number:
            high = (low + block).call("smin", end)
            stage = job.at(number * 3 + _FIELDS, I64)
            function, arguments = (stage.at(n, I64).load(PTR) for n in range(2))
            scale = stage.at(2, I64).load(I64)
            f.invoke(function, arguments, low * scale, high * scale)
    return f.definition()


def _share(openmp: Any) -> Definition:
    """What each thread of a parallel region does: its ranges."""
    f = Function("share", job=PTR)
    numbers = []
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        function = f.emit(PTR, f"inttoptr i64 {jit.address(getattr(openmp, name))} to ptr")
        numbers.append(f.emit(I32, f"call i32 {function.name}()").to(I64))
    f.invoke("some", f.parameters[0], *numbers)
    return f.definition()


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
