"""Compiling LLVM IR text and running it in parallel."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ane_trainer.ane.simulator.loops.ir import F32, F64, I8, I32, I64, PTR, Function, module
from ane_trainer.ane.simulator.loops.jit import assembly, compile_ir, host_vector_width, run_parallel


def scale_ir() -> str:
    """p[0:n] *= s."""
    f = Function("scale", p=PTR, n=I64, s=F32)
    p, n, s = f.parameters
    with f.loop(0, n) as i:
        place = p.at(i, F32)
        place.store(place.load(F32) * s)
    return module([f.definition()])


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
    f = Function("count", p=PTR, n=I64, result=PTR)
    p, n, result = f.parameters
    total = f.variable(f.constant(I64, 0))
    with f.loop(0, n, 2) as i, f.when(p.at(i, F32).load(F32) > 0.25):
        total.set(total.value + 1)
    result.store(total.value)
    count = compile_ir(module([f.definition()]), ["count"])["count"]
    values, found = np.array([0.25, 9, 0.5, 9, 1, 0, -1], np.float32), np.zeros(1, np.int64)
    count(values.ctypes.data, len(values), found.ctypes.data)
    assert found[0] == 2


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_operators_on_any_number_of_lanes(lanes: int) -> None:
    """Floats, integers, truth values, conversions, lanes and reductions against NumPy."""
    f = Function("work", x=PTR, out=PTR, whole=PTR)
    x, out, whole = f.parameters
    v = x.load(F32.of(lanes))
    larger = (v > 0.5).choose(v * 2.0, v - 1.0)
    out.store((larger.to(F64) / 3.0).to(F32))
    bits = v.bits(I32)
    numbers = ((bits >> 13 & 0x7FFF) ^ (bits >> 16 & 0x8000)) + (v.call("floor").to(I32) << 1)
    whole.store(numbers.call("smax", 5))
    flag = bits.below(0x3F000000) & ~bits.above(0x3F800000)
    whole.at(lanes, I32).store(flag.to(I8).to(I32))
    if lanes > 1:
        whole.at(2 * lanes, I32).store(numbers.reduce("smax"))
        out.at(lanes, F32).store(v.each(0, 2, lanes // 2))
        out.at(2 * lanes, F32).store(v.lane(1).splat(lanes))
    work = compile_ir(module([f.definition()]), ["work"])["work"]
    source = np.random.default_rng(lanes).uniform(-2, 2, lanes).astype(np.float32)
    floats, ints = np.zeros(3 * lanes, np.float32), np.zeros(2 * lanes + 1, np.int32)
    work(source.ctypes.data, floats.ctypes.data, ints.ctypes.data)
    expected = np.where(source > 0.5, source * 2, source - 1)
    assert np.array_equal(floats[:lanes], (expected.astype(np.float64) / 3).astype(np.float32))
    u = source.view(np.uint32)
    values = (((u >> 13) & 0x7FFF) ^ ((u >> 16) & 0x8000)).astype(np.int32) + 2 * np.floor(source).astype(
        np.int32
    )
    assert np.array_equal(ints[:lanes], np.maximum(values, 5))
    assert np.array_equal(ints[lanes : 2 * lanes], ((u < 0x3F000000) & ~(u > 0x3F800000)).astype(np.int32))
    if lanes > 1:
        assert ints[2 * lanes] == values.max()
        assert np.array_equal(floats[lanes : lanes + lanes // 2], source[::2])
        assert (floats[2 * lanes :] == source[1]).all()


def test_a_negative_zero_stays_one() -> None:
    f = Function("zeros", out=PTR)
    (out,) = f.parameters
    for i, zero in enumerate((0.0, -0.0)):
        out.at(i, F32).store(f.constant(F32, zero))
    found = np.ones(2, np.float32)
    compile_ir(module([f.definition()]), ["zeros"])["zeros"](found.ctypes.data)
    assert np.array_equal(np.signbit(found), [False, True])


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
