"""The replacements of torch functions give PyTorch's values and gradients, and nothing in them reads a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer.ane.capture.substitutes import RewriteMode
from tests.ane.lower.harness import captured, normal

INT = torch.tensor([2, 0, 3, 1, 3, 0])
TABLE = normal(7, 4)
BAGS = torch.tensor([[1, 2, 2], [0, 5, 6]])
LABELS = torch.tensor([[3, 0, -1, 1, 2], [-1, 2, 0, 1, 3], [1, 4, 2, 0, 3]])
SCORES = normal(3, 5, seed=1)

#: name -> (function of float and integer tensors, tensors)
CASES: dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {
    "one_hot": (lambda x, i: x[:6, :1] * F.one_hot(i, 5).to(x.dtype), [TABLE, INT]),
    "bag sum": (lambda w, i: F.embedding_bag(i, w, mode="sum"), [TABLE, BAGS]),
    "bag mean": (lambda w, i: F.embedding_bag(i, w, mode="mean"), [TABLE, BAGS]),
    "bag max": (lambda w, i: F.embedding_bag(i, w, mode="max"), [TABLE, BAGS]),
    "bag padded": (lambda w, i: F.embedding_bag(i, w, mode="mean", padding_idx=2), [TABLE, BAGS]),
    "bag padded max": (lambda w, i: F.embedding_bag(i, w, mode="max", padding_idx=-5), [TABLE, BAGS]),
    "bag of padding": (
        lambda w, i: F.embedding_bag(i, w, mode="mean", padding_idx=2), [TABLE, torch.full((2, 2), 2)],
    ),
    "bag weights": (
        lambda w, i, s: F.embedding_bag(i, w, mode="sum", per_sample_weights=s), [TABLE, BAGS, normal(2, 3)],
    ),
    "bag offsets": (lambda w, i, o: F.embedding_bag(i, w, o), [TABLE, INT, torch.tensor([0, 2, 2])]),
    "bag offsets max": (
        lambda w, i, o: F.embedding_bag(i, w, o, mode="max"), [TABLE, INT, torch.tensor([0, 2, 2])],
    ),
    "bag last offset": (
        lambda w, i, o: F.embedding_bag(i, w, o, include_last_offset=True), [TABLE, INT, torch.tensor([0, 4, 6])],
    ),
    "row by scalar": (lambda x, i: x[i[2]] + x[..., i[0]].mean() + x[i[1], i[3]] + x[None, i[4], 1:][0, 0],
                      [TABLE, INT]),
    "gaussian": (lambda x, v: F.gaussian_nll_loss(x, x.detach() + 1, v.abs(), full=True), [SCORES, normal(3, 5)]),
    "gaussian row": (lambda x, v: F.gaussian_nll_loss(x, x.detach() + 1, v, reduction="sum"),
                     [SCORES, normal(3).abs()]),
    "gaussian clamped": (lambda x, v: F.gaussian_nll_loss(x, x.detach() + 1e-4, v, eps=1e-3),
                         [SCORES, torch.full((3, 5), 1e-5).double()]),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, 0) + x.logcumsumexp(-1), [SCORES]),
    "multi margin": (lambda x, i: F.multi_margin_loss(x, i[:3]), [SCORES, INT]),
    "multi margin 2": (
        lambda x, i, w: F.multi_margin_loss(x, i[:3], p=2, margin=0.5, weight=w.detach(), reduction="none"),
        [SCORES, INT, normal(5).abs()],
    ),
    "multi margin one": (lambda x, i: F.multi_margin_loss(x[0], i[0], reduction="sum"), [SCORES, INT]),
    "multi label": (lambda x, i: F.multilabel_margin_loss(x, i), [SCORES, LABELS]),
    "multi label one": (lambda x, i: F.multilabel_margin_loss(x[0], i[0], reduction="none"), [SCORES, LABELS]),
    "normal": (lambda x: torch.distributions.Normal(x, x.exp()).log_prob(x.detach() + 1), [SCORES]),
    "categorical": (lambda x, i: torch.distributions.Categorical(logits=x).log_prob(i[:3]), [SCORES, INT]),
}  # fmt: skip


def both(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The value and its gradients with respect to the float tensors."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    value = function(*leaves)
    ramp = torch.arange(1.0, value.numel() + 1).reshape(value.shape).to(value.dtype)
    floats = [leaf for leaf in leaves if leaf.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, floats, ramp, allow_unused=True)]


@pytest.mark.parametrize("name", CASES)
def test_the_replacement_is_pytorchs_function(name: str) -> None:
    function, tensors = CASES[name]
    expected = both(function, tensors)
    with RewriteMode():
        found = both(function, tensors)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", CASES)
def test_no_value_is_read(name: str) -> None:
    function, tensors = CASES[name]
    graph = captured(function, [t.float() if t.is_floating_point() else t for t in tensors])
    assert len(graph.outputs) == 1


def test_a_sparse_embedding_has_a_dense_gradient() -> None:
    layer = nn.Embedding(7, 4, sparse=True)
    with RewriteMode():
        layer(INT).sum().backward()
    gradient: Any = layer.weight.grad
    assert not gradient.is_sparse
    torch.testing.assert_close(gradient, torch.bincount(INT, minlength=7).float()[:, None].expand(7, 4))
