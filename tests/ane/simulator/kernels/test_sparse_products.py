"""Products whose left operand is mostly zero (one-hot numbers) are the same bits as the whole product, and sooner."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from ane_trainer.ane.simulator import make_context
from ane_trainer.ane.simulator.kernels import contraction
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away

F32 = NDArray[np.float32]
ROWS, DEPTH, COLUMNS = 32, 1024, 160


def one_hot(values: F32) -> F32:
    a = np.zeros((ROWS, DEPTH), np.float32)
    a[np.arange(ROWS), np.random.default_rng(1).integers(0, DEPTH, ROWS)] = values
    return a


LEFT: dict[str, Callable[[], F32]] = {
    "one-hot": lambda: one_hot(np.ones(ROWS, np.float32)),
    "other numbers": lambda: one_hot(np.linspace(-3, 65504, ROWS, dtype=np.float32)),
    "nothing": lambda: np.zeros((ROWS, DEPTH), np.float32),
    "one row": lambda: np.pad(np.ones((1, DEPTH), np.float32), ((0, ROWS - 1), (0, 0))),
    "dense behind a sparse row": lambda: np.pad(np.ones((ROWS - 1, DEPTH), np.float32), ((1, 0), (0, 0))),
}


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", LEFT)
def test_the_bits_are_those_of_the_whole_product(name: str, transposed: bool, fidelity: str) -> None:
    ctx = make_context("m4", fidelity, threads=1)
    a = round_half_away(LEFT[name]())
    a = a.T if transposed else a
    numbers = np.random.default_rng(0).standard_normal((a.shape[1], COLUMNS)) * np.geomspace(
        1e-5, 300, COLUMNS
    )
    b = round_half_away(numbers)
    found, whole = (np.full((len(a), COLUMNS), 7.0, np.float32) for _ in range(2))
    contraction.product_into(ctx, a, b, None, found)()
    contraction._dense(ctx, a, b, None, whole)()
    assert found.tobytes() == whole.tobytes()


def test_one_hot_numbers_cost_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int] = []
    plain = contraction._dense
    monkeypatch.setattr(
        contraction, "_dense", lambda ctx, a, *rest: depths.append(a.shape[1]) or plain(ctx, a, *rest)
    )
    a, b = LEFT["one-hot"](), np.ones((DEPTH, COLUMNS), np.float32)
    contraction.product_into(
        make_context("m4", threads=1), a, b, None, np.empty((ROWS, COLUMNS), np.float32)
    )()
    assert depths[0] == DEPTH
    assert depths[1] <= ROWS
