"""Options of `train` as values: arguments of a model, numbers as typed, files of options."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from ane_trainer.ane.errors import UsageError
from ane_trainer.cli import run_command
from ane_trainer.training.config import TrainConfig, make_config


def test_arguments_of_a_model_are_read_as_written_and_kept_in_the_file() -> None:
    typed = ["width=16", "rate=0.5", "deep=true", "title=wide", "sizes=[1, 2]"]
    config = make_config({"dataset": "digits", "model_arg": typed})
    wanted = {"width": 16, "rate": 0.5, "deep": True, "title": "wide", "sizes": [1, 2]}
    assert config.model_options() == wanted
    assert TrainConfig(**tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("text", ["width", "=3", "a b=3"])
def test_arguments_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=VALUE"):
        make_config({"dataset": "digits", "model_arg": [text]})


@pytest.mark.parametrize(
    ("option", "typed"),
    [("lr", "-1e6"), ("epochs", "1e3"), ("batch_size", "0"), ("seed", "99999999999999999999")],
)
def test_a_number_in_a_message_is_the_number_that_was_typed(option: str, typed: str) -> None:
    with pytest.raises(UsageError, match=rf"got {typed}\. Change --{option.replace('_', '-')}"):
        make_config({"dataset": "digits", option: typed})


NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, num_classes)
        )
    def forward(self, x):
        return self.layers(x)
"""


def test_a_model_file_takes_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    options = [
        "train",
        "digits",
        "--model",
        "net.py:Net",
        "--limit",
        "128",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    assert run_command([*options, "--out", "a"]) == 1
    assert "ANE103" in capsys.readouterr().err
    assert run_command([*options, "--out", "b", "--model-arg", "width=5"]) == 0
    assert "width = 5" in (tmp_path / "b" / "config.toml").read_text()
    assert run_command(["evaluate", "b"]) == 0
