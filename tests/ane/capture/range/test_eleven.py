"""Rounding to eleven bits: in the bits of fp32 as by taking numbers apart; what rounded runs hold of their inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.capture.range.departure import Eleven, Half, Rounding
from ane_trainer.ane.capture.range.eleven import to_eleven_bits
from ane_trainer.ane.capture.range.running import in_step
from ane_trainer.ane.dispatch.rounding import rounded_run


def numbers() -> torch.Tensor:
    """Of all exponents that are normal, with ties, zeros and infinities."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(20_000, generator=draw) * torch.randn(20_000, generator=draw).mul(15.0).exp()
    ties = torch.arange(4096, 8192).float() * 0.5
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, -3.4e38, 65504.0])
    found = torch.cat([wide, ties, -ties, ends])
    return found[(found == 0) | (found.abs() > 1e-34)]


def test_bits_are_rounded_as_significands_are() -> None:
    values = numbers()
    significand, exponent = torch.frexp(values)
    want = torch.ldexp(torch.round(significand * 2048.0) / 2048.0, exponent)
    assert torch.equal(to_eleven_bits(values).view(torch.int32), want.view(torch.int32))
    grid = values[:6000].reshape(60, 100).mT
    assert torch.equal(to_eleven_bits(grid), to_eleven_bits(grid.contiguous()))
    assert torch.equal(to_eleven_bits(values.double()), want.double())


def test_the_same_draws_round_up_and_down_alike() -> None:
    values = numbers()
    significand, exponent = torch.frexp(values)
    up = torch.rand(values.shape, generator=torch.Generator().manual_seed(3))
    want = torch.ldexp(torch.floor(significand * 2048.0 + up) / 2048.0, exponent)
    assert torch.equal(to_eleven_bits(values, torch.Generator().manual_seed(3)), want)


@pytest.mark.parametrize("kind", [Eleven, Half])
def test_inputs_are_rounded_where_they_are_read_and_not_held_twice(kind: type[Rounding]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    x, y = torch.randn(4, 8), torch.randint(0, 3, (4,))
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1), (x, y), device="sim"
    )
    capture = step._loaded.capture
    captured = capture.captured
    given = dict(capture.values((x, y)))
    inputs = [given[p.name] for p in captured.inputs]
    held = kind(captured.graph)
    held.again = False
    runs = (kind(captured.graph), held)
    seen = 0
    with torch.no_grad():
        for node, (own, other) in in_step(runs, inputs):
            if isinstance(own, torch.Tensor):
                assert torch.equal(own, other), node.name
            if node.op == "placeholder" and given[node.name] is runs[0].env.get(node):
                seen += 1
    assert seen >= 4  # the four weights, and no copies of them
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert rounded_run(step._loaded, (x, y), before).gradient_error < 0.02
