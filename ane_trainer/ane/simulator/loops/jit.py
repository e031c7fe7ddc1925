"""Compile LLVM IR text for this machine's CPU and call it from several threads.

The simulator's kernels are generated as LLVM IR text and compiled on first use by `llvmlite`; no C
compiler and no numba. IR in the generic vector types (`<16 x float>`) runs everywhere: LLVM splits
what the CPU has not. Compiled code lives as long as the process.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import llvmlite.binding as llvm

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
_engines: list[Any] = []  # one per compiled module; kept so that the code stays mapped
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
        module = llvm.parse_assembly(ir_text)
        machine = _target_machine()
        module.triple = machine.triple
        module.data_layout = str(machine.target_data)
        module.verify()
        prototypes = {name: _prototype(module.get_function(name)) for name in names}
        _optimize(module, machine, vectorize)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        _engines.append(engine)
        return {name: kind(engine.get_function_address(name)) for name, kind in prototypes.items()}


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


def run_parallel(func: Callable[..., Any], argslists: Sequence[Sequence[Any]], threads: int) -> None:
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


def _drain(func: Callable[..., Any], queue: Iterator[Sequence[Any]]) -> None:
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


def _target_machine() -> Any:
    """A fresh machine description: an engine takes ownership of its own."""
    features = llvm.get_host_cpu_features().flatten()
    return _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, codemodel="jitdefault", jit=True
    )


def _optimize(module: Any, machine: Any, vectorize: bool) -> None:
    options = llvm.create_pipeline_tuning_options(speed_level=3 if vectorize else 2)
    options.loop_vectorization = vectorize
    options.slp_vectorization = vectorize
    options.loop_unrolling = vectorize
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)


def _prototype(function: Any) -> Any:
    """The ctypes prototype of an LLVM function, from its own signature."""
    result = str(function.global_value_type).split(" (", 1)[0]
    arguments = [_CTYPES[str(argument.type)] for argument in function.arguments]
    return ctypes.CFUNCTYPE(None if result == "void" else _CTYPES[result], *arguments)
