"""`doctor`: it tries what is here, says what is missing with the command that brings it, and prints the chips."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ane_trainer.ane.chips.lookup import known_chips
from ane_trainer.cli import run_command
from ane_trainer.commands import examination as doctor
from ane_trainer.commands.examination import Check, exit_code, try_device
from tests.standin.fixtures import engine, library  # noqa: F401
from tests.standin.library import Engine, needs_compiler


def test_exit_codes() -> None:
    assert exit_code([Check("ok", "a", ""), Check("miss", "b", ""), Check("info", "c", "")]) == 0
    assert exit_code([Check("ok", "a", ""), Check("warn", "b", "")]) == 2
    assert exit_code([Check("warn", "a", ""), Check("fail", "b", "")]) == 1


@needs_compiler
def test_a_device_that_is_here_is_tried(engine: Engine) -> None:  # noqa: F811
    found = try_device("e5rt", "somewhere")
    assert found.status == "ok"
    assert "runs on somewhere: 64x64 in" in found.text
    assert "result exact" in found.text
    engine.failing = True
    found = try_device("e5rt", "somewhere")
    assert (found.status, found.subject) == ("warn", "e5rt")
    assert "ANE209" in found.text
    assert found.fix.startswith("ane-trainer")


@needs_compiler
def test_a_device_that_computes_wrongly_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    real = Engine.compute

    def wrong(self: Engine, *arguments: object) -> dict[str, object]:
        return {name: array * 2 for name, array in real(self, *arguments).items()}

    monkeypatch.setattr(Engine, "compute", wrong)
    found = try_device("e5rt", "somewhere")
    assert found.status == "warn"
    assert "wrong results" in found.text
    assert found.fix == "ane-trainer conformance --device e5rt"


@pytest.mark.skipif(sys.platform == "darwin", reason="shows this machine as a Mac")
def test_a_mac_whose_engine_is_out_of_reach_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANEFORGE_DYLIB", raising=False)
    monkeypatch.setattr(doctor, "on_apple_silicon", lambda: True)
    monkeypatch.setattr(doctor, "known_chip", lambda: "m3-pro")
    monkeypatch.setattr(doctor, "version", lambda name: None)
    checks = doctor._devices()
    assert checks[0].subject == "engine"
    assert checks[0].fix == 'pip install "ane_trainer[e5rt]"'
    assert exit_code(checks) == 2
    monkeypatch.setattr(doctor, "known_chip", lambda: None)
    assert "not in the table" in doctor._machine().text


def test_limits_of_the_engine_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "known_chip", lambda: "m4")
    (found,) = doctor._limits("sim")
    assert found.status == "ok"
    monkeypatch.setattr(doctor, "known_chip", lambda: None)
    assert doctor._limits("sim") == ()


def test_every_absent_extra_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: None)
    checks = doctor._extras()
    assert checks
    assert all((c.status, c.fix) == ("miss", f'pip install "ane_trainer[{c.subject}]"') for c in checks)


def test_a_cache_that_cannot_be_written_is_degraded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor._cache("programs", tmp_path / "file" / "below")
    assert (found.status, found.fix) == ("warn", f"mkdir -p {tmp_path / 'file' / 'below'}")


def test_chips_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--chips"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["chip", "family", "generation"]
    assert len([line for line in lines if line.startswith("M")]) == len(known_chips())
    assert "4094" in next(line for line in lines if line.startswith("M1 "))
    assert run_command(["doctor", "--chips", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["chips"]
    assert [row["name"] for row in rows] == list(known_chips())
    assert all(row["evidence"]["clock_ghz"]["source"] for row in rows)
    assert rows[0]["limits"]["loaded_programs"]["value"] == 128


@pytest.mark.mac
def test_on_a_mac_with_the_extra_the_engine_is_reached() -> None:
    pytest.importorskip("aneforge")
    checks = doctor.examine()
    print(doctor.as_text(checks))
    assert {check.status for check in checks if check.subject == "e5rt"} == {"ok"}
