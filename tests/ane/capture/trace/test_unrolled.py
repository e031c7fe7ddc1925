"""Recurrent steps written out: what is read through writes, and products of many steps as one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ane_trainer.ane.capture.range.running import InOrder
from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.trace.tracer import trace

Tensor = torch.Tensor


def kinds(graph: torch.fx.GraphModule) -> list[str]:
    return [
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in graph.graph.nodes
        if node.op == "call_function"
    ]


def gates(x: Tensor) -> Tensor:
    """As an LSTM writes them."""
    first, second, third = x.clone().chunk(3, 1)
    first.sigmoid_()
    third.tanh_()
    return first * second + third


def part_of_a_part(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:5] = x[:, 5:9].exp()
    return x[:, 2:4] + x[:, 6:8] + x[:, -3:-1]


def across_a_border(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:5] = x[:, 5:9].exp()
    return x[:, 4:6]


@pytest.mark.parametrize(("function", "writes"), [(gates, 0), (part_of_a_part, 0), (across_a_border, 1)])
def test_parts_are_read_from_what_was_written(function: Callable[[Tensor], Tensor], writes: int) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    graph = trace(lambda x: [function(x)], {"x": x}, decomposition_table())
    assert torch.equal(graph(x)[0], function(x))
    assert kinds(graph).count("slice_scatter") == writes


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_weights_of_many_steps_get_their_gradient_from_one_product(kind: type[nn.RNNBase]) -> None:
    steps = 6
    torch.manual_seed(0)
    model = kind(8, 24, batch_first=True)
    x, names = torch.randn(2, steps, 8), [name for name, _ in model.named_parameters()]

    def gradients(x: Tensor, *weights: Tensor) -> list[Tensor]:
        own = [w.detach().requires_grad_() for w in weights]
        with torch.enable_grad():
            out = torch.func.functional_call(model, dict(zip(names, own, strict=True)), (x,))[0]
            return list(torch.autograd.grad(out.square().sum(), own))

    inputs = {"x": x, **{name: p.detach() for name, p in model.named_parameters()}}
    graph = trace(gradients, inputs, decomposition_table())
    for one, other in zip(InOrder(graph).run(*inputs.values()), gradients(*inputs.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # each step's product with the weight, forward and back; those of the input and of both gradients at once
    assert sum(name in ("mm", "addmm") for name in kinds(graph)) <= 2 * steps + 4


def test_steps_of_other_sizes_and_small_weights_stay_as_they_are() -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        whole = [a[i : i + 9].T @ b[i : i + 9] for i in range(6)]
        uneven = [a[: i + 1].T @ b[: i + 1] for i in range(6)]
        return [sum(whole[1:], whole[0]), sum(uneven[1:], uneven[0])]

    inputs = {"a": torch.randn(20, 8), "b": torch.randn(20, 8)}
    graph = trace(function, inputs, decomposition_table())
    assert kinds(graph).count("mm") == 12
    for one, other in zip(graph(*inputs.values()), function(*inputs.values()), strict=True):
        torch.testing.assert_close(one, other)
