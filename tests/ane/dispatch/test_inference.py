"""Forward programs on the simulator, against PyTorch fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ane_trainer.ane.dispatch import compile_forward
from ane_trainer.ane.dispatch.options import Target
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


class Scaled(nn.Module):
    """Reads a number, a list, a buffer of booleans; counts its calls, which nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(8, 16), nn.Linear(16, 3), nn.BatchNorm1d(16)
        self.factor, self.shifts, self.calls = 1.0, [0.0, 1.0], 0
        self.register_buffer("kept", torch.ones(16, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = torch.tanh(self.norm(self.first(x))) * self.factor + self.shifts[0]
        return self.last(torch.where(self.kept, hidden, 0.0))  # type: ignore[no-any-return]


def _another_layer(net: Scaled) -> None:
    net.last = nn.Linear(16, 3)


def _another_list(net: Scaled) -> None:
    net.shifts[0] = 2.0


def _another_mask(net: Scaled) -> None:
    net.kept[::2] = False


def _another_number(net: Scaled) -> None:
    net.factor = 3.0


@pytest.mark.parametrize("change", [_another_layer, _another_list, _another_mask, _another_number])
def test_what_the_model_became_is_what_is_computed(change: Callable[[Scaled], None]) -> None:
    torch.manual_seed(0)
    net, x = Scaled(), torch.randn(32, 8)
    program = compile_forward(net, x, threads=1)
    before = program(x)
    change(net)
    wanted = net.eval()(x).detach()
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(program(x), wanted, rtol=1e-2, atol=4e-3)


def test_what_has_no_effect_compiles_nothing_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Scaled(), torch.randn(32, 8)
    program = compile_forward(net, x, threads=1)
    made: list[str] = []
    load = Target.load
    monkeypatch.setattr(Target, "load", lambda self, compiled: (made.append("one"), load(self, compiled))[1])
    for _ in range(6):
        net.train()(x)  # counts, in `calls` and in the batch norm
        program(x)
    assert len(made) == 3
    net.factor = 2.0
    program(x)
    net.factor = 1.0
    program(x)
    net.factor = 2.0
    program(x)
    assert len(made) == 4  # both are known
