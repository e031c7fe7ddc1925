"""`watching`: the ranges of a run in parts are those of the whole run, and memory is let go on the way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Op, Program, TensorType
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.verify import watching
from ane_trainer.ane.verify.profiling import profile
from ane_trainer.ane.verify.watching import extremes, watch


def step_of(chip: str) -> tuple[Program, dict[str, Array]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    x, y = torch.randn(4, 1, 6, 6), torch.randint(0, 10, (4,))
    step = at.compile_step(
        model, "cross_entropy", torch.optim.Adam(model.parameters()), example=(x, y), chip=chip, device="sim"
    )
    return step.program, step.feeds(x, y) | step.port_state()


@pytest.mark.parametrize("chip", ["m1", "m4"])
def test_parts_show_what_the_whole_run_shows(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    program, feeds = step_of(chip)
    whole = {op.name: op for op in profile(program, feeds, chip=chip).ops}
    for size in (watching.PART_BYTES, 4000):
        monkeypatch.setattr(watching, "PART_BYTES", size)
        found = extremes(program, feeds, chip=chip)
        assert len(found) > 0.8 * len(whole)
        for each in found:
            other = whole[each.name]
            assert (each.low, each.high, each.overflows) == (other.low, other.high, other.overflows)
        unseen = {whole[name].kind for name in whole.keys() - {each.name for each in found}}
        assert unseen <= {"reshape", "transpose", "concat", "slice_by_size", "slice_by_index", "expand_dims"}


def test_values_are_let_go_after_their_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder()
    value = builder.input("x", TensorType("fp16", (64, 64)))
    for _ in range(40):
        value = builder.op("add", x=value, y=value)
    monkeypatch.setattr(watching, "PART_BYTES", 3 * 4 * 64 * 64)
    held: list[int] = []

    def seen(op: Op, values: Mapping[str, Array]) -> None:
        held.append(sum(isinstance(values[name], np.ndarray) for name in values))

    watch(Program((builder.finish((value,)),)), {"x": np.ones((64, 64), np.float16)}, seen, chip="m4")
    assert len(held) == 40
    assert max(held) <= 5


def test_products_that_vanish_are_counted_on_some_rows() -> None:
    rng = np.random.default_rng(0)
    builder = Builder()
    x = builder.input("x", TensorType("fp16", (2048, 16)))
    y = builder.input("y", TensorType("fp16", (16, 8)))
    program = Program((builder.finish((builder.op("matmul", x=x, y=y),)),))
    feeds = {
        "x": (rng.standard_normal((2048, 16)) * 1e-3).astype(np.float16),
        "y": (rng.standard_normal((16, 8)) * 1e-3).astype(np.float16),
    }
    (found,) = extremes(program, feeds, chip="m4")
    assert found.vanished > 0.9
    feeds["y"][:] = 0
    (found,) = extremes(program, feeds, chip="m4")
    assert found.vanished == 0.0


def test_the_ops_of_a_part_are_read_from_one_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view for each op made a run of 6,000 ops quadratic: 44 s of 92."""
    builder = Builder()
    value = builder.input("x", TensorType("fp16", (4,)))
    for _ in range(40):
        value = builder.op("add", x=value, y=value)
    views = set()
    program = Program((builder.finish((value,)),))
    watch(program, {"x": np.ones(4, np.float16)}, lambda op, values: views.add(id(values)), chip="m4")
    assert len(views) == 1
