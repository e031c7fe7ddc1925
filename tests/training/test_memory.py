"""Memory of a long training: it does not grow with the steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Trains for 5,000 steps, with validation and its own checkpoints, and prints KiB after 1,000 and after 5,000.
LONG = """
import sys
from pathlib import Path
from ane_trainer import Reporter
from ane_trainer.core import run_training
from ane_trainer.training.config import make_config

class Watch(Reporter):
    steps = 0
    def step(self, loss, loss_scale, skipped_steps):
        Watch.steps += 1
        if Watch.steps in (1000, 5000):
            fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
            print(int(fields["VmRSS"].split()[0]), flush=True)

options = {"dataset": "digits", "hidden": (16,), "batch_size": 64, "epochs": 228, "augment": ("shift=1",), "threads": 1,
           "save_every": "500", "device": sys.argv[2]}
run_training(make_config(options), out=sys.argv[1], report=Watch())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("device", ["sim", "cpu"])
def test_memory_stays_over_5_000_steps(device: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(tmp_path / "run"), device],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    early, late = map(int, done.stdout.split())
    assert late - early < 4096, (early, late)
