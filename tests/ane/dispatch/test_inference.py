"""Forward programs on the simulator, against PyTorch fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ane_trainer.ane.dispatch import compile_forward
from ane_trainer.ane.errors import DataError


def model() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Dropout(0.5), nn.Linear(4 * 9, 3))


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_output_equals_torch_in_eval_mode(fidelity: str) -> None:
    net = model()
    x = torch.randn(5, 1, 8, 8)
    program = compile_forward(net, x, fidelity=fidelity, threads=1)
    assert net.training
    # 36 terms, weights and activations rounded to 2^-11
    torch.testing.assert_close(program(x), net.eval()(x).detach(), rtol=1e-2, atol=4e-3)


def test_present_parameters_are_used() -> None:
    net = model()
    x = torch.randn(5, 1, 8, 8)
    program = compile_forward(net, x, threads=1)
    with torch.no_grad():
        net[-1].weight.zero_()
        net[-1].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert program(x).tolist() == [[1.0, 2.0, 3.0]] * 5


def test_structured_outputs_keep_their_structure() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"double": x * 2, "sum": x.sum()}

    program = compile_forward(Two(), torch.ones(2, 3), threads=1)
    output = program(torch.ones(2, 3))
    assert output["double"].tolist() == [[2.0] * 3] * 2
    assert output["sum"].shape == ()
    assert output["sum"].item() == 6.0


def test_another_shape_is_refused() -> None:
    program = compile_forward(model(), torch.randn(5, 1, 8, 8), threads=1)
    with pytest.raises(DataError, match="needs the shape"):
        program(torch.randn(4, 1, 8, 8))


def test_batches_of_other_sizes_are_right() -> None:
    """Powers of two that fit one size lose another: 1e5 after 1e29 had given zeros."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    program = compile_forward(model, torch.randn(2, 8))
    for size in (1e5, 1e29, 1.0, 1e-6, 2e5):
        x = torch.randn(2, 8) * size
        want = model(x).detach().double()
        assert float((program(x) - want).norm()) < 0.01 * float(want.norm())
    with pytest.raises(DataError, match="65504"):
        program(torch.full((2, 8), 1e38))
