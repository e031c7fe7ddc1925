"""Tests of ane_trainer/training/scores.py against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from ane_trainer.data import DataDescription
from ane_trainer.training.scores import Scores, scores_table

RANDOM = np.random.default_rng(0)


def collected(description, outputs, y):
    scores = Scores(description)
    for start in range(0, len(y), 7):
        scores.add(torch.tensor(outputs[start : start + 7]), torch.tensor(y[start : start + 7]))
    return scores.to_json()


def test_precision_recall_and_f1_by_class():
    names = ("a", "b", "c", "never")
    outputs, y = RANDOM.normal(size=(60, 4)), RANDOM.integers(0, 3, 60)
    outputs[:, 3] = -9
    found = collected(DataDescription("d", "array", "classify", (1,), names), outputs, y)
    answer = outputs.argmax(axis=1)
    wanted = metrics.precision_recall_fscore_support(y, answer, labels=range(4), zero_division=0)
    for row, values in zip(found["classes"], zip(*wanted, strict=True), strict=True):
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(values)
    assert np.array_equal(found["confusion"], metrics.confusion_matrix(y, answer, labels=range(4)))
    assert found["macro_f1"] == pytest.approx(np.mean(wanted[2]))
    assert "never" in scores_table(found)


def test_labels():
    outputs, y = RANDOM.normal(size=(50, 3)), RANDOM.integers(0, 2, (50, 3)).astype(np.float32)
    found = collected(DataDescription("d", "array", "multilabel", (1,), ("a", "b", "c")), outputs, y)
    wanted = metrics.precision_recall_fscore_support(y, outputs > 0, zero_division=0)
    for row, values in zip(found["classes"], zip(*wanted, strict=True), strict=True):
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(values)


def test_a_regression_in_the_units_of_its_target():
    description = DataDescription(
        "d", "array", "regress", (1,), ("price", "size"), target_mean=(10.0, -3.0), target_std=(2.0, 5.0)
    )
    outputs, y = RANDOM.normal(size=(40, 2)), RANDOM.normal(size=(40, 2))
    found = collected(description, outputs, y)["targets"]
    truth, answer = (v * [2.0, 5.0] + [10.0, -3.0] for v in (y, outputs))
    for k, row in enumerate(found):
        assert row["mean_absolute_error"] == pytest.approx(
            metrics.mean_absolute_error(truth[:, k], answer[:, k])
        )
        assert row["root_mean_square_error"] == pytest.approx(
            metrics.root_mean_squared_error(truth[:, k], answer[:, k])
        )
        assert row["r2"] == pytest.approx(metrics.r2_score(truth[:, k], answer[:, k]))


def test_perplexity():
    outputs, y = RANDOM.normal(size=(9, 5, 4)), RANDOM.integers(0, 5, (9, 4))
    found = collected(DataDescription("d", "text", "next-token", (4,), vocabulary=tuple("abcde")), outputs, y)
    wanted = torch.nn.functional.cross_entropy(torch.tensor(outputs), torch.tensor(y))
    assert found["perplexity"] == pytest.approx(math.exp(float(wanted)), rel=1e-6)
    assert found["tokens"] == 36
