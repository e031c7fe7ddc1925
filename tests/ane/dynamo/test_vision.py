"""torch.compile on what vision models do besides convolutions: the gradients are PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

OPTIONS = {"chip": "m4", "device": "sim", "fidelity": "fast"}


class Odd(nn.Module):
    """Instance norm, pooling with indices, unpooling, look-ups of whole lines, pooling to any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4)
        self.last = nn.Linear(4 * 6, 3)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        x = x + F.max_unpool2d(torch.tanh(pooled), places, 2)
        lines = x.flatten(2).transpose(1, 2)
        lines = lines.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        x = lines.transpose(1, 2).reshape_as(x)
        return self.last(F.adaptive_max_pool2d(x, (3, 2)).flatten(1))


def test_gradients_of_pooling_and_picking() -> None:
    torch.manual_seed(0)
    model = Odd()
    twin = copy.deepcopy(model)
    x, target = torch.randn(2, 2, 8, 6), torch.tensor([0, 2])
    order = torch.stack([torch.randperm(48), torch.randperm(48)])
    losses = []
    for module in (torch.compile(model, backend="ane", options=OPTIONS), twin):
        loss = F.cross_entropy(module(x, order), target)
        loss.backward()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - losses[1]) < 2e-3
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        if name != "first.bias":  # instance norm takes it out: its gradient is rounding
            assert float((mine.grad - theirs.grad).norm()) < 0.02 * float(theirs.grad.norm()), name


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at that of the fakes itself
def test_a_gan_in_the_users_loop() -> None:
    """Two optimizers over two compiled modules, `detach` in between: parameters as without the engine."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    pairs = [(generator, critic), (copy.deepcopy(generator), copy.deepcopy(critic))]
    real, noise = torch.randn(4, 8, 6) + 1, torch.randn(4, 8, 4)
    ones, zeros = torch.ones(8, 1), torch.zeros(8, 1)
    for number, (g, d) in enumerate(pairs):
        make, judge = (torch.compile(m, backend="ane", options=OPTIONS) if number == 0 else m for m in (g, d))
        steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (g, d)]
        for x, z in zip(real, noise, strict=True):
            fake = make(z)
            steps[1].zero_grad()
            loss = F.binary_cross_entropy_with_logits(judge(x), ones)
            (loss + F.binary_cross_entropy_with_logits(judge(fake.detach()), zeros)).backward()
            steps[1].step()
            steps[0].zero_grad()
            F.binary_cross_entropy_with_logits(judge(fake), ones).backward()
            steps[0].step()
    for mine, theirs in zip(pairs[0], pairs[1], strict=True):
        for (name, p), q in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=0.02, atol=4e-3, msg=lambda m, name=name: f"{name}: {m}")
