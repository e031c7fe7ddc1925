"""What fails in Dynamo, or in the backend, is an error of this package with the user's line; results are one's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.capture.trace.simplify import simplify

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


def _slope(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (slope - 1).square().mean()


def test_the_gradient_of_a_gradient_outside_of_what_is_compiled_is_refused_in_words() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    loss = _slope(torch.compile(net, backend="ane", options=SIM), torch.randn(5, 3))
    with pytest.raises(at.AneTrainerError, match=r"ANE303.*gradient of a gradient(.|\n)*compile_step"):
        loss.backward()


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="torch 2.13 keeps autograd.grad in graphs"
)
def test_the_gradient_of_a_gradient_within_is_pytorchs() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3).requires_grad_()
    _slope(net, x).backward()
    want = [p.grad for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    torch.compile(lambda x: _slope(net, x), backend="ane", options=SIM, fullgraph=True)(x).backward()
    for got, expected in zip((p.grad for p in net.parameters() if p.grad is not None), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-3)


def test_memory_that_nothing_wrote_to_is_no_value() -> None:
    class Filled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = super().forward(x)
            filled = torch.empty_like(h)
            filled[:, ::2], filled[:, 1::2] = h[:, ::2], -h[:, 1::2]
            return filled

    torch.manual_seed(0)
    layer, x = Filled(8, 4), torch.randn(16, 8)
    traced = torch.fx.GraphModule({}, torch.fx.Graph())
    node = traced.graph.call_function(torch.ops.aten.empty.memory_format, ([2, 3],), {"device": "cpu"})
    node.meta["val"] = torch.empty(2, 3, device="meta")
    traced.graph.output(node)
    simplify(traced.graph)
    traced.recompile()
    assert torch.equal(traced(), torch.zeros(2, 3))
    got = torch.compile(layer, backend="ane", options=SIM)(x)
    torch.testing.assert_close(got, layer(x), rtol=0.01, atol=0.01)


def test_a_parameter_that_an_update_made_nan_is_said_to_be_one() -> None:
    """The data are clean: the loss outside has no gradient below 0."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(8, 4)
    compiled = torch.compile(layer, backend="ane", options=SIM)
    out = compiled(x)
    torch.where(out > 0, out.sqrt(), 0.0).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert bool(layer.weight.isnan().any())
    with pytest.raises(
        at.AneTrainerError, match=r"a parameter of shape \(3, 4\).* which an update before wrote"
    ) as caught:
        compiled(x)
    assert caught.value.code == "DATA106"
