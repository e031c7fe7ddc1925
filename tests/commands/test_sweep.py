"""Tests of `sweep`: every trial is trained once, also when the sweep was killed, and what its file may say."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ane_trainer.ane.errors import UsageError
from ane_trainer.cli import run_command
from ane_trainer.training.sweeps import PAGE, TABLE, open_study, outcome, read_sweep

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
trials = {trials}
[train]
dataset = "digits"
epochs = 1
limit = 64
batch_size = 16
[search]
lr = {{ low = 1e-3, high = 1e-1, log = true }}
hidden = {{ choices = ["8", "16,8"] }}
"""


def written(folder: Path, text: str = SWEEP.format(trials=3)) -> Path:
    file = folder / "sweep.toml"
    file.write_text(text)
    return file


def started(file: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ane_trainer", "sweep", str(file), "--out", str(out), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def killed_after(file: Path, out: Path, finished: int, *, all_of_them: bool) -> None:
    """Start the sweep and kill it, or it and its trainings, when so many runs have a result."""
    process = started(file, out)
    while len(list(out.glob("trial-*/result.json"))) < finished:
        assert process.poll() is None
        time.sleep(0.02)
    if all_of_them:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def check_whole(out: Path, trials: int) -> None:
    """Each trial once, finished, with the run that its options belong to."""
    rows = list(csv.DictReader((out / TABLE).read_text().splitlines()))
    assert sorted(int(row["trial"]) for row in rows) == list(range(trials))
    assert {row["status"] for row in rows} == {"finished"}
    assert sorted(p.name for p in out.glob("trial-*/")) == [f"trial-{n:04d}" for n in range(trials)]
    for row in rows:
        assert f"lr = {float(row['lr'])!r}" in (Path(row["run"]) / "config.toml").read_text()
        assert len((Path(row["run"]) / "metrics.jsonl").read_text().splitlines()) == 1
    values = [float(row["val_accuracy"]) for row in rows]
    assert values == sorted(values, reverse=True)


def test_a_killed_sweep_goes_on_and_neither_loses_nor_repeats_a_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = written(tmp_path, SWEEP.format(trials=2)), tmp_path / "out"
    killed_after(file, out, 1, all_of_them=False)  # what it was training goes on, and is waited for
    assert run_command(["sweep", str(file), "--out", str(out), "--jobs", "2"]) == 0
    assert "2 of 2 trials" in capsys.readouterr().out
    check_whole(out, 2)
    before = {p: p.stat().st_mtime_ns for p in out.glob("trial-*/result.json")}
    assert run_command(["sweep", str(file), "--out", str(out)]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("trial-*/result.json")}
    page = (out / PAGE).read_text()
    assert "<svg" in page
    assert page.count('/report.html">') == 2


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(2, 5)])
def test_eight_runs_killed_twice_with_their_trainings(tmp_path: Path, kills: tuple[int, ...]) -> None:
    file, out = written(tmp_path, SWEEP.format(trials=8)), tmp_path / "out"
    for finished in kills:
        killed_after(file, out, finished, all_of_them=True)
    assert run_command(["sweep", str(file), "--out", str(out), "--jobs", "2"]) == 0
    check_whole(out, 8)


@pytest.mark.slow
def test_on_a_local_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    file, out = written(tmp_path, SWEEP.format(trials=2)), tmp_path / "out"
    command = [sys.executable, "-m", "ane_trainer", "sweep", str(file), "--out", str(out), "--engine", "ray"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=1500)
    check_whole(out, 2)


def test_a_training_that_fails_is_told_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SWEEP.format(trials=1).replace("limit = 64", 'limit = 64\nmodel = "nowhere.py:Net"')
    assert run_command(["sweep", str(written(tmp_path, text)), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "trial 0: failed" in said.err
    assert "nowhere.py" in said.err
    assert "0 of 1 trials" in said.out


def test_a_sweep_without_a_result_does_not_end_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No trial finished: it ended with 0. `--jobs -1` ended in a traceback."""
    (tmp_path / "s.toml").write_text(
        'trials = 1\n[train]\ndataset = "nowhere.csv"\n[search]\nlr = { choices = [0.1, 0.2] }\n'
    )
    words = ["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "out")]
    assert run_command([*words, "--jobs", "-1"]) == 1
    assert "'--jobs'" in capsys.readouterr().err
    assert run_command(words) == 1
    assert "0 of 1 trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hidden =", "hiden =", "search.hiden is no option of train. Did you mean 'hidden'"),
        ("high = 1e-1", "high = 1e-4", "search.lr needs choices, or low below high"),
        ("epochs = 1", 'epochs = "many"', "epochs"),
        ("trials = 3", "trials = 0", "trials"),
        ("trials = 3", 'sampler = "grid"', "grid needs choices for every option; lr has none"),
    ],
)
def test_what_is_wrong_in_the_file_is_said(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = written(tmp_path, SWEEP.format(trials=3).replace(old, new))
    with pytest.raises(UsageError, match=said):
        open_study(read_sweep(file), tmp_path)


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path))
    open_study(sweep, tmp_path)
    open_study(sweep.model_copy(update={"trials": 9}), tmp_path)  # more trials are no other sweep
    with pytest.raises(UsageError, match="differ now") as refused:
        open_study(sweep.model_copy(update={"train": {"dataset": "mnist"}}), tmp_path)
    assert refused.value.code == "ANE107"


def test_the_outcome_is_that_of_the_last_or_best_epoch(tmp_path: Path) -> None:
    from ane_trainer.training.folder.records import RunRecord

    sweep = read_sweep(written(tmp_path))
    record = RunRecord(tmp_path, {}, ({"val_accuracy": 0.9}, {"val_accuracy": 0.7}), None, 0.0)
    assert outcome(record, sweep) == 0.7
    assert outcome(record, sweep.model_copy(update={"best": True})) == 0.9
    assert outcome(record, sweep.model_copy(update={"metric": "val_loss"})) is None


def test_the_last_trial_is_taken_once_by_several_hosts(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path)).model_copy(update={"trials": 2})
    first, second = open_study(sweep, tmp_path), open_study(sweep, tmp_path)
    taken = [study.next() for study in (first, second, first, second)]
    assert [trial.number if trial else None for trial in taken] == [0, 1, None, None]
