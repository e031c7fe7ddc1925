"""Checkpoints: what is not whole is refused before anything changed; interrupts at any moment cost no bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ane_trainer import Reporter, Trainer
from ane_trainer.ane.dispatch.state import MODEL, STEP, StepState, part
from ane_trainer.ane.errors import CheckpointError
from ane_trainer.data import load_dataset
from ane_trainer.training.checkpoint import CHECKPOINT, read_tensors, write_tensors
from ane_trainer.training.loop import Batch

OLD = Path(__file__).parents[1] / "data" / "checkpoint-v1"


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    xs = torch.rand(6, 4, 5, generator=generator)
    ys = torch.randint(0, 3, (6, 4), generator=generator)
    return list(zip(xs, ys, strict=True))


def model() -> nn.Module:
    torch.manual_seed(0)
    torch.rand(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.25), nn.Linear(4, 3))


def trainer(device: str = "sim", net: nn.Module | None = None) -> Trainer:
    net = net or model()
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    return Trainer(net, "cross_entropy", adam, device=device, threads=1, report=Reporter())


def resumed(path: Path) -> Trainer:
    return Trainer.resume(path, model=model(), report=Reporter())


def weights(found: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in found.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    first = trainer()
    first.fit(batches(), epochs=2)
    return first.save(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_comes_back_whole_and_is_compiled_for_once(version: int, saved: Path) -> None:
    path = OLD if version == 1 else saved
    stored = read_tensors(path / CHECKPOINT, scalars=True)
    found = resumed(path)
    found.fit(batches(), epochs=0)
    assert found.step is not None
    assert found.step.compiles == 1
    kept, state = part(stored.tensors, STEP), found.step.state_dict()
    assert same({name: state[name] for name in kept}, kept)
    assert same(weights(found), part(stored.tensors, MODEL))
    assert (found.progress.epoch, found.progress.steps) == (2, 12)
    found.fit(batches(), epochs=1)
    assert found.history[-1].train_loss < found.history[0].train_loss


@pytest.mark.parametrize("slot", ["square_avg", "sum", "acc_delta", "max_exp_avg_sq"])
def test_means_of_squares_of_an_earlier_version_are_refused(slot: str) -> None:
    """They were kept without the correction for their bias."""
    tensors = {"w/residual": torch.zeros(1), f"w/{slot}": torch.zeros(1), "unit/w": torch.ones(())}
    with pytest.raises(CheckpointError, match=r"CKPT108.*squares"):
        StepState.of(tensors)


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


def without(name: str) -> Change:
    return lambda tensors, scalars: tensors.pop(name)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, scalars: tensors.update({name: change(tensors[name])})


def scalar(*path: str, value: object) -> Change:
    def change(tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        place = scalars
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


BROKEN: dict[str, tuple[Change, str, str]] = {
    "a weight of the engine": (without("step/0.weight"), "CKPT107", "0.weight is missing"),
    "a moment": (without("step/0.weight/exp_avg"), "CKPT107", "exp_avg is missing"),
    "the loss scale": (without("step/step/loss_scale"), "CKPT107", "loss_scale is missing"),
    "a unit": (without("step/unit/0.weight"), "CKPT107", "unit/0.weight is missing"),
    "the counters": (without("step/counters"), "CKPT107", "counters is missing"),
    "the generator": (without("step/mask_generator"), "CKPT107", "mask_generator is missing"),
    "a shape": (changed("step/0.weight", lambda t: t.T.contiguous()), "CKPT107", r"shape \[5, 4\]"),
    "nan in a moment": (changed("step/0.bias/exp_avg", lambda t: t * torch.nan), "CKPT107", "4 numbers"),
    "inf in a weight": (changed("step/0.bias", lambda t: t + torch.inf), "CKPT107", "nan or inf"),
    "a scale that is none": (changed("step/step/loss_scale", lambda t: t * 3), "CKPT107", "power of two"),
    "counters below zero": (changed("step/counters", lambda t: t - 100), "CKPT107", "three counts"),
    "a generator of another kind": (changed("step/mask_generator", lambda t: t[:9]), "CKPT107", "generator"),
    "a state of the follower": (
        lambda tensors, scalars: tensors.update({"step/choices": torch.zeros(2)}), "CKPT108", "followed",
    ),
    "a weight of the model": (without("model/0.weight"), "CKPT106", "0.weight is missing"),
    "nan in the model": (changed("model/0.weight", lambda t: t * torch.nan), "CKPT107", "0.weight has 20"),
    "integers as weights": (changed("model/0.weight", lambda t: t.int()), "CKPT106", "int32"),
    "no progress": (lambda tensors, scalars: scalars.pop("progress"), "CKPT107", "no progress"),
    "an epoch below zero": (scalar("progress", "epoch", value=-5), "CKPT107", "epoch is -5"),
    "an epoch as text": (scalar("progress", "epoch", value="three"), "CKPT107", "epoch is 'three'"),
    "a foreign history": (scalar("history", value=[{"a": 1}]), "CKPT107", "history 1: epoch is missing"),
    "a short history": (scalar("history", value=[]), "CKPT107", "0 epochs in the history, 2"),
    "a foreign state of the data": (scalar("data", value=[1]), "CKPT107", "state of the data"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_whole_is_refused_and_changes_nothing(what: str, saved: Path, tmp_path: Path) -> None:
    change, code, message = BROKEN[what]
    found = read_tensors(saved / CHECKPOINT, scalars=True)
    change(found.tensors, found.scalars)
    write_tensors(tmp_path / CHECKPOINT, found.tensors, found.scalars)
    net = nn.Sequential(*model())
    with pytest.raises(CheckpointError, match=message) as caught:
        Trainer.resume(tmp_path, model=net, report=Reporter()).fit(batches())
    assert caught.value.code == code


def test_one_flipped_bit_is_noticed(saved: Path, tmp_path: Path) -> None:
    data = bytearray((saved / CHECKPOINT).read_bytes())
    data[-3] ^= 4
    (tmp_path / CHECKPOINT).write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum") as caught:
        resumed(tmp_path)
    assert caught.value.code == "CKPT103"


def test_equal_checkpoints_are_equal_files(saved: Path, tmp_path: Path) -> None:
    found = read_tensors(saved / CHECKPOINT, scalars=True)
    write_tensors(tmp_path / CHECKPOINT, found.tensors, found.scalars)
    assert (tmp_path / CHECKPOINT).read_bytes() == (saved / CHECKPOINT).read_bytes()


class Moment(Reporter):
    """Sends a signal after so many steps, and as many times."""

    def __init__(self, after: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.left, self.number, self.times = after, number, times

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        self.left -= 1
        for _ in range(self.times if self.left == 0 else 0):
            os.kill(os.getpid(), self.number)


class Unsized:
    """Data that does not know its length."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(batches())


def data_of(kind: str) -> Any:
    if kind == "digits":
        return load_dataset("digits", 16, 0, limit=48)[0]
    return Unsized() if kind == "unsized" else batches()[:3]


def net_of(kind: str) -> nn.Module | None:
    if kind != "digits":
        return None
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("device", "kind", "moments"),
    [("cpu", "list", range(1, 7)), ("cpu", "unsized", (6, 7, 12)), ("sim", "digits", (2, 3, 4, 6))],
)
def test_an_interrupt_after_any_step_costs_no_bit(
    device: str, kind: str, moments: Iterator[int], tmp_path: Path
) -> None:
    data = data_of(kind)
    whole = trainer(device, net_of(kind))
    whole.fit(data, epochs=2, val=data)
    for moment in moments:
        cut = trainer(device, net_of(kind))
        cut.report = Moment(moment, signal.SIGTERM if moment % 2 else signal.SIGINT)
        data = data_of(kind)
        with pytest.raises(KeyboardInterrupt) as caught:
            cut.fit(data, epochs=2, val=data)
        assert caught.value.args == (cut.report.number,)
        cut.save(tmp_path)
        again = Trainer.resume(tmp_path, model=net_of(kind) or model(), report=Reporter())
        data = data_of(kind)
        again.fit(data, epochs=2 - again.progress.epoch, val=data)
        assert again.progress.steps == whole.progress.steps
        assert same(weights(again), weights(whole)), moment
        assert again.history[-1].train_loss == whole.history[-1].train_loss


def test_a_second_ctrl_c_changes_nothing(tmp_path: Path) -> None:
    cut = trainer("cpu")
    cut.report = Moment(2, times=2)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(batches(), epochs=2)
    assert cut.progress.steps == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_an_interrupt_between_two_updates_keeps_the_gradients(device: str, tmp_path: Path) -> None:
    def make() -> Trainer:
        net = model()
        return Trainer(net, device=device, accumulate=4, threads=1, report=Reporter())

    whole, cut = make(), make()
    whole.fit(batches(), epochs=2)
    cut.report = Moment(3)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(batches(), epochs=2)
    again = Trainer.resume(cut.save(tmp_path), model=model(), report=Reporter())
    again.fit(batches(), epochs=2)
    assert same(weights(again), weights(whole))
