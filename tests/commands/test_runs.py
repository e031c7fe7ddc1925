"""Run folders listed, shown, compared, drawn and deleted; the file of options; report.html."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from ane_trainer.cli import run_command
from ane_trainer.commands.runs import sparkline
from ane_trainer.training.config import TrainConfig, make_config
from ane_trainer.training.folder.records import as_csv, find_records, find_run, read_record
from ane_trainer.training.folder.results import Epoch
from ane_trainer.training.reporting.analysis import classes_of, numbers_of
from ane_trainer.training.reporting.page import page
from ane_trainer.training.reporting.watching import CsvReporter, write_report


def epoch(number: int, accuracy: float) -> dict[str, object]:
    return {
        "epoch": number, "steps": 5, "train_loss": 1 / number, "val_loss": 2 / number, "val_accuracy": accuracy,
        "loss_scale": 8192.0, "skipped_steps": 0, "seconds": 0.5,
    }  # fmt: skip


def make(folder: Path, *accuracies: float, finished: bool = True, **options: object) -> Path:
    """A run's folder as training leaves it, by hand."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(make_config({"dataset": "digits", **options}).to_toml())
    rows = [epoch(number, accuracy) for number, accuracy in enumerate(accuracies, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        result = {
            "test_accuracy": accuracies[-1], "test_loss": 0.25, "parameters": 1234, "seconds_per_step": 0.002,
            "placement": {"where": "simulator of M4, exact", "how": "it is <known>"}, "health": {"weights": "in band"},
            "estimate": {"title": "M4", "latency_us": 120.0, "energy_uj": None, "error_band": 0.1, "provenance": "x"},
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs in runs/: one finished, one interrupted, one in which nothing was trained."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "good", 0.5, 0.9)
    make(tmp_path / "runs" / "cut", 0.4, finished=False, lr=0.5)
    make(tmp_path / "runs" / "none", finished=False)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert run_command(words) == code
    found = capsys.readouterr()
    return found.err if code else found.out


def test_the_last_run_is_the_one_that_was_trained_last(folder: Path) -> None:
    """An export into an older one, or a trace of it, does not make it the last."""
    for age, name in enumerate(("cut", "good")):
        for file in (folder / "runs" / name).iterdir():
            os.utime(file, (1e9 - age, 1e9 - age))
    (folder / "runs" / "good" / "model.onnx").write_text("")
    (folder / "runs" / "good" / "trace.json").write_text("{}")
    assert find_run("last") == Path("runs/cut")


def test_the_list_fits_a_narrow_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    (folder / "runs" / "good").rename(folder / "runs" / "houses-mlp-2026-11-30-1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert run_command(("runs", "list")) == 0
    assert max(map(len, terminal.getvalue().splitlines())) <= 80
    assert "houses-mlp-2026-11-30-1" in terminal.getvalue()


def test_the_list_has_every_run_with_its_state(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split() for line in shown(capsys, "runs", "list", "--sort", "accuracy").splitlines()]
    assert [(row[0], row[3]) for row in rows[1:]] == [
        ("runs/none", "empty"), ("runs/cut", "interrupted"), ("runs/good", "finished"),
    ]  # fmt: skip
    assert rows[3][4:7] == ["2/5", "90.00%", "0.2500"]
    found = json.loads(shown(capsys, "runs", "list", "--json"))["runs"]
    assert {row["run"]: row["accuracy"] for row in found} == {
        "runs/good": 0.9,
        "runs/cut": 0.4,
        "runs/none": None,
    }
    assert "Did you mean 'accuracy'" in shown(capsys, "runs", "list", "--sort", "acuracy", code=1)
    assert "no runs in nowhere" in shown(capsys, "runs", "list", "--root", "nowhere")


def test_a_run_is_found_by_folder_name_and_last(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("runs/cut", "cut"):
        text = shown(capsys, "runs", "show", name)
        assert "interrupted" in text
        assert "--resume runs/cut" in text
    assert "val_accuracy     ▁█  0.5 -> 0.9" in shown(capsys, "runs", "show", "good")
    assert read_record("last").status != "empty"
    assert "CKPT101" in shown(capsys, "runs", "show", "nowhere", code=1)


def test_compare_shows_what_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        line.split()[0]: line.split()[1:]
        for line in shown(capsys, "runs", "compare", "good", "cut").splitlines()
    }
    assert rows["lr"] == ["0.5"]
    assert rows["test_accuracy"] == ["90.00%"]
    assert "epochs" not in rows


def test_plot_draws_every_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "drawn into c.svg" in shown(capsys, "runs", "plot", "good", "cut", "--out", "c.svg")
    titles = [title.text for title in ET.parse("c.svg").getroot().iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["runs/good 1: 0.5", "runs/good 2: 0.9", "runs/cut 1: 0.4"]
    assert "Did you mean 'train_loss'" in shown(capsys, "runs", "plot", "good", "--what", "trainloss", code=1)


def test_rm_asks_and_deletes_runs_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs --yes" in shown(capsys, "runs", "rm", "good", code=1)
    assert (folder / "runs" / "good").exists()
    assert "deleted  runs/none" in shown(capsys, "runs", "rm", "--empty", "--yes")
    (folder / "precious").mkdir()
    assert "CKPT101" in shown(capsys, "runs", "rm", "precious", "--yes", code=1)
    assert (folder / "precious").exists()
    assert [record.name for record in find_records()] == ["good", "cut"] or len(find_records()) == 2


def test_damaged_files_of_a_run_are_left_out(folder: Path) -> None:
    run = folder / "runs" / "good"
    (run / "metrics.jsonl").write_bytes(
        (run / "metrics.jsonl").read_bytes() + b'\xff\xfe{"epoch": 3\n[1]\n' + b"[" * 100_000
    )
    (run / "result.json").write_bytes(b"\0\0")
    record = read_record(run)
    assert (len(record.history), record.result, record.accuracy) == (2, None, 0.9)
    (run / "config.toml").write_bytes(b"\xff" * 50)
    assert "good" not in [record.name for record in find_records()]


def test_a_curve_fits_one_line() -> None:
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([3.0]) == "▁"
    assert len(sparkline(list(range(1000)))) == 32


def test_init_writes_all_options_and_train_reads_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, "init", "digits")
    text = Path("run.toml").read_text()
    assert TrainConfig(**tomllib.loads(text)) == TrainConfig(dataset="digits")
    for name, field in TrainConfig.model_fields.items():
        assert f"{name} = " in text
        assert (field.description or "").split()[0] in text
    changed = "\n".join(
        line.removeprefix("# ") if " = " in line and "..." not in line else line for line in text.splitlines()
    )
    assert TrainConfig(**tomllib.loads(changed)) == TrainConfig(dataset="digits")
    assert "ANE120" in shown(capsys, "init", code=1)


class Reader(HTMLParser):
    """Counts tags, and fails where one is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(60, 1, 4, 4)).astype(np.float32), rng.integers(0, 3, 60)
    analysis = classes_of(rng.normal(size=(60, 3)), labels, ("a", "<b>", "c"), images)
    ops = [{"name": "t1", "op": "matmul", "latency_us": 2.0, "flops": 99, "bytes": 8, "bound_by": "mac"}]
    text = page(read_record(folder / "runs" / "good"), analysis, ops, {"data": "digits & co"})
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.seen.count("svg") == 4  # loss, accuracy, seconds, calibration
    assert reader.seen.count("img") == 32
    assert all(link.startswith("data:") for link in reader.links)
    for told in (
        "&lt;b&gt;",
        "90.00%",
        "matmul",
        "it is &lt;known&gt;",
        "in band",
        "digits &amp; co",
        "120 us (+-10%)",
    ):
        assert told in text, told
    for section in (
        "Curves",
        "Per class",
        "Confusion matrix",
        "Calibration",
        "Worst",
        "Random",
        "Health",
        "Options",
    ):
        assert section in text


def test_the_page_of_a_regression_and_of_a_run_without_a_result(folder: Path) -> None:
    rng = np.random.default_rng(1)
    reader = Reader()
    text = page(
        read_record(folder / "runs" / "cut"),
        numbers_of(rng.normal(size=(50, 1)), rng.normal(size=(50, 1)), ("price",)),
    )
    reader.feed(text)
    assert reader.open == []
    assert "price: predicted over true" in text
    assert text.count("<circle") >= 50
    assert "Confusion" not in text
    assert "Health" not in text
    (folder / "runs" / "cut" / "result.json").write_text('{"health": {}}')
    assert "No update had gradients out of the engine's range" in page(read_record(folder / "runs" / "cut"))


def test_many_classes_are_told_by_their_commonest_mistakes(folder: Path) -> None:
    labels = np.arange(60).repeat(2)
    scores = np.eye(60)[labels]
    scores[0] = np.eye(60)[7]
    analysis = classes_of(scores, labels, (), np.zeros((120, 3), np.float32))
    text = page(read_record(folder / "runs" / "good"), analysis)
    assert "taken for" in text
    assert "class='matrix'" not in text


def test_the_report_of_a_folder_holds_what_the_model_says(folder: Path) -> None:
    run = folder / "runs" / "good"
    x, y = torch.eye(4), torch.arange(4)
    write_report(run, lambda batch: 9 * batch, [(x[:3], y[:3]), (x[3:], y[3:])])
    found = json.loads((run / "analysis.json").read_text())
    assert (found["examples"], found["accuracy"]) == (4, 1.0)
    assert "Per class" in (run / "report.html").read_text()
    write_report(folder / "runs" / "cut")
    assert "Curves" in (folder / "runs" / "cut" / "report.html").read_text()


def test_metrics_csv_has_the_epochs_of_metrics_jsonl(folder: Path) -> None:
    run = folder / "runs" / "good"
    record = Epoch(2, 5, 0.1, None, 0.75, 1.0, 0, 0.5)
    CsvReporter(run).end_epoch(record)  # epoch 2 again, as after a resume
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [(row["epoch"], row["val_accuracy"], row["val_loss"]) for row in rows] == [
        ("1", "0.5", "2.0"),
        ("2", "0.75", ""),
    ]
    assert as_csv([]) == "\n"


def test_metrics_csv_that_cannot_be_written_is_an_environment_fault(tmp_path: Path) -> None:
    from ane_trainer.ane.errors import EnvironmentFault
    from ane_trainer.training.folder.results import Epoch
    from ane_trainer.training.reporting.watching import CsvReporter

    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match=r"metrics\.csv: needs a place that can be written"):
        CsvReporter(tmp_path / "file").end_epoch(Epoch(1, 4, 1.0, None, None, 1.0, 0, 0.1))
