"""Sweeps: every norm over inputs of 1e-5 to 6e4, every loss over 100 to a million elements, against PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.ane.capture.range.test_exponents import Loss, assert_follows


class Written(nn.Module):
    """A norm as people write it, over (8, 16, 4, 4) flattened or not."""

    def __init__(self, norm: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def standardized(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


def by_variance(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-5)


def bounded_inverse(x: torch.Tensor) -> torch.Tensor:
    """As Keras normalizes: a bound that fp16 does not hold, as a tensor."""
    return x * torch.minimum(torch.rsqrt(x.square().sum(1, keepdim=True)), torch.tensor(1e12))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm([16, 4, 4]),
    "RMSNorm": lambda: nn.RMSNorm([16, 4, 4], eps=1e-6),
    "BatchNorm": lambda: nn.BatchNorm2d(16),
    "GroupNorm": lambda: nn.GroupNorm(4, 16),
    "InstanceNorm": lambda: nn.InstanceNorm2d(16, affine=True),
    "normalize": lambda: Written(F.normalize),
    "norm by hand": lambda: Written(lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-6)),
    "rms by hand": lambda: Written(rms),
    "std by hand": lambda: Written(standardized),
    "var by hand": lambda: Written(by_variance),
    "bounded inverse": lambda: Written(bounded_inverse),
}
SCALES = (1e-5, 1e-3, 1.0, 256.0, 6e4)
#: The ends of the range run always.
_ALWAYS = (1e-5, 6e4)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    "scale", [pytest.param(s, marks=() if s in _ALWAYS else pytest.mark.slow) for s in SCALES]
)
def test_norms(name: str, scale: float) -> None:
    torch.manual_seed(0)
    x, y = scale * (2 * torch.rand(8, 16, 4, 4) - 1), torch.randint(0, 5, (8,))
    model = nn.Sequential(nn.Identity(), NORMS[name](), nn.Flatten(), nn.Linear(256, 5))
    assert_follows(model, F.cross_entropy, x, y)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "rms by hand"])
def test_an_outlier_of_25000(name: str) -> None:
    """As the residual stream of a language model has one."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 16, 4, 4), torch.randint(0, 5, (8,))
    x[:, 3, 1, 2] = 25000.0
    assert_follows(nn.Sequential(NORMS[name](), nn.Flatten(), nn.Linear(256, 5)), F.cross_entropy, x, y)


def of_numbers(loss: Callable[..., torch.Tensor], **options: object) -> Loss:
    return lambda o, y: loss(o, y, **options)


def of_signs(loss: Callable[..., torch.Tensor], **options: object) -> Loss:
    return lambda o, y: loss(o, torch.sign(y), **options)


def of_shares(loss: Callable[..., torch.Tensor]) -> Loss:
    return lambda o, y: loss(o, (y > 0).to(o.dtype))


def of_classes(loss: Callable[..., torch.Tensor], **options: object) -> Loss:
    return lambda o, y: loss(o, y.argmax(-1), **options)


def dice(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())


LOSSES: dict[str, Loss] = {
    "mse": of_numbers(F.mse_loss),
    "mse summed": of_numbers(F.mse_loss, reduction="sum"),
    "l1": of_numbers(F.l1_loss),
    "smooth_l1": of_numbers(F.smooth_l1_loss),
    "huber": of_numbers(F.huber_loss, delta=0.5),
    "bce": lambda o, y: F.binary_cross_entropy(torch.sigmoid(o), (y > 0).to(o.dtype)),
    "bce_with_logits": of_shares(F.binary_cross_entropy_with_logits),
    "bce_with_logits summed": lambda o, y: F.binary_cross_entropy_with_logits(
        o, (y > 0).to(o.dtype), reduction="sum"
    ),
    "cross_entropy": of_classes(F.cross_entropy),
    "cross_entropy smoothed": of_classes(F.cross_entropy, label_smoothing=0.1),
    "cross_entropy summed": of_classes(F.cross_entropy, reduction="sum"),
    "cross_entropy of pixels summed": lambda o, y: F.cross_entropy(
        o.reshape(-1, 20, 5), y.reshape(-1, 20, 5).argmax(1), reduction="sum"
    ),
    "nll": lambda o, y: F.nll_loss(F.log_softmax(o, -1), y.argmax(-1)),
    "kl_div": lambda o, y: F.kl_div(F.log_softmax(o, -1), F.softmax(y, -1), reduction="batchmean"),
    "poisson_nll": lambda o, y: F.poisson_nll_loss(o, y.abs()),
    "gaussian_nll": lambda o, y: F.gaussian_nll_loss(o, y, torch.ones_like(o)),
    "hinge_embedding": of_signs(F.hinge_embedding_loss),
    "soft_margin": of_signs(F.soft_margin_loss),
    "multilabel_soft_margin": of_shares(F.multilabel_soft_margin_loss),
    "multi_margin": of_classes(F.multi_margin_loss),
    "root of mse": lambda o, y: F.mse_loss(o, y).sqrt(),
    "log cosh": lambda o, y: torch.log(torch.cosh(o - y)).mean(),
    "dice": lambda o, y: dice(torch.sigmoid(o), (y > 0).to(o.dtype)),
}
SIZES = (100, 10_000, 100_000, 1_000_000)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "elements", [pytest.param(n, marks=() if n == 10_000 else pytest.mark.slow) for n in SIZES]
)
def test_losses(name: str, elements: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(elements // 20, 8), torch.randn(elements // 20, 20)
    assert_follows(nn.Linear(8, 20), LOSSES[name], x, y)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3, 5e3])
def test_distances(scale: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 6) * scale, torch.randn(8)
    loss = lambda o, y: (torch.cdist(o, o.detach().flip(0) + scale) / scale).mean()  # noqa: E731
    assert_follows(nn.Linear(6, 4, bias=False), loss, x, y)
