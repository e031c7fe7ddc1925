"""Signals while the command line starts: one line and an exit code at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
#: Runs the command line; a signal comes as soon as a module of this name is looked for.
AT_IMPORT = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r} and sys.meta_path.count(self):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["ane-trainer", "train", "digits", "--epochs", "500"]
runpy.run_module("ane_trainer", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ["ane_trainer.cli", "typer", "numpy", "torch", "torch.optim"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_importing_says_so_in_one_line(number: int, name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_IMPORT.format(name=name, number=int(number))]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=100, check=False
    )
    assert done.returncode == 128 + number
    assert done.stderr == "ANE130 stopped before there was anything to save.\n"


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_the_start_says_so_in_one_line(tmp_path: Path) -> None:
    """Sixty moments in 1.5 s, from the one on at which Python has started: then `import ane_trainer` is over."""
    command = [sys.executable, "-c", "import ane_trainer.__main__ as m, sys; print(flush=True); m.main()"]
    for moment in range(60):
        process = subprocess.Popen(
            [*command, "train", "digits", "--epochs", "500", "--out", str(moment)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.005 + moment * 0.025)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=100)
        assert (process.returncode, told.count("\n"), told[:7]) == (130, 1, "ANE130 "), (moment, told)


def test_a_signal_within_an_import_stops_training_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class body makes a RuntimeError of what is raised in it; the signal is kept for the next step."""
    from ane_trainer.training.loop import interruptible

    (tmp_path / "slow_module.py").write_text(
        f"import os\nos.kill(os.getpid(), {int(signal.SIGTERM)})\nvalue = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with interruptible() as stop:
        import slow_module  # type: ignore[import-not-found]

        assert slow_module.value == 3
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            stop.check()
