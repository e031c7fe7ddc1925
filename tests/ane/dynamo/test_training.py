"""Unmodified training loops under `torch.compile(backend="ane")` against the same loops in plain PyTorch."""

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ane_trainer.ane import dynamo
from ane_trainer.models import build_model


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: build_model("mlp", (1, 8, 8), 10, hidden=32),
    "cnn": cnn,
    "transformer": lambda: build_model("transformer", (1, 8, 8), 10, patch=4, width=16, depth=1, heads=2),
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def train(model: nn.Module, call: Callable[..., torch.Tensor], epochs: int) -> tuple[float, list[int]]:
    """Test accuracy, and the number of programs after each epoch."""
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    compiles = []
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(1280, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            optimizer.zero_grad()
            F.cross_entropy(call(x[batch]), y[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            correct = (call(x[1280:1792]).argmax(1) == y[1280:1792]).float().mean()
        compiles.append(dynamo.report().compiles)
    return float(correct), compiles


@pytest.mark.parametrize("name", MODELS)
def test_accuracy_is_that_of_plain_pytorch_and_the_second_epoch_compiles_nothing(name: str) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MODELS[name]()
        call = torch.compile(model, backend="ane", options={"fidelity": "fast"}) if compiled else model
        torch.manual_seed(1)
        accuracy, compiles = train(model, call, 2 + 2 * (name == "transformer"))
        results.append(accuracy)
    # 512 test images; two runs that differ in rounding differ by a few of them
    assert results[0] > 0.75
    assert results[1] >= results[0] - 0.02, results
    assert compiles == [3] * len(compiles)


def test_batch_norm_counts_exactly_and_keeps_its_statistics() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(16, 4)
    plain = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    plain.load_state_dict(model.state_dict())
    model[1].num_batches_tracked.fill_(5000)  # beyond the integers of fp16
    torch.compile(model, backend="ane")(x)
    plain(x)
    assert int(model[1].num_batches_tracked) == 5001
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model[1].running_var, plain[1].running_var, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_gradients_of_any_size_survive(size: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(8, 12)
    (torch.compile(model, backend="ane")(x).square().sum() * size).backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (model(x).square().sum() * size).backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert float((gradient - parameter.grad).abs().max() / parameter.grad.abs().max()) < 4e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_loss_takes_scores_whose_classes_were_moved(reduction: str) -> None:
    """`cross_entropy(o.transpose(1, 2), y)`, as language models and taggers write it."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(8, 4), torch.randn(3, 6, 8), torch.randint(0, 4, (3, 6))
    loss = lambda: F.cross_entropy(model(x).transpose(1, 2), y, reduction=reduction).mean()  # noqa: E731
    torch.compile(loss, backend="ane")().backward()
    assert isinstance(model.weight.grad, torch.Tensor)
    got = model.weight.grad.clone()
    model.zero_grad()
    loss().backward()
    torch.testing.assert_close(got, model.weight.grad, rtol=5e-3, atol=1e-4)


def test_gradients_that_overflow_are_computed_again_at_a_smaller_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    fast, x = torch.compile(model, backend="ane", options={"fidelity": "fast"}), torch.randn(4, 8) * 20
    fast(x).mean().backward()
    assert dynamo.report().programs[1].dispatches == 1
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(60)
    fast(x).mean().backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert dynamo.report().programs[1].dispatches > 2
    model.zero_grad()
    model(x).mean().backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert float((gradient - parameter.grad).abs().max() / parameter.grad.abs().max()) < 4e-3


def test_gradients_that_are_not_finite_stay_so() -> None:
    model = nn.Linear(4, 2)
    (torch.compile(model, backend="ane")(torch.randn(3, 4)).sum() * float("inf")).backward()
    assert model.weight.grad is not None
    assert not bool(model.weight.grad.isfinite().any())


def test_dropout_uses_one_mask_forward_and_backward_and_follows_the_seed() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Identity()), torch.ones(8, 16, requires_grad=True)
    fast = torch.compile(model, backend="ane")
    torch.manual_seed(3)
    first = fast(x)
    first.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, first.detach())
    assert set(first.unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(3)
    assert torch.equal(fast(x), first)
    assert not torch.equal(fast(x), first)
