"""Integers in two numbers: tables that fp16's integers and codes do not reach, and indices that are sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ane_trainer import compile_step
from ane_trainer.ane.compiler.lower.indices.choose import MOST_ROWS
from ane_trainer.ane.errors import DataError, UnsupportedModel
from ane_trainer.ane.stages import PAIR
from tests.ane.compiler.lower.harness import lowered, normal
from tests.ane.reference import evaluate

ROWS = 40_000
IDS = torch.tensor([[0, 1, 1023, 1024], [2047, 2048, 39_999, 16_384], [1024, 7, 39_999, 12_345]])


def run_pairs(function: Callable[..., Any], inputs: Sequence[Tensor]) -> np.ndarray:
    """The only output of the fp16 program of `function`, in float64, with integers sent as the dispatch does."""
    program = lowered(function, [t.float() if t.is_floating_point() else t for t in inputs], "fp16")
    ports = {p.name: p for p in program.inputs}
    feeds = {}
    for number, tensor in enumerate(inputs):
        port = program.inputs[number]
        high = ports.get(f"{port.name}_high")
        assert (high is None) == tensor.is_floating_point()
        value = tensor.double().numpy().reshape(port.shape)
        feeds[port.name] = value if high is None else value % PAIR
        if high is not None:
            feeds[high.name] = np.floor(value / PAIR)
    (found,) = evaluate(program.program.main, feeds).values()
    return found


def table(columns: int = 2) -> Tensor:
    return normal(ROWS, columns)


def same(i: Tensor) -> Tensor:
    return (i.unsqueeze(2) == i.unsqueeze(1)).sum((1, 2))


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "look up": lambda w, i: F.embedding(i, w),
    "look up moved": lambda w, i: F.embedding(torch.cat([i.t()[1:3], i.t()[:1]]).unsqueeze(1), w),
    "look up padded": lambda w, i: F.embedding(F.pad(i, (1, 2), value=30_000), w),
    "look up chosen": lambda w, i: F.embedding(torch.where(i == 39_999, 31_000, i), w),
    "look up the sum": lambda w, i: F.embedding(i[:, :3] + torch.tensor([0, 1000, 0]), w),
    "look up the difference": lambda w, i: F.embedding(i[:, 2:] - 1023, w),
    "pick": lambda w, i: w[:, :1].t().expand(3, ROWS).gather(1, i[:, 1:2]),
    "equal": lambda w, i: F.embedding(i, w) * (i != 2048).unsqueeze(-1) + same(i)[:, None, None],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_large_tables_are_looked_up(name: str) -> None:
    weights = table()
    expected = CASES[name](weights, IDS)
    found = run_pairs(CASES[name], [weights, IDS])
    np.testing.assert_allclose(found.reshape(expected.shape), expected.numpy(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("padding", [-1, 39_999])
def test_the_gradient_reaches_the_rows(padding: int) -> None:
    def gradient(w: Tensor, i: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            rows = F.embedding(i, w, padding if padding >= 0 else None)
            return torch.autograd.grad((rows * rows).sum(), w)[0]

    weights = table()
    expected = gradient(weights, IDS)
    np.testing.assert_allclose(run_pairs(gradient, [weights, IDS]), expected.numpy(), rtol=2e-3, atol=1e-3)


def test_labels_of_many_classes() -> None:
    scores, labels = normal(3, ROWS), torch.tensor([39_999, -100, 16_385])
    expected = F.cross_entropy(scores, labels)
    found = run_pairs(lambda x, y: F.cross_entropy(x, y), [scores, labels])
    np.testing.assert_allclose(found, [float(expected)], rtol=2e-3)


def test_ops_without_a_rule_for_such_integers_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="needs integers below 2097152; these can reach"):
        lowered(
            lambda w, i: F.embedding((i * i.prod(1, True)) % 7, w),
            [table().float(), IDS],
            "fp16",
        )


class Fields(nn.Module):
    """Three features in one table, each behind the rows of the ones before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2_600, 1)
        self.register_buffer("starts", torch.tensor([0, 500, 600]))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(x + self.get_buffer("starts")).sum((1, 2))
        return found


def test_a_step_with_a_table_of_several_fields() -> None:
    torch.manual_seed(0)
    model, y = Fields(), torch.rand(4)
    starts = torch.tensor([0, 500, 600])
    x = torch.stack([torch.arange(4) * 160, torch.arange(4), torch.tensor([1, 1999, 1400, 1424])], 1)
    rows = torch.unique(x + starts)
    before = model.table.weight.detach().clone()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.mse_loss(model(x), y), model.table.weight)
    step = compile_step(model, "mse", torch.optim.SGD(model.parameters(), lr=0.5), (x, y), fidelity="fast")
    step(x, y)
    change = model.table.weight.detach() - before
    torch.testing.assert_close(change, -0.5 * gradient, rtol=0.01, atol=2e-3)
    assert bool((change[rows] != 0).all())
    with pytest.raises(DataError, match="needs integers from"):
        step(x + MOST_ROWS, y)


@pytest.mark.parametrize(
    "order",
    [
        lambda t: t.sort(1).values, lambda t: t.argsort(1), lambda t: t.max(1, keepdim=True).values,
        lambda t: t.aminmax(dim=1, keepdim=True).max,
    ],
)  # fmt: skip
def test_integers_that_fp16_rounds_are_ordered(order: Callable[[Tensor], Tensor]) -> None:
    """Two that round to one number, in a step; `test_arithmetic.py` has the operations."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(97, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(order(ids) % 97).mean(1)

    torch.manual_seed(0)
    model, ids, y = Net(), torch.tensor([[4097, 4096, 7], [4999, 4998, 1]]), torch.randn(2, 4)
    loss = float(F.mse_loss(model(ids), y).detach())
    step = compile_step(
        model, "mse", torch.optim.SGD(model.parameters(), 0.1), example=(ids, y), device="sim"
    )
    assert float(step(ids, y)) == pytest.approx(loss, rel=2e-3)


def test_small_computed_integers_look_up_a_large_table() -> None:
    """`ids // 64` of ids below 131,072 is below 2,048: a table of more rows than fp16 has integers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5_000, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids // 64).mean(1)

    torch.manual_seed(0)
    model, ids, y = Net(), torch.randint(0, 20_000, (4, 3)), torch.randn(4, 4)
    step = compile_step(
        model, "mse", torch.optim.SGD(model.parameters(), 0.1), example=(ids, y), device="sim"
    )
    step(ids, y)
    assert step.agreement is not None
    assert step.agreement.agrees


LONG = 2_100
PLACED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "max": lambda z: torch.max(z, 1),
    "min": lambda z: torch.min(z, 1),
    "topk": lambda z: torch.topk(z, 3, 1),
    "least": lambda z: torch.topk(z, 2, 1, largest=False),
    "kthvalue": lambda z: torch.kthvalue(z, 2, 1),
}


@pytest.mark.parametrize("name", PLACED)
def test_places_along_a_long_axis_look_rows_up(name: str) -> None:
    """Values, and their places beyond 2048, forward and backward."""
    w = normal(LONG)
    z = torch.stack([torch.arange(LONG) * step % LONG / LONG for step in (1, 11)]).double()
    z[0, 2_090], z[0, 2_095], z[0, 2_098], z[1, 2_060] = 1.5, 1.25, -3.0, -65504.0

    def picked(z: Tensor, w: Tensor) -> Tensor:
        values, places = PLACED[name](z)
        return values * 8 + w[places]

    np.testing.assert_allclose(run_pairs(picked, [z, w]).squeeze(), picked(z, w), rtol=2e-3)


class Columns(nn.Module):
    """A batch of floats whose first column are numbers of rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(rows, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.table(x[:, 0].long()) + self.linear(x[:, 1:])).sum(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("rows", [100, 50_000])
def test_floats_become_the_integers_that_they_are(rows: int) -> None:
    torch.manual_seed(0)
    model, y = Columns(rows), torch.rand(4)
    ids = torch.tensor([[rows - 1], [rows // 2 + 0.5], [-0.99], [3.0]])
    x = torch.cat([ids, torch.randn(4, 3)], 1)
    loss = float(F.mse_loss(model(x), y).detach())
    step = compile_step(model, "mse", torch.optim.SGD(model.parameters(), lr=0.5), (x, y), fidelity="fast")
    assert float(step(x, y)) == pytest.approx(loss, rel=5e-3)
    assert step.agreement is not None
    assert step.agreement.agrees
    compiled = torch.compile(Columns(rows), backend="ane", options={"device": "sim"})
    torch.testing.assert_close(compiled(x).detach(), compiled._orig_mod(x).detach(), rtol=5e-3, atol=5e-3)
