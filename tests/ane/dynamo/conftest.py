"""Every test of this folder starts without what torch.compile, or its backend here, keeps from earlier ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ane_trainer.ane import dynamo


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo.reset()
    yield
    torch._dynamo.reset()
