"""Steps from the disk: the same step, and another one wherever anything that it was made of is another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.capture import capture_training
from ane_trainer.ane.capture.calibrate import witness
from ane_trainer.ane.capture.range.switch import NORMS, limited_to
from ane_trainer.ane.dispatch import guards, recall

FACTOR = 1.0


def factor() -> float:
    """A name that a forward calls, and whose result no key can see."""
    return FACTOR


class Net(nn.Module):
    def __init__(self, width: int = 4, rate: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 3)
        self.dropout, self.power = nn.Dropout(rate), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.dropout(torch.relu(self.first(x)) * self.power))
        return out * factor()


Make = Callable[[], tuple[nn.Module, Any, torch.optim.Optimizer, tuple[torch.Tensor, torch.Tensor]]]


def made(**options: Any) -> tuple[nn.Module, Any, torch.optim.Optimizer, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = Net(**options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return model, "cross_entropy", optimizer, (torch.randn(6, 5), torch.randint(0, 3, (6,)))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recall, "folder", lambda: tmp_path)
    monkeypatch.setattr("ane_trainer.ane.dispatch.loading.memory_of", recall.memory_of)
    return tmp_path


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each capture."""
    found: list[int] = []
    real = capture_training

    def counting(*args: Any, **keywords: Any) -> Any:
        found.append(1)
        return real(*args, **keywords)

    monkeypatch.setattr("ane_trainer.ane.dispatch.loading.capture_training", counting)
    return found


def step_of(build: Any, **options: Any) -> Any:
    model, loss, optimizer, example = build
    return at.compile_step(model, loss, optimizer, example=example, threads=1, **options)


def test_a_recalled_step_is_the_same_step(captures: list[int]) -> None:
    results = []
    for _ in range(2):
        build = made()
        step = step_of(build)
        x, y = build[3]
        losses = [float(step(x * k, y)) for k in (1.0, 0.5, 2.0)]
        weights = torch.cat([p.detach().flatten() for p in build[0].parameters()])
        results.append(
            (losses, weights, step.text(), step.compiled.fingerprint, step.loss_scale, str(step.cost()))
        )
        assert step.agreement.agrees
    assert len(captures) == 1
    first, second = results
    assert torch.equal(first[1], second[1])
    assert first[:1] + first[2:] == second[:1] + second[2:]


def test_plain_pytorch_runs_once_more_only_to_recall(
    captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the calibration has found is noted; with random draws the pass is run again, from a seed."""
    runs: list[None] = []
    monkeypatch.setattr(recall, "witness", lambda *args: runs.append(None) or witness(*args))
    for rate, expected in ((0.0, [0, 1]), (0.5, [1, 2])):
        runs.clear()
        for number in expected:
            model, loss, optimizer, example = made(rate=rate)
            at.compile_step(model, loss, optimizer, example)
            assert len(runs) == number
    assert len(captures) == 2


def test_the_graph_of_a_recalled_step_is_captured_when_it_is_asked_for(captures: list[int]) -> None:
    own = step_of(made()).host_side[1].capture.captured
    again = step_of(made()).host_side[1].capture
    assert len(captures) == 1
    assert again.captured.as_text() == own.as_text()
    assert len(captures) == 2


def test_without_rewrites_nothing_is_recalled_or_kept(captures: list[int]) -> None:
    step_of(made())
    with limited_to({NORMS}):
        step_of(made())
        step_of(made())
    step_of(made())
    assert len(captures) == 3


def scaled(model: Any) -> None:
    model.power = 0.5


def frozen(model: Any) -> None:
    model.first.weight.requires_grad_(False)


def nudged(model: Any) -> None:
    with torch.no_grad():
        model.first.bias[0] += 2.0**-20


@pytest.mark.parametrize("change", [scaled, frozen, nudged, lambda model: model.eval()])
def test_a_changed_model_is_captured(captures: list[int], change: Callable[[nn.Module], None]) -> None:
    step_of(made(rate=0.5))
    build = made(rate=0.5)
    change(build[0])
    step_of(build)
    assert len(captures) == 2


@pytest.mark.slow
def test_other_settings_are_captured(captures: list[int]) -> None:
    model, loss, _, (x, y) = made()
    step_of(made())
    count = 1
    for options in ({"clip_grad_norm": 1.0}, {"chip": "m1"}, {"accumulate": 2}, {"blocks": "off"}):
        step_of(made(), **options)
        count += 1
    others: list[torch.optim.Optimizer] = [
        torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1),
        torch.optim.SGD(model.parameters(), lr=1e-2),
        torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=1e-2),
    ]
    for optimizer in others:
        step_of((model, loss, optimizer, (x, y)))
        count += 1
    for loss, example in (
        (lambda out, y: nn.functional.cross_entropy(out, y) * 2, (x, y)),
        (lambda out, y: nn.functional.cross_entropy(out, y) * 3, (x, y)),
        ("cross_entropy", (x * 2, y)),
        ("cross_entropy", (x[:4], y[:4])),
    ):
        again, _, optimizer, _ = made()
        step_of((again, loss, optimizer, example))
        count += 1
    assert len(captures) == count


def test_what_no_key_can_see_shows_in_the_loss(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    step_of(made())
    monkeypatch.setattr(guards.Guards, "portable", lambda self: [])
    step_of(made())
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 1.01)
    step_of(made())
    assert len(captures) == 3
    step_of(made())
    assert len(captures) == 3


def test_a_file_that_changed_is_read_again(
    captures: list[int], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = place / "helper_of_recall.py"
    helper.write_text("x = 1\n")
    monkeypatch.syspath_prepend(place)
    __import__("helper_of_recall")
    step_of(made())
    step_of(made())
    assert len(captures) == 1
    helper.write_text("x = 22\n")
    step_of(made())
    assert len(captures) == 2


def test_hooks_and_foreign_optimizers_are_not_kept(captures: list[int], place: Path) -> None:
    for _ in range(2):
        build = made()
        build[0].register_forward_hook(lambda module, args, out: out * 1.0)
        step_of(build)
    assert len(captures) == 2
    assert not [path for path in place.iterdir() if len(path.name) == 64]


def test_a_damaged_entry_is_compiled_again(captures: list[int], place: Path) -> None:
    step_of(made())
    (entry,) = (path for path in place.iterdir() if len(path.name) == 64)
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    step_of(made())
    assert len(captures) == 2
    step_of(made())
    assert len(captures) == 2


def test_only_values_of_the_engine_are_made_of_a_file() -> None:
    import io
    import pickle

    for harmful in (os.system, print, subprocess.Popen):
        with pytest.raises(pickle.UnpicklingError):
            recall._Reader(io.BytesIO(pickle.dumps(harmful))).load()


def test_a_running_draw_is_part_of_what_is_known(captures: list[int]) -> None:
    step_of(made(rate=0.5))
    step_of(made(rate=0.5))
    assert len(captures) == 1
    build = made(rate=0.5)
    torch.manual_seed(7)
    step_of(build)
    assert len(captures) == 2


SCRIPT = """
import json, torch, ane_trainer as at
from ane_trainer.ane.dispatch import loading
seen, real = [], loading.capture_training
loading.capture_training = lambda *a, **k: seen.append(1) or real(*a, **k)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.kinds = torch.nn.Linear(4, 3), {"one", "two", "three"}
    def forward(self, x):
        return self.inner(x) * FACTOR
torch.manual_seed(0)
model, x, y = Net(), torch.randn(5, 4), torch.randint(0, 3, (5,))
step = at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), example=(x, y), threads=1)
print(json.dumps([len(seen), float(step(x, y))]))
"""


@pytest.mark.slow
def test_another_process_recalls_what_was_typed_in(tmp_path: Path) -> None:
    def run(text: str) -> list[float]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        found = subprocess.run(
            [sys.executable, "-"], input=text, env=environment, capture_output=True, text=True, check=True
        )
        return list(json.loads(found.stdout.splitlines()[-1]))

    first, second = (run("FACTOR = 1.0\n" + SCRIPT) for _ in range(2))
    assert (first[0], second[0]) == (1, 0)
    assert first[1] == second[1]
    assert run("FACTOR = 1.5\n" + SCRIPT)[0] == 1
    assert run("FACTOR = 1.0\n" + SCRIPT.replace("self.inner(x)", "(self.inner(x) + 1)"))[0] == 1
