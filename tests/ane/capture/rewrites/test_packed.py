"""Packed sequences keep their fixed shape and give PyTorch's outputs, states and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ane_trainer.ane.capture.randomness import HostRandomMode
from ane_trainer.ane.capture.rewrites.substitutes import rewriting
from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import lowered, normal
from tests.ane.compiler.lower.harness import run as execute

LAYERS: dict[str, nn.Module] = {
    "lstm": nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
    "lstm projected": nn.LSTM(3, 4, proj_size=2, batch_first=True),
    "gru": nn.GRU(3, 4, bidirectional=True, batch_first=True),
    "gru without bias": nn.GRU(3, 4, 2, bias=False, batch_first=True),
    "tanh": nn.RNN(3, 4, batch_first=True),
    "relu": nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
}
LENGTHS = torch.tensor([3, 5, 1])


def run(layer: nn.Module, x: Tensor, lengths: Any, total: int | None = None) -> list[Tensor]:
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, last = layer(rows)
    padded, counts = pad_packed_sequence(output, batch_first=True, padding_value=0.5, total_length=total)
    states = list(last) if isinstance(last, tuple) else [last]
    return [padded, counts, *states]


def with_gradient(layer: nn.Module, x: Tensor, lengths: Any, total: int | None = None) -> Sequence[Tensor]:
    x = x.detach().requires_grad_()
    outputs = run(layer, x, lengths, total)
    value = sum((t * t).sum() for t in outputs if t.is_floating_point())
    assert isinstance(value, Tensor)
    return [t.detach() for t in outputs] + list(torch.autograd.grad(value, [x, *layer.parameters()]))


@pytest.mark.parametrize("total", [None, 7])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_layers_are_pytorchs(name: str, total: int | None) -> None:
    layer, x = LAYERS[name].double(), normal(3, 5, 3)
    expected = with_gradient(layer, x, LENGTHS, total)
    with rewriting(), HostRandomMode():
        found = with_gradient(layer, x, LENGTHS, total)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("lengths", [LENGTHS, [3, 5, 1]])
def test_lengths_may_be_data(lengths: Any) -> None:
    """Captured with one tensor of lengths, the graph serves others."""
    layer = LAYERS["lstm"].float()
    given = [lengths] if isinstance(lengths, Tensor) else []

    def function(x: Tensor, *data: Tensor) -> list[Tensor]:
        with torch.no_grad(), HostRandomMode():
            return run(layer, x, data[0] if data else lengths)

    x, others = normal(3, 5, 3), torch.tensor([5, 2, 4]) if given else LENGTHS
    program = lowered(function, [x.float(), *given])
    found = execute(program, [x, *([others] if given else [])])
    for mine, theirs in zip(found, run(layer.double(), x, others), strict=True):
        np.testing.assert_allclose(mine.reshape(theirs.shape), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_shorter_padding_needs_the_total_length() -> None:
    x, lengths = normal(3, 6, 3), LENGTHS
    layer = LAYERS["gru"].double()
    with (
        rewriting(values_known=True),
        HostRandomMode(),
        pytest.raises(UnsupportedModel, match="Pass total_length=6"),
    ):
        run(layer, x, lengths)
    expected = run(layer, x, lengths, 6)
    with rewriting(values_known=True), HostRandomMode():
        torch.testing.assert_close(run(layer, x, lengths, 6), expected)


def test_rows_may_be_changed_one_by_one_only() -> None:
    layer, x = LAYERS["gru"].double(), normal(3, 5, 3)

    def scaled(sequence: PackedSequence) -> Tensor:
        data = torch.tanh(sequence.data) * 2.0
        return layer(PackedSequence(data, *sequence[1:]))[1]  # type: ignore[no-any-return]

    def packed() -> PackedSequence:
        return pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)

    expected = scaled(packed())
    with rewriting(), HostRandomMode():
        torch.testing.assert_close(scaled(packed()), expected)
        with pytest.raises(UnsupportedModel, match="mean: uses the rows of a packed sequence"):
            packed().data.mean()
        for reduced in (
            lambda rows: (rows * 2.0).sum(),
            lambda rows: rows.exp().mean(0),
            lambda rows: rows.sum(1).mean(),
        ):
            with pytest.raises(UnsupportedModel, match="uses the rows of a packed sequence"):
                reduced(packed().data)
        assert (packed().data * 2.0).mean(1).dim() == 1
