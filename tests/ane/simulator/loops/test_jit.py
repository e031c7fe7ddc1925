"""Compiling LLVM IR text and running it in parallel."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ane_trainer.ane.simulator.loops.ir import Function, constant
from ane_trainer.ane.simulator.loops.jit import assembly, compile_ir, host_vector_width, run_parallel


def scale_ir() -> str:
    """p[0:n] *= s."""
    f = Function("scale", [("ptr", "p"), ("i64", "n"), ("float", "s")])
    with f.loop("0", "%n") as i:
        place = f.element("float", "%p", i)
        f.store("float", f.op(f"fmul float {f.load('float', place)}, %s"), place)
    return f.text()


@pytest.mark.parametrize("vectorize", [True, False])
def test_compiled_loop(vectorize: bool) -> None:
    scale = compile_ir(scale_ir(), ["scale"], vectorize=vectorize)["scale"]
    values = np.arange(1000, dtype=np.float32)
    scale(values.ctypes.data, 999, 0.5)
    assert np.array_equal(values, np.append(np.arange(999) * 0.5, 999).astype(np.float32))


def test_same_name_in_two_modules() -> None:
    add = "define i64 @f(i64 %a, i64 %b) {{\n %c = {} i64 %a, %b\n ret i64 %c\n}}"
    plus = compile_ir(add.format("add"), ["f"])["f"]
    times = compile_ir(add.format("mul"), ["f"])["f"]
    assert plus(2**40, 3) == 2**40 + 3
    assert times(2**40, 3) == 3 * 2**40


def test_condition_and_variable() -> None:
    f = Function("count", [("ptr", "p"), ("i64", "n"), ("ptr", "result")])
    total = f.variable("i64", "0")
    with f.loop("0", "%n", "2") as i:
        value = f.load("float", f.element("float", "%p", i))
        with f.when(f.op(f"fcmp ogt float {value}, {constant(0.25)}")):
            f.store("i64", f.add(f.load("i64", total, 8), "1"), total, 8)
    f.store("i64", f.load("i64", total, 8), "%result", 8)
    count = compile_ir(f.text(), ["count"])["count"]
    values, result = np.array([0.25, 9, 0.5, 9, 1, 0, -1], np.float32), np.zeros(1, np.int64)
    count(values.ctypes.data, len(values), result.ctypes.data)
    assert result[0] == 2


def test_refused_modules() -> None:
    with pytest.raises(RuntimeError, match="expected"):
        compile_ir("define void @f(", ["f"])
    with pytest.raises(NameError):
        compile_ir("define void @f() {\n ret void\n}", ["g"])


def test_assembly_shows_the_function() -> None:
    assert "scale" in assembly(scale_ir())


def test_vector_width() -> None:
    assert host_vector_width() in (4, 8, 16)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_run_parallel_runs_each_once(threads: int) -> None:
    seen: list[int] = []
    run_parallel(seen.append, [(i,) for i in range(20)], threads)
    assert sorted(seen) == list(range(20))


def test_run_parallel_uses_two_threads() -> None:
    meeting = threading.Barrier(2, timeout=10)
    run_parallel(meeting.wait, [(), ()], 2)  # would break the barrier if run one after the other


def test_run_parallel_nested() -> None:
    seen: list[tuple[int, int]] = []
    run_parallel(
        lambda i: run_parallel(lambda j: seen.append((i, j)), [(j,) for j in range(5)], 4),
        [(i,) for i in range(8)],
        4,
    )
    assert len(set(seen)) == 40


@pytest.mark.parametrize("threads", [1, 3])
def test_run_parallel_raises(threads: int) -> None:
    def refuse(i: int) -> None:
        if i == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        run_parallel(refuse, [(i,) for i in range(6)], threads)
