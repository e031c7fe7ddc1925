"""The options that `check`, `estimate`, `debug` and `trace` share, and what each says of subjects that do not fit."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.cli import run_command
from ane_trainer.commands import check_runs
from ane_trainer.commands.model_options import Asked, names_of

COMMANDS = ("check", "estimate", "debug", "trace")

ODD = """
import torch
from torch import nn

class Flat(nn.Linear):
    def __init__(self, width=4):
        super().__init__(6, width)

class Keyword(Flat):
    def forward(self, x, *, scale):
        return super().forward(x) * scale

class Features(Flat):
    def forward(self, **features):
        return super().forward(features["x"])

class Batch(Flat):
    def forward(self, batch):
        return super().forward(batch["x"])

class Number(Flat):
    def forward(self, x):
        return super().forward(x).sum()

class Nowhere(nn.Linear):
    def __init__(self):
        super().__init__(6, 4, device="meta")

class Fixed(Flat):
    def forward(self, x):
        return super().forward(x.reshape(12, 6))

class Half(nn.Linear):
    def __init__(self):
        super().__init__(6, 4, dtype=torch.float16)
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "odd.py").write_text(ODD)
    b = Builder()
    text, _ = print_program(Program((b.finish((b.op("relu", x=b.input("x", TensorType("fp16", (1, 4)))),)),)))
    (tmp_path / "relu.mil").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_options_are_the_same() -> None:
    shared = inspect.signature(Asked, eval_str=True).parameters
    for name in COMMANDS:
        function = getattr(importlib.import_module(f"ane_trainer.commands.{name}"), name)
        parameters = inspect.signature(function).parameters
        assert list(parameters)[: len(shared)] == list(shared)
        assert all(parameters[key].annotation == value.annotation for key, value in shared.items())
    assert names_of("m1, m4,m1") == ["m1", "m4"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["odd.py:Keyword"], "ANE104", "needs scale by keyword"),
        (["odd.py:Features"], "ANE104", "needs **features by keyword"),
        (["odd.py:Batch"], "DATA105", "indexed by a name: wrap the model in one whose forward takes tensors"),
        (["odd.py:Number"], "ANE104", "one number for the batch"),
        (["odd.py:Nowhere"], "ANE103", "weight, bias without"),
        (["odd.py:Fixed"], "DATA105", "--batch if the model takes one size alone"),
        (["odd.py:Flat", "--model-arg", "name=x"], "ANE104", "cannot pass name"),
        (["odd.py:Flat", "--model-arg", "depth=2"], "ANE103", "'depth'"),
        (["gpt"], "ANE103", "--input 64"),
    ],
)
def test_what_does_not_fit_is_said(
    odd: Path, capsys: pytest.CaptureFixture[str], command: str, words: list[str], code: str, said: str
) -> None:
    shape = [] if words == ["gpt"] else ["--input", "6"]
    assert run_command([command, *words, *shape, "--json"]) == 1
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["code"] == code
    assert said in error["message"]


@pytest.mark.parametrize("words", [["Fixed", "--batch", "12"], ["Half"], ["Flat", "--model-arg", "width=3"]])
def test_models_of_one_batch_of_halves_and_with_arguments(
    odd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(check_runs, "_LIGHT", 1e-9)  # as of a large model
    assert run_command(["check", f"odd.py:{words[0]}", "--input", "6", *words[1:], "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["chips"][0]["verdict"] == "trains"
    assert ("all of them" in found["sampled"]) == (words[0] == "Fixed")  # no fewer can be run


def test_what_a_program_does_not_take_is_said(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="relu.mil is a program.* --batch and --loss change nothing"):
        assert run_command(["check", "relu.mil", "--batch", "4", "--loss", "mse"]) == 0
    for words, said in (
        (["debug", "relu.mil", "--data", "digits"], "--data: needs a model"),
        (["debug", "relu.mil", "--feed", "x.npy"], "--feed: needs name=file.npy"),
        (["debug", "odd.py:Flat", "--input", "6", "--feed", "x=x.npy"], "--feed: needs a program"),
        (["estimate", "relu.mil", "--epochs", "3"], "Give --steps N"),
    ):
        assert run_command(words) == 1
        assert said in capsys.readouterr().err


def test_a_layer_of_keras_says_what_is_wrong() -> None:
    from ane_trainer.commands.subjects import _said

    text = "Exception encountered when calling Sequential.call().\n\n\x1b[1mneeds 8, got 9\x1b[0m\n\nArguments: x"
    assert _said(ValueError(text)) == "needs 8, got 9"
    assert _said(RuntimeError("one\ntwo")) == "one"
    assert _said(TypeError()) == "TypeError"


def test_examples_are_drawn_in_the_models_own_halves() -> None:
    from ane_trainer.commands.subjects import _random

    model = torch.nn.Linear(2, 2)
    assert _random((2,), "float", 3, model).dtype == torch.float32
    assert _random((2,), "float", 3, model.half()).dtype == torch.float16
