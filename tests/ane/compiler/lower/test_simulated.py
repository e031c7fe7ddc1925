"""Lowered fp16 programs on the simulator against torch: the whole path, with fp16's tolerance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.compiler.legalize import legalize
from ane_trainer.ane.simulator.plan import prepare
from ane_trainer.ane.simulator.registry import EngineContext
from tests.ane.compiler.lower.harness import gradients, lowered, normal

NETS: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, ...], ...]]] = {
    "conv_pool": (
        lambda x, w: F.max_pool2d(F.relu(F.conv2d(x, w, stride=2, padding=1)), 3, 2, 1),
        ((2, 3, 13, 13), (4, 3, 3, 3)),
    ),
    "depthwise": (lambda x, w: F.conv2d(x, w, padding=1, groups=4), ((2, 4, 7, 7), (4, 1, 3, 3))),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ((2, 2, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)),
    ),
    "norm_gelu": (lambda x, w: F.gelu(F.layer_norm(x, (16,), w)), ((8, 16), (16,))),
}


@pytest.mark.parametrize("chip", ["m1", "m4"])
@pytest.mark.parametrize("name", NETS)
def test_value_and_gradients_in_fp16(name: str, chip: str) -> None:
    """Errors stay within 2 % of the largest entry: fp16 rounding, Q15.16 sums, tables (6e-3)."""
    function, shapes = NETS[name]
    inputs = [normal(*shape, seed=i).half().float() for i, shape in enumerate(shapes)]
    program = legalize(lowered(gradients(function), inputs, dtype="fp16"), chip).lowered
    plan = prepare(program.program.main, EngineContext(get_chip(chip), "exact", 1))
    feeds = {p.name: t.numpy().astype(np.float16) for p, t in zip(program.inputs, inputs, strict=True)}
    results = plan.run(feeds)
    for port, want in zip(program.outputs, gradients(function)(*[t.double() for t in inputs]), strict=True):
        have = results[port.name].astype(np.float64).reshape(want.shape)
        worst = np.abs(have - want.numpy()).max()
        assert worst <= 0.02 * max(1.0, float(want.abs().max())), (port.name, worst)


@pytest.mark.parametrize("chip", ["m1", "m4"])
def test_roots_are_not_off_one_way(chip: str) -> None:
    """The table alone is 1.5e-3 off, 3e-4 too large on average: of a norm's backward that leaves a few percent."""
    x = torch.cat((torch.linspace(0.25, 4.0, 4001), torch.tensor([6e-8, 1e-5, 1.0, 65504.0]))).half().float()
    program = legalize(lowered(torch.rsqrt, [x], dtype="fp16"), chip).lowered
    plan = prepare(program.program.main, EngineContext(get_chip(chip), "exact", 1))
    results = plan.run({program.inputs[0].name: x.numpy().astype(np.float16)})
    have = results[program.outputs[0].name].astype(np.float64)
    apart = have * np.sqrt(x.numpy().astype(np.float64)) - 1.0
    assert np.abs(apart).max() < 8e-4
    assert abs(apart.mean()) < 1.5e-4
