"""Complex numbers and Fourier transforms as pairs of real numbers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ane_trainer.ane.capture import capture_forward
from ane_trainer.ane.capture.ports import find_parameters
from ane_trainer.ane.errors import UnsupportedModel
from tests.ane.compiler.lower.harness import captured, check, gradients, normal


def rotary(x: Tensor, angle: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.view_as_real(turned).flatten(-2)


def kept_frequencies(x: Tensor, weights: Tensor) -> Tensor:
    """A Fourier layer: the lowest frequencies times weights, the others 0."""
    found = torch.fft.rfft(x)
    product = torch.einsum("bk,ko->bo", found[:, :3], torch.view_as_complex(weights))
    parts = torch.nn.functional.pad(torch.view_as_real(product), (0, 0, 0, found.shape[1] - product.shape[1]))
    return torch.fft.irfft(torch.view_as_complex(parts), n=x.shape[1])


def turned_in_place(x: Tensor) -> Tensor:
    z = torch.fft.rfft(x).clone()
    z.transpose_(-1, 0).unsqueeze_(0).squeeze_(0)
    z.t_()
    return z.real + z.imag


def spectrogram(x: Tensor, window: Tensor) -> Tensor:
    """Windows that overlap, read with strides, their spectra, and the axes turned in place."""
    return torch.view_as_real(torch.stft(x, 8, 4, window=window, return_complex=True))


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "rotary": (rotary, [normal(2, 3, 8), normal(3, 4, seed=1)]),
    "fft of two axes": (lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real, [normal(2, 4, 6)]),
    "there and back": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, n=7), [normal(2, 7)]),
    "normalized": (
        lambda x: torch.fft.irfft(torch.fft.rfft(x, norm="ortho"), n=8, norm="ortho"),
        [normal(2, 8)],
    ),
    "planes": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:]), [normal(2, 4, 6)]),
    "magnitude": (lambda x: torch.fft.rfft(x).abs(), [normal(2, 6)]),
    "exponential": (lambda x: torch.exp(torch.view_as_complex(x)).real, [normal(3, 2)]),
    "quotient": (
        lambda x, y: torch.view_as_real(torch.view_as_complex(x) / torch.view_as_complex(y)),
        [normal(3, 2), normal(3, 2, seed=3)],
    ),
    "axes in place": (turned_in_place, [normal(2, 6)]),
    "stft": (spectrogram, [normal(2, 20), normal(8, seed=2)]),
    "layer": (kept_frequencies, [normal(2, 8), normal(3, 3, 2, seed=1)]),
    "planes of complex numbers": (lambda x: torch.fft.fft2(x).real, [normal(2, 4, 6)]),
    "converted": (lambda x: (x.to(torch.complex64) * (1 + 2j)).imag, [normal(2, 6)]),
    "times a number": (lambda x: torch.exp(1j * x).real + (x / (1 + 1j)).imag, [normal(2, 6)]),
    "plus a number": (lambda x: (2j - x).abs() + (x + 1j).abs(), [normal(2, 6)]),
    "powers": (lambda x: (torch.fft.fft(x) ** 2).real, [normal(2, 6)]),
    "angles": (lambda x: torch.fft.fft(x).angle()[:, 1:3], [normal(2, 6)]),
    "chosen": (lambda x: torch.where(x > 0, x.cfloat(), 1j * x).imag, [normal(2, 6)]),
    "filled": (lambda x: (torch.full_like(x, 1 + 2j, dtype=torch.complex64) * x).imag, [normal(2, 6)]),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs_compute_what_complex_numbers_do(name: str) -> None:
    function, tensors = CASES[name]
    check(gradients(function), tensors, rtol=1e-4, atol=1e-4)


def test_other_operations_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="has no rule for complex numbers"):
        captured(lambda x: torch.fft.rfft(x).tan().real, [torch.ones(2, 6)])


def test_complex_parameters_are_refused() -> None:
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    with pytest.raises(UnsupportedModel, match="w: parameter: is complex"):
        find_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_constant_changed_in_place_is_read_anew() -> None:
    """The second capture once took the constant's pair from the first."""
    constant = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j])

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x) * constant)

    x = torch.ones(2, 2)
    for _ in range(2):
        (found,) = capture_forward(Net(), x).graph(x)
        torch.testing.assert_close(found, Net()(x))
        assert not vars(constant)
        constant.mul_(2.0j)


def test_torch_compile_takes_complex_numbers_within() -> None:
    weights = normal(3, 3, 2, seed=1).requires_grad_()
    x = normal(2, 8)
    for graph in (
        kept_frequencies,
        torch.compile(kept_frequencies, backend="ane", options={"device": "sim"}),
    ):
        graph(x, weights).square().sum().backward()
    assert weights.grad is not None
    twice, weights.grad = weights.grad.clone(), None
    kept_frequencies(x, weights).square().sum().backward()
    torch.testing.assert_close(twice, 2 * weights.grad, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["planes of complex numbers", "converted", "times a number", "plus a number", "chosen", "powers"]
)
def test_torch_compile_takes_complex_numbers_made_of_real_ones(name: str) -> None:
    """Their real source once was lost, and the result that of zeros."""
    function, (x,) = CASES[name]
    torch.compiler.reset()
    found = torch.compile(function, backend="ane", options={"device": "sim"})(x)
    torch.testing.assert_close(found, function(x), rtol=5e-3, atol=5e-3)


def test_torch_compile_refuses_complex_numbers_outside_by_name() -> None:
    outside = torch.compile(lambda w: torch.view_as_real(w * w), backend="ane", options={"device": "sim"})
    with pytest.raises(UnsupportedModel, match="must be real"):
        outside(torch.ones(3, dtype=torch.complex64))
