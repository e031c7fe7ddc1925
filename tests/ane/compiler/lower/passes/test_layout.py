"""Transposes move past `select` without making it broadcast, which coremltools' `select` does not."""

from __future__ import annotations

import torch
from torch import nn

from ane_trainer import compile_step


def test_select_keeps_operands_of_one_shape() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 4, (8,))
    model(x)
    step = compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), (x, y))
    selects = [op for op in step.program.main.ops if op.kind == "select"]
    assert len(selects) > 4
    for op in selects:
        shape = op.result.type.shape
        operands = [op.arg(name).type for name in ("cond", "a", "b")]
        assert all(t.size == 1 or t.shape == shape for t in operands), op
