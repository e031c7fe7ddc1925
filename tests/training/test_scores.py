"""Scores beside accuracy: what torchmetrics computes from the same outputs, each epoch, kept and refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ane_trainer import Reporter, Trainer
from ane_trainer.ane.errors import UsageError
from ane_trainer.core import evaluate_run, predict_run, resume_training, run_training
from ane_trainer.training.config import make_config

classification = pytest.importorskip("torchmetrics.classification")
regression = pytest.importorskip("torchmetrics.regression")

DIGITS = {"dataset": "digits", "limit": 256, "batch_size": 64, "hidden": (8,), "device": "cpu", "threads": 1,
          "epochs": 1}  # fmt: skip


def test_each_epoch_is_scored_and_a_resumed_run_keeps_the_scores(tmp_path: Path) -> None:
    result = run_training(
        make_config({**DIGITS, "metrics": "auroc,f1"}), out=tmp_path / "r", report=Reporter()
    )
    assert [name for name, _ in result.history[0].scores] == ["auroc", "f1"]
    resume_training(tmp_path / "r", report=Reporter(), epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["val_auroc"] == dict(result.history[0].scores)["auroc"]
    assert "val_f1" in (tmp_path / "r" / "metrics.csv").read_text().splitlines()[0]
    found = evaluate_run(tmp_path / "r", limit=256)
    assert found["metrics"] == pytest.approx(
        {"auroc": rows[1]["val_auroc"], "f1": rows[1]["val_f1"]}, abs=1e-6
    )
    assert found["metrics"]["f1"] == pytest.approx(found["scores"]["macro_f1"], abs=1e-4)


def test_numbers_are_scored_in_the_unit_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    rows = [f"{a:.4f},{1000 + 50 * a:.4f}" for a in random.normal(size=80)]
    Path("t.csv").write_text("a,price\n" + "\n".join(rows) + "\n")
    options = {
        **DIGITS,
        "dataset": "t.csv",
        "limit": None,
        "target": ("price",),
        "metrics": "mae,r2",
        "batch_size": 8,
    }
    run_training(make_config(options), out="r", report=Reporter())
    found = evaluate_run("r")
    said = predict_run("r", index="0:8")["predictions"]
    errors = [abs(row["values"]["price"] - float(row["truth"])) for row in said]
    assert found["metrics"]["mae"] == pytest.approx(float(np.mean(errors)), rel=1e-3)


def test_a_trainer_takes_metrics_of_its_own() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    own = {"kappa": classification.MulticlassCohenKappa(num_classes=2)}
    trainer = Trainer(torch.nn.Linear(4, 2), device="cpu", metrics=own, report=Reporter())
    record = trainer.fit([(x, y)], epochs=1, val=[(x[:40], y[:40]), (x[40:], y[40:])]).history[0]
    whole = classification.MulticlassCohenKappa(num_classes=2)
    whole.update(trainer.predict(x), y)
    assert dict(record.scores)["kappa"] == pytest.approx(float(whole.compute()))


@pytest.mark.parametrize("name", ["aurocc", "confusion_matrix"])
def test_what_is_no_single_number_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metrics: "):
        run_training(make_config({**DIGITS, "metrics": name}), out=tmp_path / "r", report=Reporter())
