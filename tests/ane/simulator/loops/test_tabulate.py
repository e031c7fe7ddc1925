"""Which chains of one variable become tables, and that a table holds what the chain computes."""

from __future__ import annotations

import numpy as np
import pytest

from ane_trainer.ane.simulator.loops.group import Group, Instr
from ane_trainer.ane.simulator.loops.tabulate import evaluate, tabulate
from ane_trainer.ane.simulator.numbers.fp16 import decode

PATTERNS = decode(np.arange(1 << 16, dtype=np.uint16))
SIGMOID = decode(
    (1 / (1 + np.exp(-PATTERNS.clip(-11, 11).astype(np.float64)))).astype(np.float16).view(np.uint16)
)

#: s = sigmoid(x), s (1 - s)
DERIVATIVE = (
    Instr("load", (), 0), Instr("lookup", (0,), 0), Instr("const", value=1.0), Instr("sub", (2, 1)),
    Instr("mul", (1, 3)),
)  # fmt: skip


def values(group: Group, tables: list[np.ndarray]) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for instr in group.code:
        if instr.code == "load":
            found.append(PATTERNS)
        else:
            found.append(evaluate(instr, [found[s] for s in instr.sources], tables))
    return [np.broadcast_to(found[s], PATTERNS.shape) for s in group.stores]


@pytest.mark.parametrize(
    ("stores", "lookups", "subtractions"),
    [
        ((4,), 1, 0),  # the derivative alone: one gather in place of a gather and two ops
        ((1, 4), 1, 1),  # behind the sigmoid that is kept: two ops in place of another gather
    ],
)
def test_the_work_that_is_there_anyway_costs_nothing(
    stores: tuple[int, ...], lookups: int, subtractions: int
) -> None:
    group = Group(DERIVATIVE, 1, 1, stores)
    found, tables = tabulate(group, [SIGMOID])
    codes = [instr.code for instr in found.code]
    assert (codes.count("lookup"), codes.count("sub")) == (lookups, subtractions)
    for one, other in zip(values(found, tables), values(group, [SIGMOID]), strict=True):
        np.testing.assert_array_equal(one, other)
