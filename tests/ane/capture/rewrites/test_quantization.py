"""Models that are trained with fake quantization, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ane_trainer as at


class Quantized(nn.Module):
    """Two layers whose weights go through levels of int8, with one scale, or with one a channel."""

    def __init__(self, channels: bool) -> None:
        super().__init__()
        self.channels = channels
        self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 4)
        self.register_buffer("scales", torch.linspace(0.002, 0.01, 24))
        self.register_buffer("zeros", torch.zeros(24, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.channels:
            weight = torch.fake_quantize_per_channel_affine(
                self.a.weight, self.scales, self.zeros, 0, -128, 127
            )
        else:
            weight = torch.fake_quantize_per_tensor_affine(self.a.weight, 0.0078125, 3, -16, 15)
        hidden = torch.relu(nn.functional.linear(x, weight, self.a.bias))
        return self.b(torch.fake_quantize_per_tensor_affine(hidden, 0.03125, 0, 0, 31))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.filterwarnings("error::ane_trainer.NumericsWarning")
def test_a_step_agrees_with_pytorch(channels: bool) -> None:
    """Clamped entries get no gradient, the others pass it straight through."""
    torch.manual_seed(0)
    model, x, y = Quantized(channels), torch.randn(16, 12), torch.randint(4, (16,))
    plain = Quantized(channels)
    plain.load_state_dict(model.state_dict())
    loss = nn.functional.cross_entropy(plain(x), y)
    loss.backward()
    with at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.5), example=(x, y), chip="m4"
    ) as step:
        assert float(step(x, y)) == pytest.approx(loss.item(), rel=5e-3)
        step.sync()
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert want.grad is not None
        change = want.detach() - 0.5 * want.grad - got.detach()
        assert change.abs().max() <= 0.05 * want.grad.abs().max() * 0.5, name
    assert plain.a.weight.grad is not None
    assert bool((plain.a.weight.grad == 0).any()) or channels
