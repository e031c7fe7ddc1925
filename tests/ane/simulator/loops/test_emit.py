"""Fused loops compute, bit for bit, what the NumPy definitions compute, for any strides, widths and tails."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops import nest as loops
from ane_trainer.ane.simulator.loops.convert import decode_into, encoded
from ane_trainer.ane.simulator.loops.emit import pointwise_loop
from ane_trainer.ane.simulator.loops.group import Group, Instr
from ane_trainer.ane.simulator.loops.ir import module
from ane_trainer.ane.simulator.numbers.fp16 import decode, round_half_away

PATTERNS = decode(np.arange(1 << 16, dtype=np.uint16))


def run_group(code, arrays, stores, tables=(), width=None):
    """Compile and run straight-line code over `arrays` broadcast together; the stored results."""
    width = width or jit.host_vector_width()
    shape = np.broadcast_shapes(*[a.shape for a in arrays])
    outputs = [np.empty(shape, bool if code[s].is_bool else np.float32) for s in stores]
    nest = loops.nest(shape, [loops.element_strides(a, shape) for a in (*arrays, *outputs)])
    group = Group(tuple(code), len(arrays), len(tables), stores)
    text = module([pointwise_loop("f", group, nest, width)])
    function = jit.compile_ir(text, ["f"])["f"]
    arguments = jit.addresses(*[a.ctypes.data for a in (*arrays, *tables, *outputs)])
    function(ctypes.addressof(arguments), 0, nest.extents[0])
    return outputs


def same_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize("width", [32, 16, 8, 4, 1])
@pytest.mark.parametrize(("code", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_arithmetic_rounds_half_away_at_every_width(width, code, function):
    rng = np.random.default_rng(0)
    a, b = PATTERNS[rng.integers(0, 1 << 16, (2, 40_003))]
    (out,) = run_group(
        [Instr("load", which=0), Instr("load", which=1), Instr(code, (0, 1))], [a, b], (2,), width=width
    )
    assert same_bits(out, round_half_away(function(a, b)))


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_strides_and_broadcasts(seed, shape, data):
    rng = np.random.default_rng(seed)
    perm = data.draw(st.permutations(range(len(shape))))
    transposed = PATTERNS[rng.integers(0, 1 << 16, tuple(shape[p] for p in perm))]
    a = transposed.transpose(np.argsort(perm))
    ones = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    b = PATTERNS[rng.integers(0, 1 << 16, tuple(1 if one else n for one, n in zip(ones, shape, strict=True)))]
    (out,) = run_group([Instr("load", which=0), Instr("load", which=1), Instr("add", (0, 1))], [a, b], (2,))
    assert same_bits(out, np.broadcast_to(round_half_away(a + b), shape))


def test_a_lookup_reads_the_entry_of_every_pattern():
    table = np.arange(1 << 16, dtype=np.float32)
    (out,) = run_group([Instr("load", which=0), Instr("lookup", (0,), 0)], [PATTERNS], (1,), [table])
    assert np.array_equal(out, table)


def test_accumulator_rounding_covers_overflow_ties_and_signs():
    rng = np.random.default_rng(1)
    random = (rng.standard_normal(200_000) * 10.0 ** rng.uniform(-9, 5.5, 200_000)).astype(np.float32)
    edges = np.array(
        [2049, -4098, 1 + 2**-11, 32767.9, 32768, -32768, 1e9, -0.0, 2**-25, 2**-26, 0], np.float32
    )
    below_tie = np.nextafter(np.float32(2049), np.float32(0))
    raw = np.concatenate([random, edges, [below_tie]]).astype(np.float32)
    (out,) = run_group([Instr("load", which=0), Instr("mac_round", (0,))], [raw], (1,))
    expected = np.where(
        np.abs(raw) >= 32768, np.copysign(np.float32(65536), raw), round_half_away(raw)
    ) + np.float32(0)
    assert same_bits(out, expected.astype(np.float32))


def test_comparisons_and_select():
    rng = np.random.default_rng(2)
    a, b = PATTERNS[rng.integers(0, 1 << 16, (2, 5_001))]
    code = [
        Instr("load", which=0),
        Instr("load", which=1),
        Instr("lt", (0, 1)),
        Instr("select", (2, 0, 1)),
        Instr("not", (2,)),
    ]
    less, smaller, not_less = run_group(code, [a, b], (2, 3, 4))
    assert np.array_equal(less, a < b)
    assert same_bits(smaller, np.where(a < b, a, b))
    assert np.array_equal(not_less, ~(a < b))


def test_in_place_is_safe():
    x = PATTERNS[np.random.default_rng(3).integers(0, 1 << 16, 1_003)].copy()
    before = x.copy()
    nest = loops.nest(x.shape, [(1,), (1,)])
    code = (Instr("load", which=0), Instr("mul", (0, 0)))
    text = module([pointwise_loop("f", Group(code, 1, 0, (1,)), nest, 16)])
    arguments = jit.addresses(x.ctypes.data, x.ctypes.data)
    jit.compile_ir(text, ["f"])["f"](ctypes.addressof(arguments), 0, x.size)
    assert same_bits(x, round_half_away(before * before))


def test_every_pattern_decodes_as_defined():
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    out = np.empty(1 << 16, np.float32)
    decode_into(bits, out)
    assert same_bits(out, PATTERNS)


@pytest.mark.parametrize("factor", [1.0, 2.0, 1024.0, 32768.0])
def test_scaling_up_by_a_power_of_two_needs_no_rounding(factor):
    (out,) = run_group([Instr("load", which=0), Instr("scale", (0,), value=factor)], [PATTERNS], (1,))
    assert same_bits(out, round_half_away(PATTERNS * np.float32(factor)))


def test_encoding_loop_gives_every_pattern_and_refuses_other_values():
    patterns = np.arange(1 << 16, dtype=np.uint16)
    assert np.array_equal(encoded(PATTERNS).view(np.uint16), patterns)
    for wrong in (1 + 2.0**-12, 2.0**-25, 200_000.0, np.inf, np.nan):
        broken = PATTERNS.copy()
        broken[40_000] = wrong
        with pytest.raises(ValueError, match="encode: needs decoded fp16"):
            encoded(broken)
