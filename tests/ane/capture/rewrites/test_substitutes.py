"""The replacements of torch functions give PyTorch's values and gradients, and nothing in them reads a value."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ane_trainer as at
from ane_trainer.ane.capture.rewrites.substitutes import rewriting
from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import captured, normal

INT = torch.tensor([2, 0, 3, 1, 3, 0])
TABLE = normal(7, 4)
BAGS = torch.tensor([[1, 2, 2], [0, 5, 6]])
LABELS = torch.tensor([[3, 0, -1, 1, 2], [-1, 2, 0, 1, 3], [1, 4, 2, 0, 3]])
SCORES = normal(3, 5, seed=1)
FRAMES, COUNTS = normal(7, 3, 5, seed=2), torch.tensor([2, 0, 3])
distributions: Any = torch.distributions
TARGETS = torch.tensor([[3, 3, 1], [2, 1, 4], [1, 4, 2]])
ctc_loss: Any = F.ctc_loss

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
    "soft margin": (lambda x: F.soft_margin_loss(x, x.detach().sign(), reduction="sum"), [SCORES]),
    "multi label": (lambda x, i: F.multilabel_margin_loss(x, i), [SCORES, LABELS]),
    "multi label one": (lambda x, i: F.multilabel_margin_loss(x[0], i[0], reduction="none"), [SCORES, LABELS]),
    "normal": (lambda x: distributions.Normal(x, x.exp()).log_prob(x.detach() + 1), [SCORES]),
    "categorical": (lambda x, i: distributions.Categorical(logits=x).log_prob(i[:3]), [SCORES, INT]),
    "cross entropy of a sigmoid": (
        lambda x: F.binary_cross_entropy(torch.sigmoid(x).flatten(), (x.detach() > 0).to(x.dtype).flatten()),
        [SCORES],
    ),
    "cross entropy of a changed sigmoid": (
        lambda x: (
            F.binary_cross_entropy(torch.sigmoid(x.detach()).mul_(0.5), (x.detach() > 0).to(x.dtype)) * x.sum()
        ),
        [SCORES],
    ),
    "log of a softmax": (lambda x: x.softmax(1).log() + torch.log(F.softmax(x, dim=0, dtype=x.dtype)), [SCORES]),
    "log of a sigmoid": (lambda x: torch.log(x.sigmoid()), [SCORES]),
    "ctc": (lambda x, t, c: ctc_loss(x.log_softmax(2), t, torch.tensor([7, 5, 7]), c), [FRAMES, TARGETS, COUNTS]),
    "ctc with impossible rows": (
        lambda x, t, c: ctc_loss(x.log_softmax(2)[:3], t % 4, torch.tensor([3, 3, 3]), c, 4, "none", True),
        [FRAMES, TARGETS, torch.tensor([3, 1, 3])],
    ),
    "ctc of one row": (
        lambda x, t, c: ctc_loss(x[:, 0].log_softmax(1), t[0, :2], c[:1] + 4, c[:1], reduction="sum"),
        [FRAMES, TARGETS, COUNTS],
    ),
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
    with rewriting():
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
    with rewriting():
        layer(INT).sum().backward()
    gradient: Any = layer.weight.grad
    assert not gradient.is_sparse
    torch.testing.assert_close(gradient, torch.bincount(INT, minlength=7).float()[:, None].expand(7, 4))


def test_a_saturated_sigmoid_costs_what_it_does_in_fp32() -> None:
    """fp32 rounds sigmoid(20) to 1, whose binary cross entropy with 0 is clamped at 100."""
    x = torch.full((1,), 20.0)
    assert float(F.binary_cross_entropy(torch.sigmoid(x), torch.zeros(1))) == 100.0
    with rewriting():
        assert float(F.binary_cross_entropy(torch.sigmoid(x), torch.zeros(1))) == 100.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_run_once(reentrant: bool) -> None:
    calls: list[int] = []

    def part(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * x

    x = torch.ones(2, requires_grad=True)
    with rewriting():
        checkpoint(part, x, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 1
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]


def test_concatenated_targets_are_refused() -> None:
    with rewriting(), pytest.raises(UnsupportedModel, match="needs padded targets"):
        ctc_loss(FRAMES.log_softmax(2), torch.ones(5, dtype=torch.int64), (7, 7, 7), (2, 1, 2))


PLACES: dict[str, Callable[[torch.Tensor], object]] = {
    "first axis": lambda i: i,
    "last axis": lambda i: (..., i),
    "between": lambda i: (slice(1, 3), i, slice(None, 2)),
    "behind a number": lambda i: (1, i),
    "with a new axis": lambda i: (None, slice(None), i),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", [2, -1])
def test_writing_at_a_place_reads_no_value(name: str, value: int) -> None:
    torch.manual_seed(0)
    mine, place = torch.randn(4, 4, 4), torch.tensor(value)
    theirs, index = mine.clone(), PLACES[name](place)
    given = torch.randn(theirs[index].shape)  # type: ignore[index]
    theirs[index] = given  # type: ignore[index]
    with rewriting():
        mine[index] = given  # type: ignore[index]
    assert torch.equal(mine, theirs)
    with rewriting():
        mine[index] = 3.0  # type: ignore[index]
    assert bool((mine[index] == 3.0).all())  # type: ignore[index]


class Remembering(nn.Module):
    """Writes where the batch says, and where a counter does (there, Dynamo reads the value itself)."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.layer, self.counts = nn.Linear(3, 2), counts
        self.register_buffer("memory", torch.zeros(4, 2))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        if self.counts:
            self.memory[self.steps % 4] = h.detach().mean(0)
        self.memory[place] = h.detach().amax(0)
        self.steps += 1
        return h + self.memory.sum(0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("door", ["compile_step", "torch.compile"])
def test_memories_are_written_at_places(door: str) -> None:
    torch.manual_seed(0)
    model = Remembering(door == "compile_step")
    twin, y = copy.deepcopy(model), torch.zeros(5, 2)
    batches = [(torch.randn(5, 3), torch.tensor(i * 3 % 4)) for i in range(5)]
    if door == "compile_step":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = at.compile_step(model, "mse", optimizer, (batches[0], y), device="sim")
        found = [float(step(batch, y)) for batch in batches]
        step.sync()
    else:
        fast = torch.compile(model, backend="ane", options={"device": "sim"})
        found = [float(F.mse_loss(fast(*batch), y).detach()) for batch in batches]
    assert found == pytest.approx([float(F.mse_loss(twin(*b), y).detach()) for b in batches], rel=0.01)
    torch.testing.assert_close(model.memory, twin.memory, rtol=5e-3, atol=5e-3)
