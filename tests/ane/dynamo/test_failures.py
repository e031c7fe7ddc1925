"""What fails in Dynamo, or in the backend, is an error of this package with the user's line; results are one's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ane_trainer as at

SIM = {"device": "sim"}

Function = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x @ torch.ones(3, 3), "same reduction dim"),
        (lambda x: x.view(7, 7), "invalid for input"),
        (lambda x: x[:, 9], "out of bounds"),
        (lambda x: torch.ones(2, dtype=torch.long) @ x, "dtype"),
    ],
)
def test_a_fault_of_the_users_is_named_with_its_line(function: Function, words: str) -> None:
    fast = torch.compile(function, backend="ane", options=SIM)
    with pytest.raises(at.AneTrainerError, match=rf"ANE303.*\n?.*test_failures.py:\d+.*{words}"):
        fast(torch.randn(2, 2))


@pytest.mark.parametrize("options", [{"device": "sim", "chip": "m99"}, {"device": "sim", "chipp": "m4"}])
def test_wrong_options_are_errors_of_this_package(options: dict[str, object]) -> None:
    with pytest.raises(at.AneTrainerError, match="ANE100"):
        torch.compile(nn.Linear(2, 2), backend="ane", options=options)(torch.randn(1, 2))
    assert torch.compile(nn.Linear(2, 2), backend="ane", options=SIM)(torch.randn(1, 2)).shape == (1, 2)


@pytest.mark.parametrize(
    "function", [lambda x: x.clone(), lambda x: x + 0, lambda x: x.t().contiguous().t(), lambda x: x * 1]
)
def test_a_copy_is_not_the_input(function: Function) -> None:
    x = torch.randn(3, 4)
    got = torch.compile(function, backend="ane", options=SIM)(x)
    assert got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_a_copy_is_changed_in_place_after_a_break() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        h = x.clone()
        torch._dynamo.graph_break()
        h += 1
        return h

    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="cut the model"):
        got = torch.compile(lambda x: function(layer(x)), backend="ane", options=SIM)(x)
    got.sum().backward()
    torch.testing.assert_close(got, layer(x) + 1, rtol=0.01, atol=0.01)


def test_a_break_within_the_one_graph_that_was_asked_for_is_an_error_of_this_package() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    fast = torch.compile(function, backend="ane", fullgraph=True, options=SIM)
    with pytest.raises(at.AneTrainerError, match=r"ANE301.*\n?.*test_failures.py:\d+: fullgraph=True"):
        fast(torch.randn(2, 2))
