"""Changes in place, through views and of views' bases, become pure operations with the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ane_trainer.ane.capture.rewrites.decompositions import decomposition_table
from ane_trainer.ane.capture.trace.sources import Place
from ane_trainer.ane.capture.trace.tracer import trace
from ane_trainer.ane.errors import UnsupportedModel

Tensor = torch.Tensor


def row(x: Tensor) -> Tensor:
    x = x.clone()
    x[1] += 2 * x[0]
    return x * x


def view_after_write_to_base(x: Tensor) -> Tensor:
    x = x.clone()
    column = x[:, 1]
    x.mul_(3)
    return column + x[0, 0]


def view_of_view(x: Tensor) -> Tensor:
    x = x.clone()
    part = x.t()[1:3]
    part[0].copy_(x[:, 0])
    return x.exp() + part.sum()


def siblings(x: Tensor) -> Tensor:
    x = x.clone()
    first, second = x.chunk(2, dim=1)
    first.sigmoid_()
    second.add_(first)
    return x


def strided(x: Tensor) -> Tensor:
    x = x.clone()
    x[::2, ::2] = 0.5
    x.view(-1)[3:7].zero_()
    x.diagonal().fill_(7)
    return x.unsqueeze(1).squeeze_(1).unsqueeze_(0)


def unbound(x: Tensor) -> Tensor:
    x = x.clone()
    a, _, c, _ = x.unbind(1)
    a.copy_(c)
    c += a
    return x


def gradient(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = leaf * 1
        y[:, 1:3] *= leaf[:, :2]
        torch.relu_(y[0])
        (result,) = torch.autograd.grad(y.square().sum(), leaf)
    return result


@pytest.mark.parametrize(
    "function", [row, view_after_write_to_base, view_of_view, siblings, strided, unbound, gradient]
)
def test_writes_become_values(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    graph = trace(lambda x: [function(x)], {"x": x}, decomposition_table())
    other = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(graph(other)[0], function(other))
    assert not any(
        getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in graph.graph.nodes
    )


def test_the_input_is_not_changed() -> None:
    x = torch.ones(3)
    trace(lambda x: [x.add_(1) * 2], {"x": x}, decomposition_table())
    assert torch.equal(x, torch.ones(3))


def test_constants_are_kept_as_they_were_at_capture() -> None:
    table = torch.arange(3.0)
    graph = trace(lambda x: [x + table], {"x": torch.ones(3)}, decomposition_table())
    table.zero_()
    assert torch.equal(graph(torch.ones(3))[0], torch.tensor([1.0, 2.0, 3.0]))


def test_branching_on_a_value_is_refused_and_on_a_constant_allowed() -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.where"):
        trace(lambda x: [x if x.sum() > 0 else -x], {"x": torch.ones(3)}, decomposition_table())
    graph = trace(lambda x: [x * float(torch.arange(4).sum())], {"x": torch.ones(3)}, decomposition_table())
    assert torch.equal(graph(torch.ones(3))[0], torch.full((3,), 6.0))


def test_all_values_that_are_read_are_reported_together() -> None:
    def function(x: torch.Tensor, mask_0: torch.Tensor) -> list[torch.Tensor]:
        if x.sum() > 0:
            x = x * 2
        if mask_0 < 0.1:
            x = x + 1
        return [torch.unique(x).sum() + float(x.max())]

    inputs = {"x": torch.ones(3), "mask_0": torch.zeros(())}
    with pytest.raises(UnsupportedModel) as caught:
        trace(function, inputs, decomposition_table())
    reasons = [finding.reason for finding in caught.value.findings]
    assert [reason.split()[0] for reason in reasons] == ["reads", "decides", "gives"]
    assert "LayerDrop" in reasons[1]


def test_an_error_after_a_value_was_read_names_the_value() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        if x.sum() > 0:
            raise ValueError("the example is not what the model takes")
        return [x]

    with pytest.raises(UnsupportedModel, match="reads a tensor's value"):
        trace(function, {"x": torch.ones(3)}, decomposition_table())
    with pytest.raises(ValueError, match="of another kind"):
        trace(_raising, {"x": torch.ones(3)}, decomposition_table())


def test_products_are_multiplied_only_where_their_numbers_decide() -> None:
    seen: list[Tensor] = []

    def function(x: Tensor) -> list[Tensor]:
        product = x @ x
        seen.append(product.detach())
        return [product + torch.eye(3) @ torch.ones(3, 3)]

    x = torch.full((3, 3), 2.0)
    graph = trace(function, {"x": x}, decomposition_table())
    assert [int(torch.count_nonzero(each)) for each in seen] == [0]
    torch.testing.assert_close(graph(x)[0], torch.full((3, 3), 13.0))

    def reading(x: Tensor) -> list[Tensor]:
        seen.append(x @ x)
        return [torch.linalg.cholesky(seen[-1])]  # zeros have none

    seen.clear()
    trace(reading, {"x": torch.eye(3)}, decomposition_table())
    assert [int(torch.count_nonzero(each)) for each in seen] == [0, 3]


def _raising(x: torch.Tensor) -> list[torch.Tensor]:
    raise ValueError("of another kind")


def test_numbers_of_an_update_share_their_memory_while_it_is_recorded() -> None:
    """An update makes tens of numbers of its parameter's size, which nothing reads."""
    places: list[int] = []

    def update(w: Tensor, g: Tensor) -> list[Tensor]:
        moment = w * 0.9 + g * 0.1
        change = torch.where(g > 0, moment, -moment) / (moment.abs().sqrt() + 1e-8)
        places.extend(x.data_ptr() for x in (moment, change))
        return [w - change, (g * g).mean(1)]

    w, g = torch.rand(2, 64, 128, generator=torch.Generator().manual_seed(0)) - 0.5
    place = Place()
    place.text = "optimizer Adam (w)"
    graph = trace(update, {"w": w, "g": g}, decomposition_table(), place)
    assert len(set(places)) == 1
    for own, expected in zip(graph(w, g), update(w, g), strict=True):
        assert torch.equal(own, expected)


def test_operations_on_0_and_minus_0_are_not_shared() -> None:
    x = torch.tensor([1.0, -2.0])
    traced = trace(lambda x: [x * 0.0, x * -0.0, x * 0.0], {"x": x}, decomposition_table())
    signs = [torch.signbit(value).tolist() for value in traced(x)]
    assert signs == [[False, True], [True, False], [False, True]]
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 2
