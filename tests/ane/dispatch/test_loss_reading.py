"""What a cross entropy reads: the engine's logarithm and one fp16 number. Gradients see neither."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.simulator.numbers.tables import evaluate


@pytest.mark.parametrize("classes", [10, 316])
def test_a_cross_entropy_is_off_by_the_engine_s_logarithm_and_one_rounding(classes: int) -> None:
    """docs/accuracy.md: the offset is there before the first step, and no update has a part in it."""
    torch.manual_seed(0)
    model = nn.Linear(32, classes)
    x, y = torch.randn(64, 32), torch.randint(0, classes, (64,))
    plain = copy.deepcopy(model)
    scores = model(x).detach().double()
    exact = F.cross_entropy(scores, y).item()
    most = scores.max(1, keepdim=True).values
    totals = (scores - most).exp().sum(1).half().double()
    table = torch.from_numpy(np.asarray(evaluate("log", totals.numpy()), np.float64))
    logarithm = float((table - totals.log()).mean())
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), (x, y), device="sim"
    )
    offset = float(step(x, y).detach()) - exact
    spacing = float(np.spacing(np.float16(exact)))
    assert 0 < logarithm < 5e-4 * exact  # fp16(ln 2) is 0.0003 too large; the rest is the table's rounding
    assert abs(offset - logarithm) < spacing
    step.sync()
    F.cross_entropy(plain(x), y).backward()
    assert plain.weight.grad is not None
    update, wanted = model.weight.detach() - plain.weight.detach(), -0.1 * plain.weight.grad
    assert torch.linalg.norm(update - wanted) < 3e-3 * torch.linalg.norm(wanted)
