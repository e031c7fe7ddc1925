"""Reductions over groups and look-ups of whole lines, as graph networks write them, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ane.compiler.lower.harness import check, gradients, normal

GROUPS = torch.tensor([0, 2, 2, 0, 1, 4])


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin", "prod"])
def test_scatter_reduce(reduce: str, include_self: bool) -> None:
    """Group 3 is empty; two edges tie for group 2."""

    def layer(x: torch.Tensor, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        index = index.view(-1, 1).expand_as(source)
        return x.scatter_reduce(0, index, source, reduce, include_self=include_self)

    source = normal(6, 3, seed=1)
    source[1] = source[2]
    check(gradients(layer), [normal(5, 3), source, GROUPS])


@pytest.mark.filterwarnings("ignore:index_reduce")  # torch: "in beta"
@pytest.mark.parametrize("reduce", ["mean", "amax"])
def test_index_reduce(reduce: str) -> None:
    check(lambda x, s, i: x.index_reduce(1, i, s, reduce), [normal(2, 5), normal(2, 6, seed=1), GROUPS])


def test_whole_lines_need_one_row_of_comparisons() -> None:
    """`gather` and `scatter_add` by an index that is repeated along the features: no one-hot per feature."""

    def layer(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        picked = x.gather(1, index.unsqueeze(-1).repeat(1, 1, 7))
        return torch.zeros_like(x).scatter_add(1, index.unsqueeze(-1).expand(-1, -1, 7), picked * picked)

    program = check(gradients(layer), [normal(2, 4, 7), torch.tensor([[3, 0, 3], [1, 1, 2]])])
    equal = [op for op in program.program.main.ops if op.kind == "equal"]
    assert equal
    assert {op.results[0].type.shape for op in equal} == {(2, 3, 4)}
