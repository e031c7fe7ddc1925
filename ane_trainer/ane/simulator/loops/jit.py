"""Compile LLVM IR text for this machine's CPU and call it from several threads.

The simulator's kernels are generated as LLVM IR text and compiled on first use by `llvmlite`; no C
compiler and no numba. IR in the generic vector types (`<16 x float>`) runs everywhere: LLVM splits
what the CPU has not. Compiled code lives as long as the process, and is kept on disk for the next one (`objects`).

Loops run on the threads of PyTorch's OpenMP: handing work over takes microseconds, and both share cores. A loop is
a compiled function `void (ptr arguments, i64 first, i64 last)`. A `Team` calls one loop, or a chain of loops, on
ranges of one outermost axis; a chain takes a range block by block, so that what one loop leaves is still in the
cache when the next one reads it. Without OpenMP (and in a forked child, whose copy of it has lost its threads)
Python threads do the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import llvmlite.binding as llvm

from ane_trainer.ane.simulator.loops import jit, objects
from ane_trainer.ane.simulator.loops.ir import I32, I64, PTR, Definition, Function, module

_CTYPES: dict[str, Any] = {
    "ptr": ctypes.c_void_p,
    "i64": ctypes.c_int64,
    "i32": ctypes.c_int32,
    "i16": ctypes.c_int16,
    "i8": ctypes.c_int8,
    "i1": ctypes.c_bool,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}

_lock = threading.Lock()
_engines: list[object] = []  # one per compiled module; kept so that the code stays mapped
_pool: ThreadPoolExecutor | None = None


@cache
def host_features() -> frozenset[str]:
    """Names of the CPU features LLVM detects on this machine, such as `"avx512f"`, `"fma"`, `"neon"`."""
    return frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)


@cache
def host_vector_width() -> int:
    """Float32 lanes in one vector register of this machine: 16 (AVX-512), 8 (AVX2 with FMA) or 4."""
    features = host_features()
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= features:
        return 16
    return 8 if {"avx2", "fma"} <= features else 4


def compile_ir(
    ir_text: str, names: Sequence[str], *, vectorize: bool = True
) -> dict[str, Callable[..., Any]]:
    """Compile one LLVM module (O3, vectorizers on, host CPU); return its functions by name, callable.

    `vectorize=False` is for IR that is vectorized by hand: O2 without LLVM's vectorizers and unroller,
    half the time to compile.

    `ir_text` is a module without triple or data layout. Parameter and result types are read from the
    IR: `ptr` takes an address as int (for instance `array.ctypes.data`), `i64`/`i32`/`i16`/`i8`/`i1`
    ints, `float`/`double` floats; results may be these or `void`. Calls release the interpreter lock.
    Malformed IR raises RuntimeError with LLVM's message; a name that is missing raises NameError; any
    other parameter type raises KeyError. Floating point is strict: nothing is contracted or reordered
    unless the IR asks for it (`llvm.fma`, fast-math flags).
    """
    with _lock:
        machine = _target_machine()
        key = objects.key_of(ir_text, names, f"vectorize {vectorize}")
        code = objects.load(key)
        if code is None:
            code = _machine_code(ir_text, names, machine, vectorize)
            objects.store(key, code)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code.data))
        engine.finalize_object()
        _engines.append(engine)
        kinds = {name: _prototype(*signature) for name, signature in code.signatures.items()}
        return {name: kind(engine.get_function_address(name)) for name, kind in kinds.items()}


def _machine_code(
    ir_text: str, names: Sequence[str], machine: llvm.TargetMachine, vectorize: bool
) -> objects.MachineCode:
    module = llvm.parse_assembly(ir_text)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    signatures = {name: _signature(module.get_function(name)) for name in names}
    _optimize(module, machine, vectorize)
    return objects.MachineCode(machine.emit_object(module), signatures)


def address(function: Any) -> int:
    """Where the code of a compiled (or a library's) function lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def assembly(ir_text: str, *, vectorize: bool = True) -> str:
    """The machine code that `compile_ir` would make of a module, as assembly text (to look at kernels)."""
    with _lock:
        module = llvm.parse_assembly(ir_text)
        machine = _target_machine()
        module.triple = machine.triple
        module.data_layout = str(machine.target_data)
        _optimize(module, machine, vectorize)
        return str(machine.emit_assembly(module))


def run_parallel(func: Callable[..., object], argslists: Sequence[Sequence[object]], threads: int) -> None:
    """Call `func(*args)` for each entry of `argslists`, at most `threads` at a time; return when all ended.

    The calling thread works too, so one thread or one entry costs no hand-over and nested calls cannot
    dead-lock. Entries are taken in order by whoever is free: they must not depend on each other. The
    first exception is raised after the running entries ended.
    """
    helpers = min(threads, len(argslists)) - 1
    queue = iter(argslists)
    futures = [_executor().submit(_drain, func, queue) for _ in range(helpers)] if helpers > 0 else []
    try:
        _drain(func, queue)
    finally:
        waiting = [future for future in futures if not future.cancel()]
        errors = [error for error in map(Future.exception, waiting) if error is not None]
    if errors:
        raise errors[0]


def _drain(func: Callable[..., object], queue: Iterator[Sequence[object]]) -> None:
    for args in queue:  # a list iterator hands each entry to exactly one thread
        func(*args)


def _executor() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        with _lock:
            if _pool is None:
                _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="ane-simulator")
    return _pool


def _forget_pool() -> None:
    """In a forked child the pool's threads are gone: start afresh."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


@cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple())


def _target_machine() -> llvm.TargetMachine:
    """A fresh machine description: an engine takes ownership of its own."""
    features = llvm.get_host_cpu_features().flatten()
    return _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, codemodel="jitdefault", jit=True
    )


def _optimize(module: object, machine: object, vectorize: bool) -> None:
    options = llvm.create_pipeline_tuning_options(speed_level=3 if vectorize else 2)
    options.loop_vectorization = vectorize
    options.slp_vectorization = vectorize
    options.loop_unrolling = vectorize
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)


def _signature(function: llvm.ValueRef) -> tuple[str, list[str]]:
    """The names of an LLVM function's types: of its result, of its parameters."""
    result = str(function.global_value_type).split(" (", 1)[0]
    return result, [str(argument.type) for argument in function.arguments]


def _prototype(result: str, parameters: Sequence[str]) -> Any:
    """The ctypes prototype of a function with these types."""
    arguments = [_CTYPES[name] for name in parameters]
    return ctypes.CFUNCTYPE(None if result == "void" else _CTYPES[result], *arguments)


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

    @property
    def alone(self) -> bool:
        """Whether one thread does it."""
        return self._threads <= 1

    @property
    def job(self) -> int:
        """Where the job lies; as long as the team is kept."""
        return self._address

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


class Turns:
    """Teams of one thread each, one after the other in one call."""

    def __init__(self, teams: Sequence[Team]) -> None:
        self._teams = teams
        self._jobs = addresses(*(team.job for team in teams))
        self._address, self._count = ctypes.addressof(self._jobs), len(teams)

    def run(self) -> None:
        """Run every team."""
        _entry().each(self._address, self._count)


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
    """`some(job, first, step)` takes each `step`-th range; `parallel(share, job, threads, 0)` all of them at once;
    `each(jobs, count)` all ranges of several jobs.
    """

    some: Any
    each: Any
    parallel: Any = None
    share: int = 0


@cache
def _entry() -> _Entry:
    openmp = _openmp()
    if openmp is None:
        functions = jit.compile_ir(module([_some(), _each()]), ["some", "each"])
        return _Entry(functions["some"], functions["each"])
    functions = jit.compile_ir(module([_some(), _each(), _share(openmp)]), ["some", "each", "share"])
    openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    openmp.GOMP_parallel.restype = None
    return _Entry(functions["some"], functions["each"], openmp.GOMP_parallel, jit.address(functions["share"]))


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


def _each() -> Definition:
    """`count` jobs, one after the other."""
    f = Function("each", jobs=PTR, count=I64)
    jobs, count = f.parameters
    with f.loop(0, count) as i:
        f.invoke("some", jobs.at(i, PTR).load(PTR), f.constant(I64, 0), f.constant(I64, 1))
    return f.definition()


def _share(openmp: object) -> Definition:
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
