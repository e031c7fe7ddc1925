"""Picks by index tensors and masks on any axes, and strided views of memory, against torch in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import check, gradients, lowered, normal

ROWS, COLUMNS = torch.tensor([0, 2, 2]), torch.tensor([1, 2, 0])
MASK = torch.tensor([[True, False, True], [False, True, True], [False, False, False], [True, True, False]])
PICKS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "axes apart": lambda x, i, j: x[i, :, j],
    "axes apart, not from the first": lambda x, i, j: x[:, i, :, j - j],
    "neighbours behind an axis": lambda x, i, j: x[:, i, j],
    "constant axes apart": lambda x, i, j: x[ROWS, :, COLUMNS],
    "constant mask": lambda x, i, j: x[MASK],
    "constant mask and a number": lambda x, i, j: x[MASK, ..., 1],
    "constant mask of one axis": lambda x, i, j: x[:, MASK[0]],
    "masked rows of the loss": lambda x, i, j: x[MASK[:, 0]].mean(0),
}


@pytest.mark.parametrize("name", PICKS)
def test_picks_and_their_gradients(name: str) -> None:
    check(gradients(PICKS[name], of=[0]), [normal(4, 3, 3, 2), ROWS, COLUMNS])


def test_writes() -> None:
    def write(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        x = x * 1
        x[i, :, j] = x[0, 0, 0].clone()
        x[:, i, j] += 1
        x[MASK] = x[MASK] * 2
        return x

    check(write, [normal(4, 3, 3, 2), ROWS, COLUMNS])


def test_a_computed_mask_selects_what_is_summed_and_is_refused_where_the_number_counts() -> None:
    check(lambda x: x[x > 0].sum(), [normal(3, 4)])
    check(lambda x: torch.masked_select(x, x > 0).sum(), [normal(3, 4)])
    check(lambda x: x[torch.nonzero(x[:, 0] > 0)[:, 0]].sum(), [normal(3, 4)])
    with pytest.raises(UnsupportedModel, match=r"shape that depends on data\. Keep the shape: torch\.where"):
        lowered(lambda x: torch.cumsum(x[x > 0], 0).sum(), [torch.randn(4)])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "diagonal": lambda x: torch.as_strided(x * 2, (6,), (7,)),
    "every other": lambda x: torch.as_strided(x * 2, (3, 2), (12, 2), 1),
    "transposed": lambda x: torch.as_strided(x * 2, (2, 3), (2, 12), 1),
    "of a transposed tensor": lambda x: torch.as_strided((x * 2).t(), (2, 3), (2, 12), 1),
    "of a part": lambda x: torch.as_strided((x * 2)[2:], (2, 3), (2, 6), 13),
    "windows": lambda x: torch.as_strided(x * 2, (6, 3, 3), (6, 1, 1)),
    "windows of a row": lambda x: torch.as_strided((x * 2).flatten(), (5, 8), (5, 1)),
    "written": lambda x: torch.as_strided_scatter(x * 2, x[:2, :3], (2, 3), (2, 12), 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_views(name: str) -> None:
    check(VIEWS[name], [normal(6, 6)])


def test_gradients_through_writes_to_views() -> None:
    """Autograd writes these gradients through strided views, also of tensors that are permuted in memory."""

    def diagonal(x: Tensor) -> Tensor:
        x = x * 1
        on = torch.diagonal(x).add_(-1).pow_(2).sum()
        return on + x.flatten()[:-1].view(5, 7)[:, 1:].flatten().pow_(2).sum()

    def permuted(x: Tensor) -> Tensor:
        x = x.view(2, 6, 3).permute(0, 2, 1) + 1
        x[:, 0] = 2 * x[:, 0].clone()
        return (x.permute(2, 0, 1) ** 2).sum()

    check(gradients(diagonal), [normal(6, 6)])
    check(gradients(permuted), [normal(6, 6)])


@pytest.mark.parametrize(("size", "stride"), [((3, 3), (1, 2)), ((3, 3, 3), (1, 1, 1))])
def test_other_overlapping_views_are_refused(size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedModel, match="show each element once"):
        lowered(lambda x: torch.as_strided(x * 2, size, stride), [torch.zeros(8)])


def test_out_arguments() -> None:
    check(lambda x: torch.mul(x, 2, out=torch.empty(6, 6, dtype=x.dtype)) + x, [normal(6, 6)])
    check(
        lambda x: torch.nn.functional.normalize(x, dim=0, out=torch.zeros(6, 6, dtype=x.dtype)),
        [normal(6, 6)],
    )
