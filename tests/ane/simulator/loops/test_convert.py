"""The compiled loops against their NumPy definitions, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.simulator.loops.convert import rounded, table_of
from ane_trainer.ane.simulator.numbers.fp16 import decode, round_half_away
from ane_trainer.ane.simulator.numbers.tables import FUNCTIONS, evaluate

PATTERNS = decode(np.arange(1 << 16, dtype=np.uint16))
EDGES = [0.0, -0.0, 65519.99, 65520.0, 65535.0, 1e30, 2.0**-25, -(2.0**-25), 2.0**-14, 2.0**-14 - 2.0**-26]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), wide=st.booleans())
def test_rounding(seed: int, wide: bool) -> None:
    rng = np.random.default_rng(seed)
    dtype = np.float64 if wide else np.float32
    numbers = rng.standard_normal(4096) * 10.0 ** rng.integers(-9, 6, 4096)
    ties = (PATTERNS[:-1].astype(np.float64) + PATTERNS[1:]) / 2
    with np.errstate(under="ignore"):
        x = np.concatenate([numbers, rng.choice(ties, 2048), EDGES]).astype(dtype)
    assert same(rounded(x.copy()), round_half_away(x))


def test_views_and_few_numbers_take_the_other_way() -> None:
    x = np.linspace(0, 3, 8192, dtype=np.float32).reshape(64, 128)
    assert same(np.ascontiguousarray(rounded(x.T)), np.ascontiguousarray(round_half_away(x.T)))
    assert same(rounded(x[0, :7].copy()), round_half_away(x[0, :7]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tables_for_every_pattern(name: str) -> None:
    assert same(table_of(name, PATTERNS.copy()), evaluate(name, PATTERNS))
