"""Batches and buffers that are sparse or in other precisions: made dense, in single precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at


class Graph(nn.Linear):
    """One layer of a graph network."""

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        between = self.get_buffer("adjacency") if adjacency is None else adjacency
        return torch.spmm(between, super().forward(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("given", [True, False])
def test_sparse_inputs_and_buffers(layout: torch.layout, given: bool) -> None:
    torch.manual_seed(0)
    model, dense = Graph(5, 3), torch.eye(6) + 0.25 * torch.ones(6, 6).tril()
    twin, x, y = copy.deepcopy(model), torch.randn(6, 5), torch.randn(6, 3)
    sparse = dense.to_sparse(layout=layout)
    if not given:
        model.register_buffer("adjacency", sparse)
    inputs = (x, sparse) if given else x
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = at.compile_step(model, "mse", optimizer, (inputs, y), fidelity="fast")
    loss = F.mse_loss(twin(x, dense), y)
    loss.backward()
    torch.testing.assert_close(step(inputs, y), loss.detach(), rtol=3e-3, atol=0)
    step.sync()
    assert twin.weight.grad is not None
    torch.testing.assert_close(model.weight, twin.weight - 0.1 * twin.weight.grad, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_in_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(dtype)
    twin = copy.deepcopy(model).float()
    x, y = torch.randn(16, 8).to(dtype), torch.randint(0, 3, (16,))
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.5), (x, y), fidelity="fast"
    )
    loss = F.cross_entropy(twin(x.float()), y)
    loss.backward()
    torch.testing.assert_close(step(x, y), loss.detach(), rtol=5e-3, atol=0)
    step.sync()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), theirs - 0.5 * theirs.grad, rtol=0.02, atol=5e-3)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert isinstance(twin[1], nn.BatchNorm1d)
    torch.testing.assert_close(model[1].running_mean.float(), twin[1].running_mean, rtol=0.02, atol=5e-3)
    model.eval()
    forward = at.compile_forward(model, x)
    torch.testing.assert_close(forward(x).float(), model.float()(x.float()).detach(), rtol=0.02, atol=0.02)
