"""Machine code on disk: used by the next process, left out where damaged, bounded in size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ane_trainer.ane.simulator.loops import jit, objects
from ane_trainer.cli import run_command
from ane_trainer.utils import prune

IR = """
define double @twice(double %x) {
  %y = fadd double %x, %x
  ret double %y
}
define void @nothing(ptr %p, i64 %n) {
  ret void
}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(objects, "folder", lambda: tmp_path / "code")
    return tmp_path / "code"


def compiled() -> float:
    functions = jit.compile_ir(IR, ["twice", "nothing"])
    functions["nothing"](0, 1)
    return float(functions["twice"](1.5))


def test_code_seen_before_is_not_compiled_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled() == 3.0
    assert len(list(place.iterdir())) == 1
    monkeypatch.setattr(jit, "_machine_code", None)  # another compilation would fail
    assert compiled() == 3.0


@pytest.mark.parametrize("kept", [slice(0, -8), slice(1, None), slice(0, 0)])
def test_damaged_code_is_left_out_with_a_warning(place: Path, kept: slice) -> None:
    compiled()
    (path,) = place.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[kept])
    with pytest.warns(UserWarning, match="compiled again"):
        assert compiled() == 3.0
    assert path.read_bytes()[32:100] == whole[32:100]


def test_addresses_of_a_process_are_not_kept(place: Path) -> None:
    assert objects.key_of("inttoptr i64 140 to ptr", ["f"], "") is None
    assert objects.key_of(IR, ["twice"], "a") != objects.key_of(IR, ["twice"], "b")


def test_the_oldest_goes_first(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.mkdir()
    for number in range(4):
        (place / str(number)).write_bytes(bytes(100))
        os.utime(place / str(number), ns=(number, number))
    assert prune(place, 250) == (2, 200)
    assert sorted(path.name for path in place.iterdir()) == ["2", "3"]
    monkeypatch.setattr("ane_trainer.commands.cache.cache_folder", lambda: place.parent / "programs")
    assert run_command(["cache", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["code"] == {"folder": str(place), "entries": 2, "bytes": 200}
    assert run_command(["cache", "prune"]) == 0
    assert not list(place.iterdir())
