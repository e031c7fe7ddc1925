"""Boolean masks that the step computes, where nothing needs the number of selected rows: as PyTorch, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.errors import UnsupportedModel

Layer = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Linear):
    def __init__(self, layer: Layer) -> None:
        super().__init__(5, 3)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(super().forward(x))


def both_sides(h: Tensor) -> Tensor:
    out, inside = torch.zeros_like(h), h.abs() < 1
    out[~inside], out[inside] = h[~inside], torch.tanh(h[inside])
    return out


def in_place(h: Tensor) -> Tensor:
    h, k = h.clone(), h > 0
    h[k] *= 2
    return h


def rows(h: Tensor) -> Tensor:
    k, out = h[:, 0] > 0, torch.zeros_like(h)
    out[k] = F.layer_norm(h[k], (3,)) + 1
    return out


def roots(h: Tensor) -> Tensor:
    """Of the others, the root would not be a number."""
    k, out = h > 0.1, torch.zeros_like(h)
    out[k] = h[k].sqrt()
    return out


def reversed_huber(o: Tensor, y: Tensor) -> Tensor:
    d = (o[y > 0] - y[y > 0]).abs()
    end = 0.2 * torch.max(d).detach()
    return torch.where(d > end, (d**2 + end**2) / (2 * end), d).sum() / d.numel()


def spread(o: Tensor, y: Tensor) -> Tensor:
    chosen, row = o[y > 0], o[y[:, 0] > -1]
    return (
        ((chosen - chosen.mean()) / (chosen.std() + 1e-5)).abs().mean() + row.var(unbiased=False) - row.amin()
    )


def experts(h: Tensor) -> Tensor:
    """As in `transformers`: each expert's rows are picked, and added back."""
    weights, chosen = torch.topk(F.softmax(h, 1), 2, -1)
    out, held = torch.zeros_like(h), F.one_hot(chosen, 3).permute(2, 1, 0)
    for number in range(3):
        column, row = torch.where(held[number])
        mine = torch.tanh(h[None, row].reshape(-1, 3) * (number + 1)) * weights[row, column, None]
        out.index_add_(0, row, mine.to(h.dtype))
    return out


def added_to(h: Tensor) -> Tensor:
    """As in Mistral's reference: `+=` at places that no expert has twice."""
    weights, chosen = torch.topk(F.softmax(h, 1), 2, -1)
    out = torch.zeros_like(h)
    for number in range(3):
        row, column = torch.where(chosen == number)
        out[row] += weights[row, column, None] * torch.sin(h[row] + number)
    return out


def written_twice(h: Tensor) -> Tensor:
    """The last of a row counts, and all have its gradient."""
    row, column = torch.where(h > 0.1)
    out = h.clone()
    out[row] = h[row] * (column[:, None].float() + 1)
    return out


def few_numbers(h: Tensor) -> Tensor:
    table = torch.arange(4.0)
    return h * table[(h[:, 0].sigmoid() * 3).long().clamp(0, 3)].unsqueeze(1)


LAYERS: dict[str, Layer] = {
    "both sides": both_sides, "in place": in_place, "rows": rows, "roots": roots, "experts": experts,
    "added to": added_to, "written twice": written_twice, "few numbers": few_numbers,
}  # fmt: skip
LOSSES: dict[str, Loss] = {
    "mean": lambda o, y: ((o - y) ** 2)[y > 0].mean(),
    "masked_select": lambda o, y: torch.masked_select((o - y) ** 2, y > 0).sum(),
    "mse": lambda o, y: F.mse_loss(o[y > 0], y[y > 0]),
    "cross entropy": lambda o, y: F.cross_entropy(o[y[:, 0] > -1], (y[:, 0] > 0).long()[y[:, 0] > -1]),
    "row sums": lambda o, y: (o[y[:, 1] > 0].sum(-1) ** 2).mean(),
    "column": lambda o, y: F.smooth_l1_loss(o[y[:, 1] > 0][:, 1], y[y[:, 1] > 0][:, 1], reduction="sum"),
    "count": lambda o, y: o[y > 0].sum() / (y > 0).sum(),
    "reversed huber": reversed_huber,
    "spread": spread,
    "number": lambda o, y: (o[y[:, 0] > 0] ** 2).sum() / o[y[:, 0] > 0].size(0) + o[y > 0].min(),
    "larger": lambda o, y: torch.max(o[y > 0], y[y > 0]).mean() + o[y < 0].max() * 2,
    "flat": lambda o, y: F.mse_loss(o[y[:, 0] > 0].view(-1), y[y[:, 0] > 0].flatten()),
    "pairs": lambda o, y: o[y > 0].view(-1, 1).unsqueeze(2).squeeze(1).abs().mean(),
    "joined": lambda o, y: torch.cat([o[y[:, 0] > 0][:, :1].exp(), y[y[:, 0] > 0][:, 1:]], 1).square().mean(),
    "classes as floats": lambda o, y: F.cross_entropy(
        o[y[:, 0] > 0], y.abs()[:, 1][y[:, 0] > 0].clamp(0, 2).long()
    ),
    "nonzero": lambda o, y: F.l1_loss(
        o[(y[:, 0] > 0).nonzero().squeeze(1)], y[(y[:, 0] > 0).nonzero()[:, 0]]
    ),
    "coordinates": lambda o, y: (o[torch.where(y > 0)] - y[torch.where(y > 0)]).square().sum(),
    "product": lambda o, y: (o[y[:, 0] > 0] @ torch.ones(3, 2)).pow(2).mean(),
}


def follows(layer: Layer, loss: Loss) -> None:
    """One step on the engine changes the weights as PyTorch does."""
    torch.manual_seed(0)
    model = Net(layer)
    twin, x, y = copy.deepcopy(model), torch.randn(6, 5), torch.randn(6, 3)
    step = at.compile_step(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), fidelity="fast")
    wanted = loss(twin(x), y)
    wanted.backward()
    torch.testing.assert_close(step(x, y), wanted.detach(), rtol=3e-3, atol=1e-3)
    step.sync()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        off = (mine - theirs + 0.1 * theirs.grad).detach().norm()
        assert float(off) < 0.02 * 0.1 * float(theirs.grad.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_what_goes_back_to_its_mask(name: str) -> None:
    follows(LAYERS[name], F.mse_loss)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_reduced(name: str) -> None:
    follows(lambda h: h, LOSSES[name])


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: o[y > 0].sum() / len(o[y > 0]),
        lambda o, y: (o[y > 0] - y[(y > 0).roll(1, 0)]).sum(),
        lambda o, y: o[y > 0].reshape(1, -1).sum(),
        lambda o, y: o[:, torch.where(y[0] > 0)[0]].sum(),
        lambda o, y: o[y[:, 0] > 0][0].sum(),
    ],
)
def test_what_needs_the_number_of_rows_is_refused(loss: Loss) -> None:
    model = Net(lambda h: h)
    with pytest.raises(UnsupportedModel, match="gives a shape that depends on data") as caught:
        at.compile_step(
            model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (torch.randn(6, 5), torch.randn(6, 3))
        )
    assert caught.value.code == "ANE300"


def test_a_mask_that_changes_between_its_uses_is_another() -> None:
    def loss(o: Tensor, y: Tensor) -> Tensor:
        y = y.clone()
        first = o[y > 0]
        y.copy_(y.roll(1, 0))
        return (first - y[y > 0]).sum()

    model = Net(lambda h: h)
    with pytest.raises(UnsupportedModel, match="other mask"):
        at.compile_step(
            model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (torch.randn(6, 5), torch.randn(6, 3))
        )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.into(x).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        keep = valid[:, None, None, :] & torch.ones(t, t, dtype=torch.bool).tril()
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        found: Tensor = self.out(seen.transpose(1, 2).reshape(n, t, 8)).mean(1)
        return found


def test_a_row_that_attends_to_nothing_gives_zero() -> None:
    """The first sequence is padded on the left: its first rows see no key, for which PyTorch gives 0."""
    torch.manual_seed(0)
    model, x, y = Attention(), torch.randn(3, 5, 8), torch.randint(0, 4, (3,))
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[0, :2] = False
    twin = copy.deepcopy(model)
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=1.0), ((x, valid), y), fidelity="fast"
    )
    wanted = F.cross_entropy(twin(x, valid), y)
    wanted.backward()
    torch.testing.assert_close(step((x, valid), y), wanted.detach(), rtol=2e-3, atol=0)
    step.sync()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        assert float((mine - theirs + theirs.grad).detach().norm()) < 0.02 * float(theirs.grad.norm())


def test_large_known_masks_compile_as_computed_ones_and_become_tensors_where_they_must() -> None:
    mask = torch.rand(6, 3, 40, generator=torch.Generator().manual_seed(0)) > 0.5

    def layer(h: Tensor) -> Tensor:
        h = h.unsqueeze(-1) * torch.linspace(0.05, 0.2, 40)
        h[mask] = h[mask] * 2
        chosen = h[mask]
        return h.sum(-1) + chosen.reshape(-1, 1)[:3, 0] * chosen.shape[0] / 400

    follows(layer, F.mse_loss)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.layers(x, mask=mask)
        return found


def test_a_transformers_mask_may_be_an_input() -> None:
    """torch compares it with the causal one, which would read its values."""
    torch.manual_seed(0)
    model, x, y = Encoder(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    twin, mask = copy.deepcopy(model), nn.Transformer.generate_square_subsequent_mask(5)
    step = at.compile_step(
        model, "mse", torch.optim.SGD(model.parameters(), lr=0.0), ((x, mask), y), fidelity="fast"
    )
    for given in (mask, torch.zeros(5, 5)):
        wanted = F.mse_loss(twin(x, given), y)
        torch.testing.assert_close(step((x, given), y), wanted.detach(), rtol=0.02, atol=0)


def test_masked_select_by_a_known_mask_keeps_its_shape() -> None:
    """NT-Xent: all similarities of a row but its own."""

    def loss(z: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        others = (z @ z.T).masked_select(~torch.eye(len(z), dtype=torch.bool))
        return others.view(len(z), -1).logsumexp(1).mean()

    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.zeros(1)
    expected = float(loss(model(x), y).detach())
    step = at.compile_step(
        model, loss, torch.optim.SGD(model.parameters(), 0.1), example=(x, y), device="sim"
    )
    assert float(step(x, y)) == pytest.approx(expected, rel=5e-3)
    assert step.agreement.agrees
