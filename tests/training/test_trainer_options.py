"""`Trainer`'s gradient options, host optimizers and the CPU fallback."""

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ane_trainer import ConsoleReporter, Reporter, Trainer, compile_forward, compile_step
from ane_trainer.ane.errors import DataError, UnsupportedModel, UsageError
from ane_trainer.training.callbacks import LearningRateMonitor, LearningRateScheduler, ModelCheckpoint
from ane_trainer.training.checkpoint import read_tensors

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


def test_the_choice_of_a_device_is_resolved_once_and_told() -> None:
    _, chosen = fit(mlp(), 1, device="auto")
    _, asked = fit(mlp(), 1, device="sim")
    assert chosen.placement["choice"].startswith("auto: ")
    assert asked.placement["choice"] == "as asked for"


def test_compile_step_takes_a_fallback_as_the_trainer_does() -> None:
    net = Odd()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    example = data()[0]
    with pytest.raises(UnsupportedModel, match="bessel"):
        compile_step(net, "cross_entropy", optimizer, example)
    torch._dynamo.reset()
    step = compile_step(net, "cross_entropy", optimizer, example, fallback="cpu")
    losses = [float(step(*example)) for _ in range(3)]
    assert losses[2] < losses[0]
    assert step.compiled is None
    assert any("bessel" in text for text in step.placement()["cpu"])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("value", "good"), [(float("nan"), False), (1e30, False), (65504.0, True), (-66000.0, False)]
)
def test_weights_that_the_precision_does_not_hold_are_refused(value: float, good: bool) -> None:
    net = mlp()
    with torch.no_grad():
        net[0].bias[3] = value
    step = lambda: compile_step(net, "cross_entropy", torch.optim.SGD(net.parameters(), 0.1), data()[0])  # noqa: E731
    for compiled in (step, lambda: compile_forward(net, data()[0][0])):
        if good:
            compiled().close()
        else:
            with pytest.raises(DataError, match=r"0\.bias up to") as caught:
                compiled()
            assert caught.value.code == "DATA106"


def test_a_label_beyond_the_classes_is_named_and_the_ignored_one_is_not() -> None:
    net = mlp()
    x, y = data()[0]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(DataError, match="class numbers 0 to 2") as caught:
        compile_step(net, "cross_entropy", optimizer, (x, y.clamp(min=3)))
    assert caught.value.code == "DATA107"
    ignored = torch.where(torch.arange(len(y)) < 4, -100, y)
    assert float(compile_step(net, "cross_entropy", optimizer, (x, ignored))(x, ignored)) > 0


def test_limits_of_clipping_can_be_changed_while_training() -> None:
    net = mlp()
    step = compile_step(
        net, "cross_entropy", torch.optim.SGD(net.parameters(), 1.0), data()[0], clip_grad_norm=1e-3
    )
    before = net[0].weight.detach().clone()
    step(*data()[0])
    small = float((net[0].weight.detach() - before).norm())
    step.gradient_options = dataclasses.replace(step.gradient_options, clip_norm=1.0)
    step(*data()[0])
    assert float((net[0].weight.detach() - before).norm()) > 20 * small
    with pytest.raises(UsageError, match="clip_grad_norm"):
        dataclasses.replace(step.gradient_options, clip_norm=0.0)


def test_callbacks_by_the_names_of_keras_and_lightning(tmp_path):
    class Keras:
        def __init__(self):
            self.seen = []

        def on_train_begin(self, logs):
            self.seen.append("begin")

        def on_train_batch_end(self, batch, logs):
            assert logs["loss"] > 0
            self.seen.append(batch)

        def on_epoch_end(self, epoch, logs):
            self.seen.append((epoch, sorted(logs)))
            self.model.stop_training = epoch == 1

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    data = [(torch.rand(8, 4), torch.arange(8) % 3) for _ in range(2)]
    keras, monitor = Keras(), LearningRateMonitor()
    best = ModelCheckpoint(tmp_path / "{epoch}.safetensors", "train_loss")
    trainer = Trainer(
        model, optimizer=torch.optim.SGD(model.parameters(), 0.5), device="cpu", report=Reporter()
    )
    trainer.fit(
        data, 5, data, callbacks=[LearningRateScheduler(lambda epoch, lr: lr / 2), keras, monitor, best]
    )
    logs = ["loss", "lr", "val_accuracy", "val_loss"]
    assert keras.seen == ["begin", 0, 1, (0, logs), 0, 1, (1, logs)]
    assert monitor.rates == [0.25, 0.25, 0.125, 0.125]
    assert best.best_model_path == str(tmp_path / "2.safetensors")
    kept = read_tensors(tmp_path / "2.safetensors", scalars=False).tensors
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UsageError, match="on_epoch_end"):
        trainer.fit(data, callbacks=[3])


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_model_in_eval_mode_trains_in_train_mode_and_parts_stay_as_they_are(device: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2), nn.BatchNorm1d(2))
    data = [(torch.randn(8, 4), torch.arange(8) % 2)] * 2
    trainer = Trainer(net, device=device, report=Reporter())
    trainer.fit(data)
    net.eval()  # as one's own evaluation leaves it
    trainer.fit(data)
    assert int(net[1].num_batches_tracked) == 4
    net[4].eval()
    trainer.fit(data)
    assert [int(net[n].num_batches_tracked) for n in (1, 4)] == [6, 4]


def test_an_optimizer_of_a_replaced_layer_is_not_saved(tmp_path: Path) -> None:
    net = mlp()
    trainer = Trainer(net, optimizer=torch.optim.SGD(net.parameters(), 0.1), device="cpu", report=Reporter())
    net[-1] = nn.Linear(net[-1].in_features, net[-1].out_features)
    with pytest.raises(UsageError, match="2 tensors that are not among them"):
        trainer.save(tmp_path)


@pytest.mark.parametrize("way", ["sync", "save", "smaller"])
def test_optimizer_state_that_was_loaded_is_not_overwritten(way: str, tmp_path: Path) -> None:
    trained = []
    for device in ("cpu", "sim"):
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        trainer = Trainer(net, optimizer=optimizer, device=device, report=Reporter())
        fresh = copy.deepcopy(optimizer.state_dict())
        trainer.fit(data(), 2)
        optimizer.load_state_dict(fresh)
        if way == "sync":
            trainer.sync()
        elif way == "save":
            net = mlp()
            optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
            kept = trainer.save(tmp_path / device)
            trainer = Trainer.resume(kept, model=net, optimizer=optimizer, report=Reporter())
        small = [(x[:16], y[:16]) for x, y in data()]
        trainer.fit(small if way == "smaller" else data())
        trained.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert (trained[1] - trained[0]).norm() < 0.002 * trained[0].norm()


def test_a_frozen_layer_stays_so_when_batches_change_their_size() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    trainer = Trainer(net, optimizer=optimizer, device="sim", report=Reporter())
    trainer.fit(data())
    before = net[0].weight.detach().clone()
    net[0].requires_grad_(False)
    trainer.fit([(x[:16], y[:16]) for x, y in data()])
    assert torch.equal(net[0].weight, before)
    assert len(trainer.history) == 2
