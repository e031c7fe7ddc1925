"""Scores of outputs against scikit-learn's, charts and images as files that others can read."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

import ane_trainer as at
from ane_trainer.ane.chips.timeline import timeline
from ane_trainer.training.reporting.analysis import ClassAnalysis, NumberAnalysis, analyse
from ane_trainer.training.reporting.charts import line_chart, png, ticks
from ane_trainer.training.reporting.option_charts import dot_chart
from ane_trainer.training.reporting.step_charts import step_charts

RNG = np.random.default_rng(3)


def batches(output: torch.Tensor, y: torch.Tensor, size: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The outputs themselves as inputs, so that the model is the identity."""
    return [(output[i : i + size], y[i : i + size]) for i in range(0, len(y), size)]


def test_class_scores_are_those_of_scikit_learn() -> None:
    y = torch.from_numpy(RNG.choice(8, 200, p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05, 0.0]))
    output = torch.from_numpy(RNG.normal(size=(200, 8))) + 1.5 * torch.nn.functional.one_hot(y, 8)
    found = analyse(lambda x: x, batches(output, y))
    assert isinstance(found, ClassAnalysis)
    said = output.argmax(1)
    labels = range(8)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        y, said, labels=labels, zero_division=0
    )
    assert [row.precision for row in found.classes] == pytest.approx(precision)
    assert [row.recall for row in found.classes] == pytest.approx(recall)
    assert [row.f1 for row in found.classes] == pytest.approx(f1)
    assert found.confusion_TP.tolist() == metrics.confusion_matrix(y, said, labels=labels).tolist()
    assert found.accuracy == pytest.approx(metrics.accuracy_score(y, said))
    present = sorted(set(y.tolist()))
    assert found.balanced_accuracy == pytest.approx(recall[present].mean())
    assert found.macro_f1 == pytest.approx(metrics.f1_score(y, said, labels=present, average="macro"))
    assert found.top5_accuracy == pytest.approx(metrics.top_k_accuracy_score(y, output, k=5, labels=labels))
    loss = torch.nn.functional.cross_entropy(output, y, reduction="none")
    assert [sample.index for sample in found.worst] == loss.argsort(descending=True)[:16].tolist()
    assert [sample.loss for sample in found.worst] == pytest.approx(sorted(loss.tolist(), reverse=True)[:16])


def test_calibration_error_is_the_mean_gap_by_bins() -> None:
    probability = torch.tensor([0.95] * 10 + [0.65] * 10, dtype=torch.float64)
    output = torch.stack([probability, 1 - probability], dim=1).log()
    y = torch.tensor([0] * 9 + [1] + [0] * 3 + [1] * 7)
    found = analyse(lambda x: x, batches(output, y))
    assert isinstance(found, ClassAnalysis)
    assert [(b.count, round(b.confidence, 6), b.accuracy) for b in found.calibration] == [
        (10, 0.65, 0.3),
        (10, 0.95, 0.9),
    ]
    assert found.calibration_error == pytest.approx((0.35 + 0.05) / 2)


def test_number_scores_are_those_of_scikit_learn_in_the_numbers_own_unit() -> None:
    truth, error = RNG.normal(50, 9, size=(60, 2)), RNG.normal(size=(60, 2))
    y = torch.from_numpy((truth - 50) / 9)
    output = torch.from_numpy((truth + error - 50) / 9)
    found = analyse(lambda x: x, batches(output, y), ("a", "b"), scale=((50.0, 50.0), (9.0, 9.0)))
    assert isinstance(found, NumberAnalysis)
    for k, row in enumerate(found.numbers):
        assert row.mae == pytest.approx(metrics.mean_absolute_error(truth[:, k], (truth + error)[:, k]))
        assert row.rmse == pytest.approx(metrics.root_mean_squared_error(truth[:, k], (truth + error)[:, k]))
        assert row.r2 == pytest.approx(metrics.r2_score(truth[:, k], (truth + error)[:, k]))


def test_what_is_neither_is_not_analysed() -> None:
    text = torch.zeros(2, 5, 7)
    assert analyse(lambda x: x, [(text, torch.zeros(2, 5, dtype=torch.int64))]) is None
    assert analyse(lambda x: x, []) is None


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_even_and_hold_the_range(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-6 * width
    assert found[-1] >= low + width * (1 - 1e-6)
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_a_chart_is_svg_with_every_value_in_it() -> None:
    curves = {"train <1>": [(1, 0.5), (2, 0.25)], "val": [(1, 0.6), (2, None), (3, float("nan"))]}
    root = ET.fromstring(line_chart(curves, "loss & co"))
    space = "{http://www.w3.org/2000/svg}"
    assert [title.text for title in root.iter(f"{space}title")] == [
        "train <1> 1: 0.5",
        "train <1> 2: 0.25",
        "val 1: 0.6",
    ]
    lines = [line.attrib["points"].split() for line in root.iter(f"{space}polyline")]
    assert [len(line) for line in lines] == [2, 1]
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in lines[0])
    assert x0 < x1
    assert y0 < y1  # a smaller loss is lower down
    assert line_chart({"a": []}, "empty") == ""


def test_a_chart_has_a_grid_both_ways_axes_and_the_line_of_equals() -> None:
    curve = {"price": [(100.0, 120.0), (300.0, 280.0)]}
    plain, equals = (line_chart(curve, "said over true", identity=identity) for identity in (False, True))
    grid = re.findall(r'<path d="(M[^"]*)"', plain)[0]
    assert grid.count("H") >= 4
    assert grid.count("V") >= 4
    assert plain.count("stroke-dasharray") == 0
    (line,) = re.findall(r'<path d="M([\d. ]+)L([\d. ]+)" stroke="currentColor" stroke-dasharray', equals)
    (a, b), (c, d) = (map(float, point.split()) for point in line)
    assert a < c
    assert b > d


def test_a_step_of_several_programs_is_one_roofline_and_one_memory() -> None:
    """They were as many of both as there are programs, all of one name."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    batch = torch.rand(8, 6), torch.arange(8) % 3
    step = at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), batch)
    one = timeline(step.program, "m4")
    for count in (1, 2):
        charts = step_charts([one] * count)
        assert len(charts) == 2
        for chart in charts:
            assert ("2 programs in turn" in chart) == (count == 2)
            ET.fromstring(chart)
        assert charts[1].count("the engine begins") == count
        assert charts[0].count("<circle") == count * step_charts([one])[0].count("<circle")
    assert step_charts([]) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_a_png_of_its_pixels(channels: int) -> None:
    image = RNG.normal(size=(channels, 5, 4))
    data = base64.b64decode(png(image).partition("base64,")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (4, 5)
    at = data.index(b"IDAT")
    length = struct.unpack(">I", data[at - 4 : at])[0]
    rows = np.frombuffer(zlib.decompress(data[at + 4 : at + 4 + length]), np.uint8).reshape(
        5, 1 + 4 * channels
    )
    wanted = (image - image.min()) / (image.max() - image.min()) * 255
    assert np.array_equal(
        rows[:, 1:].reshape(5, 4, channels), wanted.round().astype(np.uint8).transpose(1, 2, 0)
    )


def test_dots_of_an_option_stand_where_its_values_are():
    """A logarithmic axis for numbers, a place each for words; nothing for one value."""
    svg = dot_chart(
        [(1e-4, 0.1, "a"), (1e-3, 0.5, "b"), (1e-2, 0.9, "c")], "loss by lr", "lr", logarithmic=True
    )
    across = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    assert "1e-3" in svg
    svg = dot_chart(
        [("adam", 0.1, "a"), ("sgd", 0.5, "b"), ("adam", 0.2, "c")], "loss by optimizer", "optimizer"
    )
    assert len(set(re.findall(r'<circle cx="([\d.]+)"', svg))) == 2
    assert dot_chart([("adam", 0.1, "a")], "loss by optimizer", "optimizer") == ""
    ET.fromstring(svg)
