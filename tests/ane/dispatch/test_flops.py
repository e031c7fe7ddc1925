"""Every floating-point operation of a training step is in the program: PyTorch's own counter is the witness."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ane_trainer as at
from ane_trainer.ane.chips.counting import macs


def eager_matrix_flops(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """FLOPs of matrix products and convolutions in one forward and backward of plain PyTorch."""
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(x), y).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_program_holds_the_matrix_work_of_the_whole_step(name: str) -> None:
    torch.manual_seed(0)
    model = at.build_model(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.randn(4, 1, 28, 28), torch.randint(0, 10, (4,))
    with at.compile_step(model, "cross_entropy", optimizer, example=(x, y)) as step:
        in_program = 2 * sum(macs(op) for op in step.program.main.ops)
        assert in_program == eager_matrix_flops(model, x, y)
        assert step.engine_flop_fraction == 1.0
        assert step.dispatches_per_step == step.compiles == 1
