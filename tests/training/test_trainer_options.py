"""`Trainer`'s gradient options, host optimizers and the CPU fallback."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from ane_trainer import ConsoleReporter, Reporter, Trainer
from ane_trainer.ane.errors import UnsupportedModel, UsageError

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Odd(nn.Module):
    """A layer without a lowering rule between two with one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x))
        return self.b(x + torch.special.bessel_j0(x.detach()))


def data() -> Batches:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 8, generator=generator)
    y = (x[:, :3] + 0.1 * torch.randn(96, 3, generator=generator)).argmax(1)
    return list(zip(x.split(32), y.split(32), strict=True))


def fit(model: nn.Module, epochs: int = 3, optimizer: Any = None, **options: Any) -> tuple[Trainer, Any]:
    kept = optimizer(model.parameters()) if optimizer else None
    options.setdefault("report", Reporter())
    trainer = Trainer(model, optimizer=kept, fidelity="fast", **options)
    return trainer, trainer.fit(data(), epochs=epochs, val=data())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def test_clipping_and_accumulation_follow_plain_pytorch() -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    options = {"clip_grad_norm": 0.2, "clip_grad_value": 0.1, "accumulate": 3}
    _, plain = fit(mlp(), optimizer=sgd, device="cpu", **options)
    trainer, ours = fit(mlp(), optimizer=sgd, **options)
    _, without = fit(mlp(), optimizer=sgd)
    assert trainer.step.applied_steps == 3
    assert ours.test_loss == pytest.approx(plain.test_loss, abs=2e-3)
    assert abs(without.test_loss - plain.test_loss) > 0.05


def test_an_optimizer_without_a_rule_is_reported() -> None:
    stream = io.StringIO()
    _, result = fit(mlp(), optimizer=lambda p: torch.optim.Rprop(p), report=ConsoleReporter(stream))
    assert "Rprop runs on the host" in stream.getvalue()
    assert "Rprop on the host" in result.placement["where"]
    assert 0.0 < result.engine_flop_fraction < 1.0
    assert result.history[-1].train_loss < result.history[0].train_loss


def test_refused_parts_run_on_the_cpu_only_if_asked() -> None:
    with pytest.raises(UnsupportedModel, match="bessel"):
        fit(Odd())
    torch._dynamo.reset()
    stream = io.StringIO()
    torch.manual_seed(0)
    trainer, result = fit(Odd(), fallback="cpu", report=ConsoleReporter(stream))
    torch.manual_seed(0)
    _, plain = fit(Odd(), device="cpu")
    assert result.test_loss == pytest.approx(plain.test_loss, abs=5e-3)
    assert "bessel" in stream.getvalue()
    assert any("bessel" in text for text in result.placement["cpu"])
    assert 0.0 < result.engine_flop_fraction < 1.0
    assert trainer.step.compiles >= 2
    torch._dynamo.reset()


def test_fallback_changes_nothing_for_a_model_that_fits() -> None:
    trainer, result = fit(mlp(), 1, fallback="cpu")
    assert result.engine_flop_fraction == 1.0
    assert trainer.step.dispatches_per_step == 1


@pytest.mark.parametrize("options", [{"fallback": "gpu"}, {"clip_grad_norm": -1.0}, {"accumulate": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Trainer(mlp(), report=Reporter(), **options)


def test_options_survive_saving(tmp_path: Any) -> None:
    trainer, _ = fit(mlp(), 1, accumulate=3, clip_grad_norm=0.5)
    again = Trainer.resume(trainer.save(tmp_path / "run"), model=mlp(), report=Reporter())
    assert again.options == trainer.options
    again.fit(data(), epochs=1)
    assert again.step.applied_steps == 2
