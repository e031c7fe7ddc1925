"""`debug` from the command line: exit codes, the tree, the page, and models of odd kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.cli import run_command
from tests.training.debugging.programs import program_of, softmax

NETS = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.facts, self.head = nn.Linear(16, 8), nn.Linear(4, 8), nn.Linear(8, 3)
    def forward(self, image, facts):
        return self.head(torch.relu(self.image(image.flatten(1)) + self.facts(facts)))

class Inverse(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)
    def forward(self, x):
        return self.head(torch.linalg.inv(x.reshape(-1, 4, 4) + 9 * torch.eye(4)).flatten(1))

class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
    def forward(self, x):
        return self.head(x.reshape(-1, 5))

class Fine(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

class Loud(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self[1].weight.data *= 1e5
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_inputs_and_the_page(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["debug", "nets.py:Two", "--input", "1x4x4,4", "--html", "page.html"]
    assert run_command(words) == 0
    assert "agrees with fp32" in capsys.readouterr().out
    assert (nets / "page.html").read_text().count("<svg") > 10


def test_a_refused_model_and_one_that_raises(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["debug", "nets.py:Inverse", "--input", "16"]) == 3
    assert "nets.py:" in capsys.readouterr().out
    assert run_command(["debug", "nets.py:Raises", "--input", "4"]) == 1
    assert "nets.py, line" in capsys.readouterr().err


def test_a_program(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = print_program(program_of(softmax))
    (nets / "soft.mil").write_text(text)
    assert run_command(["debug", "soft.mil", "--json"]) == 3
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["verdict"] == "departs"
    assert (found["faults"][0]["op"], found["faults"][0]["rule"]) == ("exp", "table-end")
    assert any(remedy["heals"] for remedy in found["faults"][0]["remedies"])


def test_a_loss_scale_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["debug", "mlp", "--loss-scale", "much"]) == 1
    assert "ANE104" in capsys.readouterr().err


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
