"""A step in time: it takes what the estimate says, lanes take turns, and memory is what is still read."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ane_trainer.ane.chips.cost import estimate
from ane_trainer.ane.chips.lookup import known_chips
from ane_trainer.ane.chips.timeline import LANES, Memory, timeline
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Literal, Program, TensorType, literal


def network(batch: int, wide: int, layers: int) -> Program:
    """Products with bias and activation, an elementwise tail, and a view as one of two outputs."""
    b = Builder()
    x = b.input("x", TensorType("fp16", (batch, wide)))
    for _ in range(layers):
        weight = Literal(TensorType("fp16", (wide, wide)), b"\0" * (2 * wide * wide))
        x = b.op("add", x=b.op("matmul", x=x, y=weight), y=literal([0.5], "fp16"))
    squared = b.op("mul", x=x, y=x)
    total = b.op("reduce_sum", x=squared, axes=literal([-1], "int32"), keep_dims=literal(True, "bool"))
    shown = b.op("reshape", x=squared, shape=literal([batch * wide], "int32"))
    return Program((b.finish((total, shown)),))


programs = st.builds(network, st.integers(1, 64), st.sampled_from([16, 256, 1024]), st.integers(1, 3))


@given(programs, st.sampled_from(known_chips()), st.sampled_from(["e5rt", "direct", "coreml"]))
def test_a_dispatch_takes_what_the_estimate_says(program: Program, chip: str, path: str) -> None:
    found = timeline(program, chip, path)
    cost = estimate(program, chip, path)
    assert max(item.end_us for item in found.slices) == pytest.approx(cost.latency_us, rel=1e-12)
    took = sum(found.busy_us(lane) for lane in LANES if lane != "weights")
    assert took == pytest.approx(cost.latency_us, rel=1e-9)
    parts = {"host": "dispatch", "transfers in": "activations", "transfers out": "activations"}
    moved = sum(found.busy_us(lane) for lane, part in parts.items() if part == "activations")
    assert moved == pytest.approx(cost.split["activations"], rel=1e-9, abs=1e-12)
    assert found.busy_us("weights") == pytest.approx(sum(op.weight_us for op in cost.ops), rel=1e-12)


@given(programs)
def test_lanes_take_turns_and_constants_stream_while_the_array_computes(program: Program) -> None:
    found = timeline(program, "m4")
    ordered = sorted(found.slices, key=lambda item: LANES.index(item.lane))
    for _, group in groupby(ordered, key=lambda item: item.lane):
        lane = list(group)
        assert all(b.start_us >= a.end_us - 1e-9 for a, b in pairwise(lane))
    arrays = [s for s in found.slices if s.lane == "MAC array"]
    weights = [s for s in found.slices if s.lane == "weights"]
    assert len(arrays) == len(weights)
    assert arrays
    for array, weight in zip(arrays, weights, strict=True):
        assert array.op is weight.op
        assert array.start_us == weight.start_us
        assert weight.end_us <= array.end_us + 1e-9
        assert array.carries == ("add",)  # the bias rides on the product's output stage
    assert weights[0].moved_bytes == arrays[0].op.weight_bytes  # type: ignore[union-attr]


def test_memory_by_hand() -> None:
    program = network(4, 16, 1)
    found = timeline(program, "m4")
    half, row, weight = 2 * 4 * 16, 2 * 4, 2 * 16 * 16
    kinds = [op.op for op in found.cost.ops]
    assert kinds == ["matmul", "add", "mul", "reduce_sum", "reshape"]
    constants = found.memory[0].constants
    assert constants >= weight + 2  # and the axes and shapes
    held = [(m.inputs, m.outputs, m.intermediates) for m in found.memory]
    assert held == [
        (half, 0, 0),  # before the engine begins
        (half, 0, half),  # the product
        (half, 0, 2 * half),  # and its sum with the bias
        (half, half, half),  # the squares are an output, shown as a vector; the sum is read for the last time
        (half, half + row, 0),
        (half, half + row, 0),  # the view holds nothing
        (half, half + row, 0),
    ]
    assert found.peak() == Memory(found.memory[2].start_us, half, constants, 0, 2 * half)


def test_bytes_in_flight_end_at_none() -> None:
    found = timeline(network(64, 1024, 2), "m1")
    flow = list(found.in_flight())
    assert flow[-1][1] == 0
    assert max(size for _, size in flow) == 2 * 1024 * 1024
    assert all(size >= 0 for _, size in flow)
    assert [time for time, _ in flow] == sorted(time for time, _ in flow)


def test_a_program_that_leaves_the_engine_is_on_the_host() -> None:
    b = Builder()
    out = b.op("relu", x=b.input("x", TensorType("fp16", (64, 1024))))
    program = Program((b.finish((out,)),))
    lanes = {item.lane for item in timeline(program, "m1").slices}
    assert "elementwise" not in lanes
    assert "host" in lanes
    assert "elementwise" in {item.lane for item in timeline(program, "m4").slices}
