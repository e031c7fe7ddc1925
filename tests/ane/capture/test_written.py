"""Parameters that a forward writes to: momentum encoders, power iterations, clipped weights; `x.data = value`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.errors import UnsupportedModel

STEPS = 5


class Momentum(nn.Module):
    """A second encoder that follows the first; both are alike in the beginning."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
                if self.way == "assigned":
                    k.data = k.data * 0.9 + p.data * 0.1
                elif self.way == "data":
                    k.data.mul_(0.9).add_(p.data, alpha=0.1)
                else:
                    k.mul_(0.9).add_(p, alpha=0.1)
        return self.query(x) - 0.5 * self.key(x)  # type: ignore[no-any-return]


class Spectral(nn.Module):
    """The spectral norm of many repositories: vectors as parameters without gradients, set by `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.u, self.v = (
            nn.Parameter(F.normalize(torch.randn(4), dim=0), requires_grad=False) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        self.v.data = F.normalize(torch.mv(self.weight.data.t(), self.u.data), dim=0)
        self.u.data = F.normalize(torch.mv(self.weight.data, self.v.data), dim=0)
        return x @ (self.weight / self.u.dot(self.weight.mv(self.v))).t()


class Clipped(nn.Module):
    """Weights that are trained and kept positive."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(min=0.0)
        return self.layer(x)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "assigned": lambda: Momentum("assigned"),
    "data": lambda: Momentum("data"),
    "in place": lambda: Momentum("in place"),
    "spectral": Spectral,
    "clipped": Clipped,
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)


@pytest.mark.parametrize("door", ["step", "compile"])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_forward_writes_stays_written(name: str, door: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    batches = [(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(STEPS)]
    optimizer, other = sgd(model), sgd(twin)
    fast = torch.compile(model, backend="ane", options={"device": "sim"}) if door == "compile" else None
    step = None if fast is not None else at.compile_step(model, "mse", optimizer, batches[0], device="sim")
    for x, y in batches:
        if step is not None:
            step(x, y)
        elif fast is not None:
            optimizer.zero_grad()
            F.mse_loss(fast(x), y).backward()
            optimizer.step()
        other.zero_grad()
        F.mse_loss(twin(x), y).backward()
        other.step()
    for key, want in twin.state_dict().items():
        change = want - before[key]
        assert (model.state_dict()[key] - want).norm() <= 0.02 * change.norm() + 1e-4, key


def test_nothing_else_writes_to_the_parameters() -> None:
    torch.manual_seed(0)
    model = Clipped()
    twin, batches = copy.deepcopy(model), [(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(2)]
    at.Trainer(model, loss="mse", optimizer=torch.optim.SGD(model.parameters(), 0.1), device="sim").fit(
        batches, epochs=1
    )
    other = torch.optim.SGD(twin.parameters(), 0.1)
    for x, y in batches:
        other.zero_grad()
        F.mse_loss(twin(x), y).backward()
        other.step()
    torch.testing.assert_close(model.layer.weight, twin.layer.weight, rtol=0.0, atol=1e-3)
    assert float(model.layer.weight.detach().min()) < -1e-3  # the last update is clipped by the next forward


def test_trained_weights_that_the_host_updates_are_refused() -> None:
    model, x = Clipped(), torch.randn(8, 4)
    with pytest.raises(UnsupportedModel, match=r"layer\.weight.*written to by the forward"):
        at.compile_step(model, "mse", torch.optim.Rprop(model.parameters()), (x, x), device="sim")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for p, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            k.data = p.data
        return self.query(x) - 0.5 * self.key(x)  # type: ignore[no-any-return]


def test_one_tensor_for_two_parameters_is_refused_within_what_is_compiled() -> None:
    with pytest.raises(UnsupportedModel, match="ANE303"):
        torch.compile(Shared(), backend="ane", options={"device": "sim"})(torch.randn(8, 4))
