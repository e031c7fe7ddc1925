"""What the console shows of a run, on a terminal and elsewhere, and what trackers get."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from ane_trainer.ane.errors import MissingDependency, UsageError
from ane_trainer.training.folder.results import Epoch
from ane_trainer.training.reporting import loggers
from ane_trainer.training.reporting.loggers import make_logger, numbers_of
from ane_trainer.training.reporting.report import ConsoleReporter, Phases, Reporter, Reporters, wrapped

PROGRAM = {"ops": 207, "optimizer": "adam", "engine_flop_fraction": 1.0, "host_bytes_per_step": 16700}


def epoch(number: int, **values: object) -> Epoch:
    given = {"steps": 4, "train_loss": 0.5, "val_loss": 0.4, "val_accuracy": 0.9, "loss_scale": 16384.0}
    return Epoch(epoch=number, skipped_steps=0, seconds=2.0, **{**given, **values})  # type: ignore[arg-type]


def drive(reporter: Reporter, epochs: int = 2) -> None:
    """A run of four steps an epoch."""
    reporter.headline("SIMULATOR of M4 (generation A16)   (auto: no Neural Engine here, Linux x86_64)")
    reporter.activity("compiling")
    reporter.compiled(PROGRAM, 0.0)
    for number in range(1, epochs + 1):
        reporter.begin_epoch(number, epochs, 4)
        for step in range(4):
            reporter.step(1.0 / (step + 1), 16384.0, 0)
        reporter.end_epoch(epoch(number))
    reporter.close()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_lines_have_no_words_that_only_we_know() -> None:
    stream = io.StringIO()
    drive(ConsoleReporter(stream))
    text = stream.getvalue()
    assert "epoch 2/2  loss 0.5000  accuracy 90.00%  2.0 s" in text
    assert "one program of 207 ops" in text
    for word in ("scale", "skipped", "FLOPs", "fidelity"):
        assert word not in text
    stream = io.StringIO()
    drive(ConsoleReporter(stream, verbose=True))
    for word in ("scale 16384", "skipped 0", "100% of the step's FLOPs", "16.7 KB"):
        assert word in stream.getvalue()


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_broken(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    drive(ConsoleReporter(stream, verbose=True))
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= columns
    told = " ".join(" ".join(lines).split())
    assert "(auto: no Neural Engine here, Linux x86_64)" in told
    assert "forward + loss + backward + adam, 207 ops, 100% of the step's FLOPs" in told


def test_the_bar_shows_count_percent_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    reporter = ConsoleReporter(stream)
    reporter.begin_epoch(1, 3, 200)
    for _ in range(50):
        reporter.step(0.5, 1.0, 0)
    text = reporter._running(1.0, 0, reporter._began + 10)
    reporter.close()
    assert text == "50/200 25%  0:10 < 0:30  loss 0.5000  all done in 1:50"
    assert len(f"epoch 1/3 {'-' * 10} {text}") <= 80


def test_the_phases_add_up_to_the_whole() -> None:
    phases = Phases(started=100.0)
    phases.switch("compile", 103.0)
    phases.switch("train", 104.0)
    phases.switch("test", 114.0)
    phases.switch("train", 115.0)
    phases.switch("save", 125.0)
    phases.switch("end", 125.01)
    assert phases.seconds == pytest.approx({"start": 3, "compile": 1, "train": 20, "test": 1, "save": 0.01})


def test_the_console_accounts_for_all_of_its_time() -> None:
    reporter = ConsoleReporter(io.StringIO())
    drive(reporter)
    text = reporter.phases.as_text()
    assert sum(reporter.phases.seconds.values()) == pytest.approx(
        reporter.phases._mark - _began(reporter), abs=1e-6
    )
    assert re.match(r"\d+ (us|ms):", text)


def _began(reporter: ConsoleReporter) -> float:
    return reporter.phases._mark - sum(reporter.phases.seconds.values())


def test_a_reader_that_leaves_does_not_stop_the_run() -> None:
    read, write = os.pipe()
    with open(write, "w", buffering=1) as stream:
        reporter = ConsoleReporter(stream)
        reporter.note("data", "seen")
        os.close(read)
        drive(reporter)


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = make_logger("tensorboard", tmp_path, {"lr": 0.1})
    logger.begin_epoch(1, 2, 20)
    for step in range(20):
        logger.step(1.0 - step / 100, 1.0, 0)
    logger.end_epoch(epoch(1))
    logger.begin_epoch(2, 2, 20)
    logger.end_epoch(epoch(2, train_loss=0.25, val_accuracy=None))
    logger.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = [(event.step, round(event.value, 6)) for event in found.Scalars("train/loss")]
    assert losses == [(10, 0.91), (20, 0.81), (20, 0.5), (20, 0.25)]
    assert [round(event.value, 6) for event in found.Scalars("val/accuracy")] == [0.9]
    assert "lr = 0.1" in str(found.Tensors("options/text_summary"))


def test_numbers_that_are_not_known_are_not_told() -> None:
    found = numbers_of(epoch(3, val_loss=None, val_accuracy=None, train_loss=float("nan")))
    run = {"run/steps": 4.0, "run/loss_scale": 16384.0, "run/skipped_steps": 0.0, "run/seconds": 2.0}
    assert found == {"epoch": 3.0, **run}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_other_trackers_where_they_are_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    module = pytest.importorskip(name)
    for _ in range(2):  # the second goes on with the same run
        drive(Reporters(Reporter(), make_logger(name, tmp_path, {"lr": 0.1, "hidden": (3, 4)})))
    assert capfd.readouterr().out == ""
    if name == "mlflow":
        run = module.MlflowClient().get_run((tmp_path / ".mlflow-run").read_text())
        assert run.data.metrics["val/accuracy"] == 0.9
        assert run.data.params["lr"] == "0.1"
    kept = {"wandb": "wandb/offline-run-*", "mlflow": "mlruns/*", "trackio": "trackio/*"}
    assert list(tmp_path.glob(kept[name]))


def test_unknown_and_absent_trackers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'") as unknown:
        make_logger("tensorbord", tmp_path)
    assert unknown.value.code == "ANE121"
    absent = loggers.Tracker("no-such-package", "no_such_module", loggers._wandb)
    monkeypatch.setitem(loggers.TRACKERS, "absent", absent)
    with pytest.raises(MissingDependency, match="pip install no-such-package"):
        make_logger("absent", tmp_path)


def test_a_number_stays_with_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = wrapped("time     19.0 s: start 7.8 s, compile 4.7 s, train 1.2 s", Terminal()).splitlines()
    assert len(lines) > 1
    assert not any(line.strip().startswith("s,") or line.endswith(tuple("0123456789")) for line in lines)
