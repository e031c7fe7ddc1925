"""Settings for the whole suite: hypothesis profiles, Ctrl-C, and tests for a Mac skipped where there is none."""

import os
import platform
import signal
import sys

import hypothesis
import pytest

# The same examples each time, so that a change is judged by what it changed; `make fuzz` draws new ones.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("default")

# Hundreds of tests start a process; without a cache each would compile 300 modules from source (0.7 of 1.1 s of CPU).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Ctrl-C is tested, and a suite that was started in the background begins with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step comes from the disk: a test may have changed how one is compiled (`test_recall` has them)."""
    from ane_trainer.ane.dispatch import loading

    monkeypatch.setattr(loading, "memory_of", lambda asked: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return
    for item in items:
        if item.get_closest_marker("mac"):
            item.add_marker(pytest.mark.skip(reason="needs an Apple silicon Mac"))
