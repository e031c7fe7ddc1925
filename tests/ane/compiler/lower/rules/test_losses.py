"""Losses and look-ups by index: value and gradient against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.ane.compiler.lower.harness import check, gradients, normal

LABELS = torch.tensor([1, 0, 3, 2, 3, -100])

CROSS_ENTROPY: list[dict[str, Any]] = [
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3}, {"label_smoothing": 0.1},
    {"weight": True}, {"weight": True, "ignore_index": 0, "label_smoothing": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("options", CROSS_ENTROPY)
def test_cross_entropy(options: dict[str, Any]) -> None:
    """Labels of -100 are ignored as torch does, also with a mean over the others."""
    labels = LABELS[:5] if "ignore_index" in options else LABELS

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        given = dict(options)
        if given.get("weight"):
            given["weight"] = torch.arange(1, 5).to(x.dtype)
        return F.cross_entropy(x, y, **given)

    check(gradients(loss), [normal(len(labels), 4), labels], atol=1e-5)


def test_cross_entropy_of_images_and_soft_targets() -> None:
    labels = torch.randint(0, 4, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    check(gradients(F.cross_entropy), [normal(2, 4, 3, 3), labels])
    soft = gradients(lambda x, t: F.cross_entropy(x, t.softmax(1)), of=(0,))
    check(soft, [normal(5, 4), normal(5, 4, seed=1)])


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss,
    "bce_logits": lambda x, t: F.binary_cross_entropy_with_logits(x, t.sigmoid()),
    "bce": lambda x, t: F.binary_cross_entropy(x.sigmoid(), t.sigmoid()),
    "kl": lambda x, t: F.kl_div(x.log_softmax(1), t.softmax(1), reduction="batchmean"),
    "cosine": lambda x, t: F.cosine_similarity(x, t).mean(),
    "triplet": lambda x, t: F.triplet_margin_loss(x, t, x * t),
    "hinge": lambda x, t: F.margin_ranking_loss(x, t, (x * t).sign().detach()),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str) -> None:
    check(gradients(LOSSES[name]), [normal(5, 4), normal(5, 4, seed=1)], rtol=1e-5)


def test_embedding_with_padding() -> None:
    index = torch.tensor([[1, 2, 3], [6, 1, 0]])
    check(gradients(lambda w, i: F.embedding(i, w, padding_idx=1)), [normal(7, 5), index])


def test_two_indices_as_in_policy_losses() -> None:
    picks = gradients(lambda x, i: x[torch.arange(4), i])
    check(picks, [normal(4, 6), torch.tensor([3, 0, 5, 5])])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gather_and_scatter_add(dim: int) -> None:
    index = torch.randint(0, 2, (2, 2, 2), generator=torch.Generator().manual_seed(dim))
    check(gradients(lambda x, i: x.gather(dim, i)), [normal(2, 3, 4), index])
    check(lambda x, s, i: x.scatter_add(dim, i, s), [normal(2, 3, 4), normal(2, 3, 4, seed=1), index])


def test_of_several_writes_the_last_wins() -> None:
    index = torch.tensor([2, 0, 2, 2])
    check(lambda x, s, i: x.index_put((i,), s), [normal(4, 3), normal(4, 3, seed=1), index])
    check(lambda x, s, i: x.scatter(0, i, s), [normal(4), normal(4, seed=1), index])


def test_integers_that_are_computed_are_exact_beyond_2048_classes() -> None:
    labels = torch.tensor([2046, 2047, 2094])
    check(lambda x, y: F.cross_entropy(x, y + 5), [normal(3, 2100), labels])
