"""Runs that nothing can spoil: locks, free folders, kept checkpoints, kill -9 at any moment."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ane_trainer import Reporter
from ane_trainer.ane.errors import (
    AneTrainerError,
    CheckpointError,
    Diverged,
    EnvironmentFault,
    Interrupted,
    UsageError,
)
from ane_trainer.core import evaluate_run, resume_training, run_training
from ane_trainer.training.checkpoint import BEFORE, CHECKPOINT, read_tensors, write_tensors
from ane_trainer.training.config import TrainConfig, load_config, make_config
from ane_trainer.training.folder.records import read_record
from ane_trainer.training.folder.runs import BEST, RunFolder, claim_run, open_run
from ane_trainer.training.reporting.report import summary

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
MODEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, in_shape, num_classes):
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
            nn.Linear(256, num_classes),
        )
"""


def config(**options: Any) -> TrainConfig:
    plain = {"dataset": "digits", "batch_size": 64, "epochs": 2, "limit": 256, "threads": 1, "lr": 5e-3}
    return make_config({**plain, **({} if "model" in options else {"hidden": (16,)}), **options})


class At(Reporter):
    """Does something after so many steps."""

    def __init__(self, step: int, action: Any) -> None:
        self.left, self.action = step, action

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()


def interrupted(out: Path, step: int = 3, number: int = signal.SIGINT, **options: Any) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        run_training(config(**options), out=out, report=At(step, lambda: os.kill(os.getpid(), number)))
    return caught.value


def weights(run: Path) -> dict[str, torch.Tensor]:
    return RunFolder(run).read_weights().state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_writer_is_told_the_process(tmp_path: Path) -> None:
    refused: list[AneTrainerError] = []

    def again() -> None:
        for attempt in (lambda: run_training(config(device="cpu"), out=tmp_path / "run", report=Reporter()),
                        lambda: resume_training(tmp_path / "run", report=Reporter())):  # fmt: skip
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} does") as caught:
                attempt()
            refused.append(caught.value)

    run_training(config(device="cpu"), out=tmp_path / "run", report=At(2, again))
    assert [error.code for error in refused] == ["CKPT109"] * 2
    assert not (tmp_path / "run" / ".lock").exists()


def test_default_folders_are_each_process_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with claim_run(None, "digits-mlp") as first, claim_run(None, "digits-mlp") as second:
        assert first.path != second.path
        (first.path / CHECKPOINT).touch()
    assert first.path.exists()
    with pytest.raises(ZeroDivisionError), claim_run(None, "digits-mlp") as third:
        raise ZeroDivisionError
    assert not third.path.exists()


def test_a_failed_start_blocks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_training(config(device="cpu", epochs=1), report=Reporter())
    good = open_run("last").path
    out = tmp_path / "mine"
    with pytest.raises(AneTrainerError):
        run_training(config(batch_size=4000), out=out, report=Reporter())
    assert not out.exists()
    out.mkdir()
    (out / "config.toml").write_text(
        config(epochs=1).to_toml()
    )  # what a killed start of an older version left
    (tmp_path / "runs" / "dead").mkdir()
    (tmp_path / "runs" / "dead" / "config.toml").write_text(config().to_toml())
    assert open_run("last").path == good
    assert resume_training(out, report=Reporter(), device="cpu").epochs == 1
    with pytest.raises(CheckpointError, match="holds one already"):
        run_training(config(), out=out, report=Reporter())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_write_a_checkpoint_as_ctrl_c_does(number: int, tmp_path: Path) -> None:
    stopped = interrupted(tmp_path / "run", 5, number, device="cpu", epochs=3)
    assert stopped.exit_code == 128 + number
    assert f"--resume {tmp_path / 'run'}" in str(stopped)
    assert RunFolder(tmp_path / "run").read_checkpoint()[0].scalars["progress"]["steps"] == 5


def test_a_signal_before_training_begins_says_so(tmp_path: Path) -> None:
    class Early(Reporter):
        def note(self, topic: str, text: str) -> None:
            if topic == "model":
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="before training began") as caught:
        run_training(config(device="cpu"), out=tmp_path / "run", report=Early())
    assert caught.value.exit_code == 143
    assert not (tmp_path / "run").exists()


def test_checkpoints_come_by_steps_and_some_are_kept(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(Reporter):
        def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
            found = RunFolder(tmp_path / "run").read_checkpoint()[0]
            seen.append(found.scalars["progress"]["steps"])

    run_training(
        config(device="cpu", epochs=3, save_every="3", keep_every=2), out=tmp_path / "run", report=Watch()
    )
    assert seen == [0, 0, 0, 3, 4, 4, 4, 7, 8, 8, 8, 11]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["epoch-0002.safetensors"]
    assert (
        read_tensors(tmp_path / "run" / "checkpoints" / kept[0], scalars=True).scalars["progress"]["epoch"]
        == 2
    )
    best = read_tensors(tmp_path / "run" / BEST, scalars=False).tensors
    assert best.keys() == weights(tmp_path / "run").keys()


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("1", True),
        ("500", True),
        ("10min", True),
        ("0.5m", True),
        ("0", False),
        ("soon", False),
        ("1.5", False),
    ],
)
def test_save_every_takes_steps_and_minutes(text: str, good: bool) -> None:
    if good:
        interval = config(save_every=text).save_interval
        assert interval.steps or interval.seconds
    else:
        with pytest.raises(UsageError, match="10min"):
            config(save_every=text)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    run_training(config(device="cpu"), out=tmp_path / "whole", report=Reporter())
    cut = tmp_path / "cut"
    interrupted(cut, 7, device="cpu")
    data = bytearray((cut / CHECKPOINT).read_bytes())
    data[-1] ^= 1
    (cut / CHECKPOINT).write_bytes(data)
    notes: list[str] = []

    class Notes(Reporter):
        def note(self, topic: str, text: str) -> None:
            notes.append(f"{topic}: {text}")

    resume_training(cut, report=Notes())
    assert any("warning: the last checkpoint is left out" in note and "checksum" in note for note in notes)
    assert same(weights(cut), weights(tmp_path / "whole"))
    for name in (CHECKPOINT, BEFORE):
        (cut / name).write_bytes(b"")
    before = (cut / "config.toml").read_bytes()
    with pytest.raises(CheckpointError, match=CHECKPOINT):
        resume_training(cut, report=Reporter(), epochs=5)
    assert (cut / "config.toml").read_bytes() == before


def test_a_resume_that_fails_touches_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(run, 6)
    for name in (CHECKPOINT, BEFORE):
        found = read_tensors(run / name, scalars=True)
        found.tensors.pop("step/fc1.weight/exp_avg")
        write_tensors(run / name, found.tensors, found.scalars)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(CheckpointError, match="exp_avg is missing"):
        resume_training(run, report=Reporter(), epochs=9)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_threads_and_device_may_change_on_resume_and_others_may_not(tmp_path: Path) -> None:
    run_training(config(), out=tmp_path / "whole", report=Reporter())
    interrupted(tmp_path / "cut")
    assert resume_training(tmp_path / "cut", report=Reporter(), threads=2, device="sim").steps == 8
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    with pytest.raises(UsageError, match="device that runs programs"):
        resume_training(tmp_path / "cut", report=Reporter(), device="cpu", epochs=3)


def test_a_changed_seed_is_noticed_on_resume(tmp_path: Path) -> None:
    interrupted(tmp_path, device="cpu")
    path = tmp_path / "config.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(UsageError, match=r"seed of its config\.toml differ"):
        resume_training(tmp_path, report=Reporter())


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a = " + b"[" * 100_000, b"seed ="])
def test_a_configuration_that_is_none_is_said(data: bytes, tmp_path: Path) -> None:
    interrupted(tmp_path, device="cpu")
    (tmp_path / "config.toml").write_bytes(data)
    with pytest.raises(UsageError, match="not TOML"):
        resume_training(tmp_path, report=Reporter())


def test_metrics_that_cannot_be_read_block_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path, 6, device="cpu")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert resume_training(tmp_path, report=Reporter()).epochs == 2


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    run_training(config(device="cpu", epochs=3), out=tmp_path / "whole", report=Reporter())
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[0][1]))

    try:
        with pytest.raises(EnvironmentFault, match="Make room") as caught:
            run_training(config(device="cpu", epochs=3), out=out, report=At(5, full))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert caught.value.code == "ANE204"
    assert not list(out.glob(".*.tmp"))
    assert RunFolder(out).read_checkpoint()[0].scalars["progress"]["epoch"] == 1
    resume_training(out, report=Reporter())
    assert same(weights(out), weights(tmp_path / "whole"))


def test_an_interrupted_run_can_be_evaluated(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 5, device="cpu")
    assert evaluate_run(tmp_path / "run", limit=128)["examples"] == 128


def test_a_run_holds_its_model_and_works_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    Path("nets.py").write_text(MODEL)
    result = run_training(config(model="nets.py:Net", device="cpu"), out=tmp_path / "run", report=Reporter())
    Path("nets.py").write_text(MODEL.replace("nn.ReLU()", "nn.Tanh()"))
    monkeypatch.chdir(tmp_path)
    with pytest.warns(
        UserWarning, match="nets.py was changed since the run began; the run's own copy is used"
    ):
        found = evaluate_run(tmp_path / "run", limit=256)
    assert found["test_accuracy"] == result.test_accuracy
    (tmp_path / "a" / "nets.py").unlink()
    assert evaluate_run(tmp_path / "run", limit=256)["test_accuracy"] == result.test_accuracy


def test_a_run_s_configuration_names_every_option(tmp_path: Path) -> None:
    run_training(config(device="cpu", epochs=1, hidden=None), out=tmp_path, report=Reporter())
    stored = load_config(tmp_path / "config.toml")
    assert (stored.hidden, stored.activation, stored.lr) == ((256,), "gelu", 5e-3)
    text = (tmp_path / "config.toml").read_text()
    assert all(name in text for name in TrainConfig.model_fields)


def test_no_run_ends_well_with_nan(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training(config(device="cpu"), out=run, report=Reporter())
    good = weights(run)
    RunFolder(run).write_weights({name: value * torch.nan for name, value in good.items()})
    with pytest.raises(CheckpointError, match="nan"):
        evaluate_run(run)
    RunFolder(run).write_weights({name: value.clone().fill_(1e30) for name, value in good.items()})
    with pytest.raises((Diverged, AneTrainerError)):
        evaluate_run(run, device="sim")


def ended_and_resumed(options: dict[str, Any], out: Path, times: int, seed: int, how: str) -> int:
    """Train in processes that end at random moments, and on to the end; how many hit one at work."""
    command = [
        sys.executable,
        "-m",
        "tests.training.killing",
        json.dumps(options),
        str(out),
        str(times),
        str(seed),
        how,
    ]
    root = Path(__file__).parents[2]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def options_of(kind: str, folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "nets.py").write_text(MODEL)
    model = {"model": f"{folder / 'nets.py'}:Net", "hidden": None} if kind != "mlp" else {}
    more = {"augment": ("shift=1",), "schedule": "cosine", "ema": 0.9} if kind == "augmented" else {}
    return config(save_every="1", **options).model_dump() | model | more


@pytest.mark.parametrize("written", range(2, 11))
def test_an_end_after_any_checkpoint_costs_no_bit(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the one that follows an epoch's last batch: the epoch is not trained twice."""
    options = {"device": "cpu", "save_every": "1"}
    run_training(config(**options), out=tmp_path / "whole", report=Reporter())
    write, left = RunFolder.write_checkpoint, [written]

    def ends(self: RunFolder, *arguments: Any, **named: Any) -> None:
        write(self, *arguments, **named)
        left[0] -= 1
        if not left[0]:
            raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_checkpoint", ends)
        with pytest.raises(ZeroDivisionError):
            run_training(config(**options), out=tmp_path / "run", report=Reporter())
    assert resume_training(tmp_path / "run", report=Reporter()).steps == 8
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "full"])
def test_an_end_at_any_moment_costs_no_bit(how: str, tmp_path: Path) -> None:
    options = options_of("cnn", tmp_path, epochs=3)
    run_training(make_config(options), out=tmp_path / "whole", report=Reporter())
    assert ended_and_resumed(options, tmp_path / "ended", 5, 7, how) >= 3
    assert same(weights(tmp_path / "ended"), weights(tmp_path / "whole"))
    assert len((tmp_path / "ended" / "metrics.jsonl").read_text().splitlines()) == 3
    assert not [path.name for path in (tmp_path / "ended").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGHUP", "full"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "augmented"])
def test_fifty_ends_cost_no_bit(kind: str, how: str, tmp_path: Path) -> None:
    epochs = 800 if kind == "mlp" else 400  # a quick machine ends before the fiftieth otherwise
    options = options_of(kind, tmp_path, epochs=epochs)
    run_training(make_config(options), out=tmp_path / "whole", report=Reporter())
    assert ended_and_resumed(options, tmp_path / "ended", 50, 11, how) == 50
    assert same(weights(tmp_path / "ended"), weights(tmp_path / "whole"))


def test_what_is_said_is_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = (
        rng.standard_normal((96, 4)),
        rng.integers(0, 2, 96),
    )  # nothing to learn: the first epochs are the best
    np.savez(tmp_path / "noise.npz", x=x.astype(np.float32), y=y)
    options = make_config(
        {
            "dataset": str(tmp_path / "noise.npz"),
            "best": True,
            "monitor": "val_loss",
            "epochs": 30,
            "device": "cpu",
        }
    )
    result = run_training(options, out=tmp_path / "run", report=Reporter())
    best = min(result.history, key=lambda record: record.val_loss or 0.0)
    assert best.epoch < len(result.history) == 30
    assert result.weights_epoch == best.epoch
    closing = summary(result)
    assert f"validation loss {best.val_loss:.4f}   train loss {best.train_loss:.4f}" in closing
    assert f"(weights of epoch {best.epoch})" in closing
    assert read_record(tmp_path / "run").kept("val_loss") == best.val_loss
    assert f"{best.val_loss:.4g}" in (tmp_path / "run" / "report.html").read_text()
