"""Pointwise ops that share nothing are loops of their own, so that equal ones are compiled once."""

from __future__ import annotations

import numpy as np
import pytest

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, TensorType
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.ane.simulator.loops import compiled
from ane_trainer.ane.simulator.schedule import schedule


def updates(count: int, shape: tuple[int, ...]) -> Function:
    """So many weights of one shape, each with its gradient and a rate that all of them read."""
    b = Builder()
    rate = b.input("rate", TensorType("fp16", (1,)))
    new = []
    for i in range(count):
        w, g = (b.input(f"{name}{i}", TensorType("fp16", shape)) for name in "wg")
        moved = b.op("sub", x=w, y=b.op("mul", x=g, y=rate))
        new.append(b.op("maximum", x=moved, y=b.op("abs", x=g)))
    return b.finish(tuple(new))


def test_updates_of_equal_weights_are_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    waiting = compiled._waiting
    monkeypatch.setattr(
        compiled, "_compile_waiting", lambda: asked.append(sum(len(body.text) for body in waiting))
    )
    for count in (2, 12):
        monkeypatch.setattr(compiled, "_compiled", {})
        waiting.clear()
        plan = prepare(updates(count, (96, 64)), make_context("m4", threads=1))
        assert len(plan.steps) == count
    waiting.clear()
    assert asked[0] == asked[-1] > 0


def test_small_ones_share_loops() -> None:
    entries = schedule(updates(12, (8,)))
    assert [len(entry.ops) for entry in entries] == [32, 16]


def test_what_shares_an_operand_or_a_result_stays_together() -> None:
    b = Builder()
    x, y, z = (b.input(name, TensorType("fp16", (96, 64))) for name in "xyz")
    left, right = b.op("abs", x=x), b.op("square", x=x)  # one operand
    joined = b.op("add", x=b.op("abs", x=y), y=b.op("square", x=z))  # two groups that meet
    entries = schedule(b.finish((left, right, joined)))
    assert [[op.kind for op in entry.ops] for entry in entries] == [
        ["abs", "square"],
        ["abs", "square", "add"],
    ]


def test_divided_entries_compute_the_same() -> None:
    feeds = {"rate": np.full(1, 0.5, np.float16)}
    numbers = np.random.default_rng(0)
    for i in range(3):
        feeds |= {f"{n}{i}": numbers.standard_normal((96, 64)).astype(np.float16) for n in "wg"}
    found = prepare(updates(3, (96, 64)), make_context("m4", "fast", threads=1)).run(feeds)
    for i, got in enumerate(found.values()):
        w, g = feeds[f"w{i}"].astype(np.float32), feeds[f"g{i}"].astype(np.float32)
        assert np.allclose(got, np.maximum(w - g / 2, np.abs(g)), atol=2e-3)
