"""`debug` as typed: the shape comes of the data, the page is written, the exit code says whether the step agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ane_trainer.cli import run_command

NETS = """
from torch import nn

class Fine(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

class Loud(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self[1].weight.data *= 1e5
"""


def test_a_batch_of_data_brings_its_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    page = tmp_path / "page.html"
    assert (
        run_command(["debug", f"{tmp_path / 'nets.py'}:Fine", "--data", "digits", "--html", str(page)]) == 0
    )
    assert "agrees with fp32" in capsys.readouterr().out
    assert "<svg" in page.read_text()


def test_a_step_that_departs_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    code = run_command(["debug", f"{tmp_path / 'nets.py'}:Loud", "--input", "64", "--no-rewrites", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (code == 3) == (not found["agrees"])
    assert code == 3
