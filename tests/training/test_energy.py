"""Energy and placement up to the border of Apple's counters: unknown without them, joules where they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import ane_trainer as at
from ane_trainer.ane.errors import UsageError
from ane_trainer.cli import run_command
from ane_trainer.commands import placement
from ane_trainer.training import energy
from ane_trainer.training.reporting.report import ConsoleReporter, Reporter, summary

BATCHES = [(torch.rand(4, 6), torch.tensor([0, 1, 0, 1]))] * 3


class Monitor:
    """The interface of `zeus_apple_silicon.AppleEnergyMonitor`: a window gives millijoules by rail."""

    rails: object = SimpleNamespace(cpu_total_mj=900, ane_mj=250)

    def begin_window(self, key: str) -> None:
        self.key = key

    def end_window(self, key: str) -> object:
        assert key == self.key
        return self.rails


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> type[Monitor]:
    """A Mac's counters: their package, and the engine's name for the simulator's device."""
    module = ModuleType("zeus_apple_silicon")
    module.AppleEnergyMonitor = Monitor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
    monkeypatch.setattr(energy, "on_apple_silicon", lambda: True)
    monkeypatch.setattr(energy, "_ENGINES", ("sim",))
    monkeypatch.setattr(Monitor, "rails", Monitor.rails)
    return Monitor


def train(epochs: int = 2) -> at.Result:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 2)
    return at.Trainer(model, device="sim", report=Reporter()).fit(BATCHES, epochs=epochs)


def test_joules_of_each_epoch_and_of_all(on_a_mac: type[Monitor]) -> None:
    result = train()
    assert [epoch.energy_joules for epoch in result.history] == [0.25, 0.25]
    assert result.energy_joules == result.to_json()["energy_joules"] == 0.5
    assert result.to_json()["history"][0]["energy_joules"] == 0.25
    assert "energy   0.50 J, 0.25 J an epoch" in summary(result)


def test_a_missing_counter_is_unknown_and_not_zero(
    on_a_mac: type[Monitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rails in (SimpleNamespace(ane_mj=None), SimpleNamespace(cpu_total_mj=1)):
        monkeypatch.setattr(Monitor, "rails", rails)
        assert train(1).energy_joules is None

    def refuse(self: Monitor, *key: str) -> None:
        raise RuntimeError("no counters")

    for method in ("begin_window", "end_window", "__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(Monitor, method, refuse)
            assert train(1).energy_joules is None


def test_without_the_package_or_off_a_mac_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with energy.measured("e5rt") as reading:
        pass
    if sys.platform != "darwin":
        assert "Mac only" in str(energy.missing())
        assert reading.joules is None
    result = train(1)
    assert result.energy_joules is None
    assert "energy" not in summary(result)
    assert "energy   not measured" in summary(result, report=ConsoleReporter(verbose=True))
    monkeypatch.setattr(energy, "on_apple_silicon", lambda: True)
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", None)
    assert 'pip install "ane_trainer[energy]"' in str(energy.missing())


def test_the_simulator_costs_the_engine_nothing_that_is_known(
    on_a_mac: type[Monitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert train(1).energy_joules is None


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    assert energy.total([1.5, 0.5]) == 2.0
    assert energy.total([1.5, None]) is energy.total([]) is None


def package(folder: Path) -> Path:
    path = folder / "model.mlpackage"
    path.mkdir()
    (path / "Manifest.json").write_text("{}")
    return path


def test_placement_is_counted_by_preferred_device() -> None:
    devices = pytest.importorskip("coremltools.models.compute_device")
    # their constructors want an object of the Mac's own library
    engine, cpu = map(object.__new__, (devices.MLNeuralEngineComputeDevice, devices.MLCPUComputeDevice))
    preferred = {
        "ios17.conv": engine,
        "ios17.relu": engine,
        "ios17.cast": cpu,
        "ios17.odd": None,
        "const": cpu,
    }
    operations = [SimpleNamespace(operator_name=name) for name in preferred]

    def usage(operation: SimpleNamespace) -> object:
        device = preferred[operation.operator_name]
        return None if device is None else SimpleNamespace(preferred_compute_device=device)

    function = SimpleNamespace(block=SimpleNamespace(operations=operations))
    plan = SimpleNamespace(
        model_structure=SimpleNamespace(program=SimpleNamespace(functions={"main": function})),
        get_compute_device_usage_for_mlprogram_operation=usage,
    )
    assert placement.count_operations(plan) == {"Neural Engine": 2, "CPU": 1, "unknown": 1}


def test_placement_is_unknown_where_nobody_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = package(tmp_path)
    with pytest.raises(UsageError, match=r"needs an \.mlpackage"):
        placement.place_package(tmp_path)
    if sys.platform != "darwin":
        assert run_command(["placement", str(path)]) == 2
        assert "placement unknown: only macOS" in capsys.readouterr().out
        assert run_command(["placement", str(path), "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["operations"] is None
    monkeypatch.setattr("ane_trainer.ane.dispatch.devices.aneforge_runtime.on_apple_silicon", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "ane_trainer[coreml]"' in placement.place_package(path).how


@pytest.mark.mac
def test_on_a_mac_the_engines_energy_is_known() -> None:
    pytest.importorskip("zeus_apple_silicon")
    torch.manual_seed(0)
    trainer = at.Trainer(torch.nn.Linear(6, 2), device="e5rt", report=Reporter())
    joules = trainer.fit(BATCHES * 100, epochs=1).energy_joules
    assert joules is None or joules >= 0
