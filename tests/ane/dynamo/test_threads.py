"""Compiled models in several threads, in inference mode, and on an empty batch."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def trained(model: nn.Module, call: nn.Module, seed: int) -> list[torch.Tensor]:
    optimizer, draws = torch.optim.SGD(model.parameters(), lr=0.1), torch.Generator().manual_seed(seed)
    for _ in range(4):
        x, y = torch.randn(16, 8, generator=draws), torch.randn(16, 4, generator=draws)
        optimizer.zero_grad()
        F.mse_loss(call(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("error::ane_trainer.ane.errors.NumericsWarning")
def test_models_of_one_class_train_in_threads() -> None:
    torch.manual_seed(0)
    models = [net() for _ in range(3)]
    calls = [torch.compile(model, backend="ane", options={"device": "sim"}) for model in models]
    for call in calls:  # compiled one after the other
        call(torch.randn(16, 8)).sum().backward()
    expected = [trained(twin, twin, i) for i, twin in enumerate(copy.deepcopy(models))]
    found: dict[int, list[torch.Tensor]] = {}

    def run(number: int) -> None:
        found[number] = trained(models[number], calls[number], number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate(expected):
        for got, want in zip(found[number], wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0.02, atol=2e-3)


def test_inference_mode() -> None:
    torch.manual_seed(0)
    model = net()
    twin, call = copy.deepcopy(model), torch.compile(model, backend="ane", options={"device": "sim"})
    for training in (False, True):
        model.train(training)
        twin.train(training)
        with torch.inference_mode():
            x = torch.randn(16, 8)
            torch.testing.assert_close(call(x), twin(x), rtol=1e-2, atol=5e-3)
    x = torch.randn(16, 8)
    for each in (call, twin):
        each(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad, rtol=0.02, atol=5e-3)
    torch.testing.assert_close(model[1].running_var, twin[1].running_var, rtol=1e-3, atol=1e-4)


def test_an_empty_batch_is_pytorchs_and_told() -> None:
    model = nn.Linear(8, 4)
    call = torch.compile(model, backend="ane", options={"device": "sim"})
    call(torch.randn(16, 8)).sum().backward()
    with pytest.warns(UserWarning, match="without elements"):
        found = call(torch.randn(0, 8))
    found.sum().backward()
    assert found.shape == (0, 4)
