"""`bench`: devices in turn, honest words about each, names and sizes checked before anything runs."""

from __future__ import annotations

import json
import sys
from itertools import count

import pytest

from ane_trainer.ane.errors import EnvironmentFault, UsageError
from ane_trainer.cli import run_command
from ane_trainer.commands.bench import compare_devices, in_turn


def test_runs_take_turns_and_warm_up_first() -> None:
    order: list[str] = []
    ticks = count()
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    times = in_turn(runs, 3, clock=lambda: float(next(ticks)))
    assert order == ["a", "b"] * 5
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_devices_are_compared_with_plain_pytorch() -> None:
    found = compare_devices(
        "mlp", (1, 8, 8), 10, 16, "sgd", ["sim"], chip="m1", fidelity="fast", steps=2, threads=1
    )
    cpu, sim = found.rows
    assert (cpu.device, cpu.ratio, sim.device) == ("cpu", 1.0, "sim")
    assert 0 < sim.best_ms <= sim.median_ms
    assert sim.first_s > 0
    assert found.estimate is not None
    assert found.estimate["chip"] == "m1"
    text = found.as_text()
    assert "SIMULATOR of M1" in text
    assert "by the cost model" in text
    assert "says nothing about the engine's" in text
    columns = [line.index(word) for line, word in zip(
        text.splitlines()[1:], ("where", "CPU", "SIMULATOR", "M1's engine"), strict=False)]  # fmt: skip
    assert len(set(columns)) == 1


def test_the_command_prints_json_with_machine_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--devices", "cpu", "--input", "1x8x8", "--batch", "4", "--steps", "1", "--json"]
    assert run_command(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["device"] for row in found["rows"]] == ["cpu"]
    assert found["estimate"] is None
    assert {"seed", "threads", "batch", "optimizer"} < set(found)
    assert set(found["machine"]) == {"platform", "processor", "torch", "ane_trainer"}


@pytest.mark.parametrize(
    "changed", [{"devices": ["nix"]}, {"steps": 0}, {"batch": 0}, {"model": "nix"}, {"chip": "m0"}]
)
def test_bad_input_is_refused_before_anything_runs(changed: dict[str, object]) -> None:
    options = {
        "model": "mlp",
        "in_shape": (4,),
        "classes": 2,
        "batch": 2,
        "optimizer": "adam",
        "devices": ["sim"],
    }
    with pytest.raises(UsageError):
        compare_devices(**{**options, **changed})  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac may have the GPU")
def test_a_gpu_that_is_not_there_is_the_environments_fault() -> None:
    with pytest.raises(EnvironmentFault, match="Leave it out"):
        compare_devices("mlp", (4,), 2, 2, "adam", ["mps"])
