"""Op by op the engine computes the bits of the whole program, and double precision takes any op's place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ane_trainer as at
from ane_trainer.ane import simulate
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, TensorType
from ane_trainer.ane.simulator import make_context
from ane_trainer.ane.simulator.numbers.fp16 import decode
from ane_trainer.ane.verify.accuracy import dead_products, examine
from ane_trainer.ane.verify.lockstep import Lockstep


def half(*shape: int) -> TensorType:
    return TensorType("fp16", shape)


def test_a_step_in_lockstep_has_the_bits_of_the_whole_program() -> None:
    torch.manual_seed(0)
    model = at.build_model("cnn", (1, 8, 8), 4, seed=0)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(4, (4,))
    step = at.compile_step(
        model, "cross_entropy", torch.optim.Adam(model.parameters()), example=(x, y), seed=0
    )
    feeds = step.feeds(x, y) | step.port_state()
    run = Lockstep(step.program.main, feeds, make_context("m4"))
    found = examine(run)
    for name, want in simulate(step.program, feeds, chip="m4").items():
        got = found.outcome.engine[name]
        assert np.array_equal(got, decode(want) if want.dtype == np.float16 else want), name
    again, exactly = run.hybrid(lambda unit: False)
    assert not exactly
    assert all(np.array_equal(again[name], array) for name, array in found.outcome.engine.items())


def square_root_of_squares() -> Function:
    b = Builder()
    x = b.input("x", half(4))
    return b.finish((b.op("sqrt", x=b.op("mul", x=x, y=x, name="q"), name="y"),))


def test_double_precision_reaches_until_the_numbers_fit_again() -> None:
    run = Lockstep(square_root_of_squares(), {"x": np.float16([3, 400, 2, 1])}, make_context("m4"))
    plain, _ = run.hybrid(lambda unit: False)
    assert plain["y"][1] == 65536.0  # the engine's infinity
    healed, exactly = run.hybrid(lambda unit: unit.name == "q")
    assert exactly == {"q", "y"}
    assert healed["y"][1] == 400.0


def test_dead_products_are_counted_as_if_one_by_one() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 9)) * 10.0 ** rng.uniform(-5, 1, (6, 9))).astype(np.float32)
    w = (rng.standard_normal((5, 9)) * 10.0 ** rng.uniform(-4, 0, (5, 9))).astype(np.float32)
    x[0, 0] = 0.0
    b = Builder()
    op_x, op_w = b.input("x", half(6, 9)), b.input("w", half(5, 9))
    b.op("matmul", x=op_x, y=op_w, transpose_y=True)
    (op,) = b.finish(()).ops
    products = np.abs(x[:, None, :].astype(np.float64) * w[None])
    alive = products > 0
    want = ((products < 2.0**-17) & alive).sum() / alive.sum()
    assert dead_products(op, {"x": x, "w": w}) == pytest.approx(want)
