"""The compile stage: fingerprint and the cache on disk."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
import pytest

from ane_trainer.ane.compiler import build
from ane_trainer.ane.compiler.build import TEXT_FILE, WEIGHTS_FILE, cache_folder, compile_program
from ane_trainer.ane.mil.program import Function, Op, Program, TensorType, Value
from ane_trainer.ane.stages import Legalized, Lowered


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    return cache_folder()


def program(kind: str = "relu") -> Legalized:
    x, y = (Value(name, TensorType("fp16", (2, 3))) for name in ("x", "y"))
    function = Function("main", (x,), (Op(kind, (("x", x),), (y,)),), (y,))
    return Legalized(Lowered(Program((function,)), (), (), ()), "m4", "e5rt")


def test_equal_programs_share_a_folder_and_others_do_not(cache: Path) -> None:
    first, again, other = (
        compile_program(program()),
        compile_program(program()),
        compile_program(program("tanh")),
    )
    assert first.folder == again.folder == cache / first.fingerprint
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (first.folder / TEXT_FILE).read_text() == first.text
    assert (first.folder / WEIGHTS_FILE).read_bytes() == first.weights
    assert len(list(cache.iterdir())) == 2, "scratch folders stay behind"


def test_the_cache_is_bounded_and_keeps_what_was_used_last(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = compile_program(program()), compile_program(program("tanh"))
    assert first.folder is not None
    assert second.folder is not None
    os.utime(first.folder, (1, 1))
    os.utime(second.folder, (2, 2))
    assert compile_program(program()).folder == first.folder  # used again
    size = sum(file.stat().st_size for file in first.folder.iterdir())
    monkeypatch.setattr(
        build, "LIMIT", 14 * size // 5
    )  # three are too much, two no more than three quarters of it
    third = compile_program(program("sigmoid"))
    assert sorted(cache.iterdir()) == sorted([first.folder, third.folder])
    monkeypatch.setattr(build, "LIMIT", 1)
    last = compile_program(program("silu"))
    assert list(cache.iterdir()) == [last.folder]


def test_a_damaged_entry_is_replaced(cache: Path) -> None:
    folder = compile_program(program()).folder
    assert folder is not None
    (folder / TEXT_FILE).write_text("damaged")
    (folder / WEIGHTS_FILE).unlink()
    compiled = compile_program(program())
    assert (folder / TEXT_FILE).read_text() == compiled.text
    assert (folder / WEIGHTS_FILE).read_bytes() == compiled.weights


def test_a_cache_that_cannot_be_written_is_left_out(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert compile_program(program()).folder is None
    assert compile_program(program(), cache=False).folder is None
