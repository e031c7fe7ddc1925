"""The learning-rate sweep and the choice of a batch size: useful, and without a trace in what follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ane_trainer import Reporter, Trainer, TrainingStep, compile_step
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from ane_trainer.core import resume_training, run_training
from ane_trainer.training.config import TrainConfig, load_config, make_config
from ane_trainer.training.loop import Batch
from ane_trainer.training.tuning import find_batch_size, geometric


def batches(seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 8, generator=generator)
    return list(zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True))


def trainer(device: str) -> Trainer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return Trainer(net, optimizer=optimizer, device=device, report=Reporter(), threads=1)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_sweep_finds_a_rate_that_trains_and_changes_nothing(device: str) -> None:
    swept, plain = trainer(device), trainer(device)
    found = swept.find_lr(batches(), lowest=1e-5, highest=10.0, steps=80)
    assert 1e-3 < found.rate < 3.0
    assert len(found.losses) == len(found.rates) <= 80
    assert swept.optimizer.param_groups[0]["lr"] == 0.1
    results = [one.fit(batches(), 2, batches(1)) for one in (swept, plain)]
    assert results[0].history[-1].train_loss == results[1].history[-1].train_loss
    assert results[0].test_loss == results[1].test_loss
    for a, b in zip(swept.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_that_never_falls_is_said() -> None:
    with pytest.raises(UsageError, match="falls at some learning rate"):
        trainer("cpu").find_lr(batches(), lowest=1e-12, highest=1e-11, steps=40)


def test_a_batch_size_grows_while_it_is_worth_it_and_fits() -> None:
    def make(size: int) -> TrainingStep:
        if size > 256:
            raise UnsupportedModel("too large", [])
        net = nn.Linear(8, 3)
        example = torch.zeros(size, 8), torch.zeros(size, dtype=torch.int64)
        step = compile_step(net, "cross_entropy", torch.optim.SGD(net.parameters(), 0.1), example, threads=1)
        assert isinstance(step, TrainingStep)
        return step

    assert find_batch_size(make, 10)[0] == 10
    assert find_batch_size(make, 20 * 64)[0] == 64
    assert find_batch_size(make, 10**6)[0] == 256
    with pytest.raises(UnsupportedModel):
        find_batch_size(lambda size: make(512), 10**6)


def test_rates_grow_by_one_factor() -> None:
    assert geometric(1e-3, 1.0, 4) == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])


def config(**options: object) -> TrainConfig:
    return make_config(
        {"dataset": "digits", "hidden": "16", "limit": 1300, "epochs": 2, "threads": 1, **options}
    )


def test_both_are_written_to_the_run_as_found(tmp_path: Path) -> None:
    result = run_training(config(lr="auto", batch_size="auto"), out=tmp_path, report=Reporter())
    stored = load_config(tmp_path / "config.toml")
    assert stored.batch_size == 64  # of 1,300 examples: 20 steps an epoch
    assert isinstance(stored.lr, float)
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert resume_training(tmp_path, report=Reporter(), epochs=3).epochs == 3


@pytest.mark.parametrize(
    "options", [{"lr": "soon"}, {"lr": "-1"}, {"lr": "nan"}, {"batch_size": "0"}, {"batch_size": "x"}]
)
def test_other_words_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        config(**options)
