"""Training options: schedules against torch's own, early stopping, best and averaged weights, freezing, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ane_trainer import Reporter, Trainer
from ane_trainer.ane.errors import UsageError
from ane_trainer.core import resume_training, run_training
from ane_trainer.training.callbacks import BestWeights, Callback, EarlyStopping, WeightAveraging
from ane_trainer.training.config import make_config
from ane_trainer.training.folder.results import Epoch
from ane_trainer.training.folder.runs import BEST, RunFolder
from ane_trainer.training.optimizers import freeze
from ane_trainer.training.schedules import LearningRateSchedule, Schedule

STEPS = 40


def torch_rates(make: Any, steps: int = STEPS) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Schedule("cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
        (Schedule("cosine", lowest=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.08)),
        (Schedule("linear"), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS)),
        (Schedule("one-cycle"), lambda o: lr_scheduler.OneCycleLR(o, 0.8, STEPS, cycle_momentum=False)),
        (Schedule("constant", warmup=8), lambda o: lr_scheduler.LinearLR(o, 1 / 8, 1.0, 7)),
        (
            Schedule("cosine", warmup=8),
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.LinearLR(o, 1 / 8, 1.0, 7), lr_scheduler.CosineAnnealingLR(o, STEPS - 8)],
                [8],
            ),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_schedules_are_torch_s(schedule: Schedule, make: Any) -> None:
    ours = [0.8 * schedule.factor(step, STEPS, 0) for step in range(STEPS)]
    assert ours == pytest.approx(torch_rates(make), abs=1e-12)


def test_step_and_plateau_are_torch_s() -> None:
    schedule = Schedule("step", decay=0.5, every=3)
    ours = [0.8 * schedule.factor(0, 0, epoch) for epoch in range(10)]
    assert ours == pytest.approx(torch_rates(lambda o: lr_scheduler.StepLR(o, 3, 0.5), 10))
    losses = [5.0, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 2]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, factor=0.5, threshold=0.0)
    trainer = Trainer(mlp(), device="cpu", report=Reporter())
    ours_too = LearningRateSchedule(Schedule("plateau", decay=0.5, patience=2))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.8)
    ours_too.on_train_start(trainer)
    for number, loss in enumerate(losses, 1):
        ours_too.on_train_epoch_end(trainer, Epoch(number, 1, loss, loss, None, 1.0, 0, 1.0))
        ours_too.on_train_batch_start(trainer)
        plateau.step(loss)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(noise: float = 0.1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 8, generator=generator)
    y = (x[:, :3] + noise * torch.randn(96, 3, generator=generator)).argmax(1)
    return list(zip(x.split(32), y.split(32), strict=True))


def trainer_of(net: nn.Module, lr: float = 0.1) -> Trainer:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    return Trainer(net, optimizer=optimizer, device="cpu", report=Reporter())


def test_a_schedule_trains_as_torch_s_loop_does() -> None:
    ours = trainer_of(mlp())
    ours.fit(batches(), epochs=4, callbacks=[LearningRateSchedule(Schedule("cosine", warmup=3))])
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = Schedule("cosine", warmup=3)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, 12, 0))
    for _ in range(4):
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            scheduler.step()
    for mine, its in zip(ours.model.parameters(), net.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-6)


def test_early_stopping_and_best_weights() -> None:
    worse = [(x, y.roll(1)) for x, y in batches()]  # gets worse as training gets better
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Note(Callback):
        def on_train_epoch_end(self, trainer: Trainer, record: Epoch) -> None:
            seen[record.epoch] = {k: v.clone() for k, v in trainer.model.state_dict().items()}

    trainer = trainer_of(mlp(), lr=1.0)
    best = BestWeights("val_loss")
    result = trainer.fit(worse, 9, batches(), callbacks=[Note(), EarlyStopping(3, monitor="val_loss"), best])
    assert result.epochs == best.epoch + 3 < 9
    assert result.test_loss == min(record.val_loss for record in result.history)
    assert result.weights_epoch == best.epoch
    assert all(torch.equal(value, seen[best.epoch][k]) for k, value in trainer.model.state_dict().items())


def test_an_average_of_the_weights_is_what_is_evaluated_and_kept() -> None:
    net, history = mlp(), []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
            history.append(net[0].weight.detach().clone())

    trainer = trainer_of(net, lr=0.5)
    wanted = net[0].weight.detach().clone()
    result = trainer.fit(batches(), 3, batches(), callbacks=[Note(), WeightAveraging(0.5)])
    for step, weight in enumerate(history, 1):
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * weight
    assert torch.allclose(net[0].weight, wanted, atol=1e-6)
    assert not torch.allclose(net[0].weight, history[-1], atol=1e-3)
    assert trainer.evaluate(batches()).loss == pytest.approx(result.test_loss)


def test_frozen_parameters_stay() -> None:
    net = mlp()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert freeze(net, ["0", "2.bias"]) == ["0.bias", "0.weight", "2.bias"]
    trainer_of(net, lr=1.0).fit(batches())
    same = {name for name, value in net.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"0.weight", "0.bias", "2.bias"}
    for patterns in (["nothing*"], ["*"]):
        with pytest.raises(UsageError, match="freeze"):
            freeze(mlp(), patterns)


OPTIONS = {
    "dataset": "digits", "hidden": (16,), "batch_size": 64, "limit": 256, "device": "cpu", "epochs": 4,
    "schedule": "one-cycle", "ema": 0.9, "best": True, "patience": 3, "freeze": "fc1.bias", "lr": 5e-3,
}  # fmt: skip


def test_options_together_resume_to_the_same_bits(tmp_path: Path) -> None:
    whole = run_training(make_config(OPTIONS), out=tmp_path / "whole", report=Reporter())
    cut = make_config({**OPTIONS, "save_every": "3"})

    class Stop(Reporter):
        def __init__(self) -> None:
            self.left = 6

        def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
            self.left -= 1
            if self.left == 0:
                raise MemoryError

    with pytest.raises(MemoryError):
        run_training(cut, out=tmp_path / "cut", report=Stop())
    again = resume_training(tmp_path / "cut", report=Reporter())
    assert again.test_loss == whole.test_loss
    one, two = (RunFolder(tmp_path / name).read_weights().state for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.count_nonzero(one["fc1.bias"] - make_start()["fc1.bias"])
    assert (tmp_path / "cut" / BEST).exists()


def make_start() -> dict[str, torch.Tensor]:
    from ane_trainer import build_model

    return build_model("mlp", (1, 8, 8), 10, hidden=(16,), seed=0).state_dict()


def test_a_time_limit_ends_after_a_step_and_resume_goes_on(tmp_path: Path) -> None:
    options = {**OPTIONS, "time_limit": "0.001s", "ema": None, "best": False, "schedule": "constant"}
    result = run_training(make_config(options), out=tmp_path / "run", report=Reporter())
    assert (result.steps, result.epochs) == (1, 0)
    assert result.test_loss is not None
    again = resume_training(tmp_path / "run", report=Reporter(), time_limit="1h")
    assert again.epochs == 4
    whole = run_training(make_config({**options, "time_limit": "1h"}), out=tmp_path / "w", report=Reporter())
    assert again.test_loss == whole.test_loss


@pytest.mark.parametrize("text", ["soon", "0s", "5", "-1h"])
def test_a_time_limit_needs_a_unit(text: str) -> None:
    with pytest.raises(UsageError, match="90s, 10min or 2h"):
        make_config({"dataset": "digits", "time_limit": text})


def test_a_schedule_over_data_of_unknown_length_is_refused() -> None:
    class Unsized:
        def __iter__(self) -> Any:
            return iter(batches())

    with pytest.raises(UsageError, match="len"):
        trainer_of(mlp()).fit(Unsized(), callbacks=[LearningRateSchedule("cosine")])


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(UsageError, match="Did you mean 'cosine'"):
        LearningRateSchedule("cosin")
