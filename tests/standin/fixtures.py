"""Fixtures: the library is built once a module; ANEForge loads it instead of a Mac's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ane_trainer.ane.dispatch.devices import aneforge_runtime
from ane_trainer.ane.dispatch.devices.aneforge_runtime import loaded_programs
from ane_trainer.interop.aneforge import uninstall
from tests.standin.library import Engine, build


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def engine(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    runtime = pytest.importorskip("aneforge._runtime")
    circuit = pytest.importorskip("aneforge._circuit")
    uninstall()  # other tests of this process may have put the simulator in the library's place
    monkeypatch.setenv("ANEFORGE_DYLIB", str(library))
    monkeypatch.setattr(runtime._lib, "_lib", None)
    monkeypatch.setattr(aneforge_runtime, "_refused", {})
    circuit.reset()  # an earlier test's failed compile makes ANEForge pause before the next one
    engine = Engine(library)
    yield engine
    circuit.reset()
    assert engine.loaded == loaded_programs() == 0, "programs were left loaded"
    assert not engine.plans
