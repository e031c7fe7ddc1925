"""Integers above 2048: sent as codes where they are only looked up, refused where they are computed with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.compiler.lower.indices.choose import MOST_ROWS
from ane_trainer.ane.compiler.lower.indices.codes import coded, most_rows
from ane_trainer.ane.errors import DataError, UnsupportedModel
from tests.ane.compiler.lower.harness import lowered


def test_codes_are_distinct_fp16_numbers_and_their_differences_normal() -> None:
    codes = coded(torch.arange(most_rows("fp16")))
    assert torch.equal(codes, codes.half().double())
    ordered = codes.sort().values
    assert float(ordered.diff().min()) >= 2.0**-14
    assert torch.equal(codes[:2049], torch.arange(2049).double())
    assert torch.equal(coded(torch.tensor([-100, -1])), torch.tensor([-100.0, -1.0]).double())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(3000, 4, padding_idx=2500), nn.Linear(4, 2500)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids[:, :-1]).flatten(0, 1))


def test_a_language_models_step_with_3000_words() -> None:
    torch.manual_seed(0)
    model = Words()
    twin = copy.deepcopy(model)
    ids = torch.tensor([[5, 2999, 2049, 2500, 7], [2048, 2050, 1, 2401, 0]])
    labels = torch.tensor([[2499, 2050, -100, 0], [2048, 2049, 2051, 3]])

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target.flatten())

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = at.compile_step(model, loss, optimizer, (ids, labels), fidelity="fast")
    assert {p.name for p in step.compiled.inputs if p.index_encoding == "coded"} == {"x", "y"}
    value = step(ids, labels)
    expected = loss(twin(ids), labels)
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=2e-3, atol=0)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        wanted = theirs.detach() - theirs.grad
        assert float((mine.detach() - wanted).norm() / theirs.grad.norm()) < 5e-3


def test_integers_that_are_computed_with_take_two_numbers_and_those_that_are_compared_do_not() -> None:
    table, ids = torch.zeros(3000, 2), torch.zeros(4, dtype=torch.long)
    for function, encoding in ((lambda i: i != 0, "coded"), (lambda i: i * 2, "split")):
        program = lowered(lambda w, i: F.embedding(i, w) * function(i).unsqueeze(1), [table, ids], "fp16")  # noqa: B023
        assert program.inputs[1].index_encoding == encoding


def test_the_longest_table() -> None:
    """With codes up to `most_rows`; longer ones take two numbers for an integer (`test_pairs.py`)."""
    ids = torch.zeros(4, dtype=torch.long)
    for rows, ports in ((most_rows("fp16"), 2), (most_rows("fp16") + 1, 3)):
        program = lowered(lambda w, i: F.embedding(i, w), [torch.zeros(rows, 2), ids], "fp16")
        assert len(program.inputs) == ports
    with pytest.raises(UnsupportedModel, match=f"at most {MOST_ROWS} rows"):
        lowered(lambda w, i: F.embedding(i, w), [torch.zeros(MOST_ROWS + 1, 1), ids], "fp16")


def test_data_beyond_the_codes_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(3000, 4), nn.Flatten(), nn.Linear(8, 2))
    ids, y = torch.tensor([[1, 2999]]), torch.tensor([1])
    step = at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), (ids, y))
    step(ids, y)
    with pytest.raises(DataError, match="needs row numbers of a table, 0 to 2999"):
        step(torch.tensor([[1, most_rows("fp16")]]), y)


def test_a_tensor_of_the_same_shape_is_no_arithmetic() -> None:
    table, ids = torch.zeros(3000, 2), torch.zeros(4, dtype=torch.long)
    lowered(lambda w, i: F.embedding(i, w) + torch.ones_like(i).unsqueeze(1), [table, ids], "fp16")
