"""Per-op profiles: where numbers overflow and underflow, how far they lie from double precision, states, time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ane_trainer.ane import compare, profile, simulate
from ane_trainer.ane.errors import ProgramError, SimulationError, UnsupportedModel
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType, literal
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.verify.profiling import Distance, OpProfile, Profile, distance
from tests.ane.mil.semantics.test_semantics import program_of
from tests.ane.simulator.kernels.witness import OPS


def half(*shape: int, state: bool = False) -> TensorType:
    return TensorType("fp16", shape, state)


def by_name(found: Profile) -> dict[str, OpProfile]:
    return {op.name: op for op in found.ops}


def test_overflow_and_underflow_are_counted_where_they_happen() -> None:
    b = Builder()
    x = b.input("x", half(4))
    b.source = "model.square"
    y = b.op("square", x=x, name="y")
    b.source = None
    z = b.op("relu", x=y, name="z")
    w = b.op("add", x=z, y=z, name="w")
    found = profile(Program((b.finish((w,)),)), {"x": np.float16([300, 1e-5, 2, -400])})
    ops = by_name(found)
    assert (ops["y"].overflows, ops["y"].infinities, ops["y"].underflows) == (2, 2, 1)
    assert (ops["z"].overflows, ops["z"].infinities, ops["z"].underflows) == (0, 2, 0)
    assert (ops["w"].overflows, ops["w"].infinities) == (0, 2)
    assert (ops["y"].low, ops["y"].high) == (0.0, 4.0)
    assert found.worst()[0].name == "y"
    assert found.worst()[0].source == "model.square"


def test_a_mask_of_infinities_is_no_overflow() -> None:
    b = Builder()
    x, keep = b.input("x", half(3)), b.input("keep", TensorType("bool", (3,)))
    y = b.op("select", cond=keep, a=x, b=literal(float("-inf"), "fp16"), name="y")
    found = profile(
        Program((b.finish((y,)),)), {"x": np.ones(3, np.float16), "keep": np.array([True, False, True])}
    )
    (op,) = found.ops
    assert (op.overflows, op.infinities, op.own.largest) == (0, 1, 0.0)


def test_own_and_total_distance() -> None:
    """The second op adds nothing to what the first lost; the third is exact on wrong operands."""
    b = Builder()
    x = b.input("x", half(1))
    y = b.op("add", x=x, y=1.0, name="y")  # 2048 + 1 -> 2050 (half away)
    z = b.op("sub", x=y, y=2048.0, name="z")
    found = by_name(profile(Program((b.finish((z,)),)), {"x": np.float16([2048])}))
    assert found["y"].own == found["y"].total == Distance(1.0, 1 / 2049, 1 / 2049)
    assert found["z"].own == Distance(0.0, 0.0, 0.0)
    assert found["z"].total == Distance(1.0, 1.0, 1.0)


def network() -> Program:
    rng = np.random.default_rng(0)
    b = Builder()
    x = b.input("x", half(2, 3, 6, 6))
    w = from_array(rng.standard_normal((4, 3, 3, 3)).astype(np.float16))
    pads: dict[str, object] = {
        "pad_type": "custom",
        "pad": [1, 1, 1, 1],
        "strides": [1, 1],
        "dilations": [1, 1],
    }
    y = b.op("conv", x=x, weight=w, groups=1, **pads)
    y = b.op("gelu", x=y, mode="EXACT")
    y = b.op("reshape", x=y, shape=[2, 144], name="flat")
    v = from_array((rng.standard_normal((144, 5)) / 12).astype(np.float16))
    y = b.op("matmul", x=y, y=v)
    return Program((b.finish((b.op("softmax", x=y, axis=-1, name="p"), y)),))


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_profiling_changes_nothing(fidelity: str) -> None:
    program, x = network(), np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float16)
    found = profile(program, {"x": x}, chip="m1", fidelity=fidelity)
    compared = compare(program, {"x": x}, chip="m1", fidelity=fidelity)
    assert found.outputs == compared
    simulated = simulate(program, {"x": x}, chip="m1", fidelity=fidelity)
    ops = by_name(found)
    for error in compared:
        finite = simulated[error.name]
        assert (ops[error.name].low, ops[error.name].high) == (finite.min(), finite.max())
        assert ops[error.name].total == error.distance
        assert 0 < error.distance.relative < 0.01
    assert ops["flat"].time_us is None
    assert found.time_us > 0
    assert all(op.time_us > 0 for op in found.ops if op.name != "flat")


def test_states_run_on_through_steps() -> None:
    b = Builder()
    state, x = b.input("total", half(1, state=True)), b.input("x", half(1))
    old = b.op("read_state", input=state)
    new = b.op("coreml_update_state", state=state, value=b.op("add", x=old, y=x, name="sum"))
    program = Program((b.finish((b.op("mul", x=new, y=1.0, name="y"),)),))
    steps = [{"x": np.float16([v])} for v in (2048, 1, 1)]
    by = {e.name: e for e in compare(program, steps, path="coreml")}
    # 2048 + 1 -> 2050, + 1 -> 2052 (2051 is half way); without rounding 2050
    assert by["total"].distance.largest == by["y"].distance.largest == 2.0
    ops = by_name(profile(program, steps, path="coreml"))
    assert ops["sum"].own.largest == 1.0
    assert ops["sum"].total.largest == 2.0
    (given, _) = compare(program, {"x": np.float16([1]), "total": np.float16([2])}, path="coreml")
    assert given.distance.largest == 0


def test_chosen_function_and_refusals() -> None:
    program = network()
    other = Program((*program.functions, replace(program.main, name="other")))
    feeds = {"x": np.zeros((2, 3, 6, 6), np.float16)}
    assert compare(other, feeds, function="other") == compare(other, feeds)
    with pytest.raises(ProgramError, match="main, other") as caught:
        profile(other, feeds, function="third")
    assert caught.value.code == "MIL112"
    with pytest.raises(SimulationError, match="x"):
        profile(program, {})
    b = Builder()
    x = b.input("x", half(2, 2))
    refused = Program((b.finish((b.op("reduce_prod", x=x, axes=[1]),)),))
    with pytest.raises(UnsupportedModel):
        profile(refused, {"x": np.ones((2, 2), np.float16)}, chip="m5")
    assert profile(refused, {"x": np.ones((2, 2), np.float16)}, chip="m5", path=None).ops


def test_every_op_can_be_profiled() -> None:
    for kind in sorted(OPS):
        program, feeds = program_of(kind, OPS[kind](np.random.default_rng(5)))
        for op in profile(program, feeds, path=None).ops:
            assert op.own.relative < 0.1, (kind, op.own)
            assert op.overflows == 0, kind


def test_distance_saturates_as_fp16_and_leaves_out_the_undefined() -> None:
    assert distance(np.float32([65536, 1]), np.array([1e9, 1])).largest == 0
    assert distance(np.float32([65536]), np.array([1e9]), half=False).largest == 1e9 - 65536
    assert distance(np.float32([3, 1]), np.array([np.nan, 2])) == Distance(1.0, 0.5, 0.5)
    assert distance(np.float32([]), np.array([])) == Distance(0.0, 0.0, 0.0)
