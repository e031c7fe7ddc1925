"""Reads of a tensor's memory while a step is traced are refused: the first batch's numbers would stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import ane_trainer as at

READS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "numpy()": lambda x: torch.from_numpy(x.detach().numpy() * 2),
    "numpy.asarray()": lambda x: torch.as_tensor(np.asarray(x.detach()) * 2),
    "tolist()": lambda x: torch.tensor(x.tolist()) * 2,
    "from_dlpack()": lambda x: torch.from_dlpack(np.from_dlpack(x.detach()) * 2.0),
}


class Reader(nn.Module):
    def __init__(self, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.head, self.read = nn.Linear(8, 3), read
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.read(x)) * torch.ones(3).numpy().tolist()[0]


@pytest.mark.parametrize("name", READS)
def test_a_read_of_the_batch_is_refused_by_line(name: str) -> None:
    model, batch = Reader(READS[name]), (torch.randn(4, 8), torch.randint(0, 3, (4,)))
    with pytest.raises(at.AneTrainerError, match=r"test_memory_reads.py:\d+") as caught:
        at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), example=batch)
    assert f"{name}: takes a tensor's numbers out" in str(caught.value)


def test_what_is_known_may_be_read() -> None:
    model, batch = Reader(lambda x: x), (torch.randn(4, 8), torch.randint(0, 3, (4,)))
    step = at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), example=batch)
    assert float(step(*batch)) > 0
