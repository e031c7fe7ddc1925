"""The examples of Lightning, transformers and accelerate run and learn; skipped where these are not installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(example: str, *packages: str) -> str:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        capture_output=True, text=True, env=environment, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_lightning() -> None:
    output = run("lightning_compile.py", "lightning", "sklearn")
    assert "backward [" in output
    found = re.search(r"accuracy ([\d.]+)%", output)
    assert found is not None
    assert float(found[1]) > 80


def test_transformers_trainer_takes_the_backend_by_name() -> None:
    output = run("transformers_compile.py", "transformers", "accelerate")
    assert "backward [" in output
    found = re.search(r"loss ([\d.]+) -> ([\d.]+)", output)
    assert found is not None
    assert float(found[2]) < float(found[1]) - 0.01


def test_a_loop_of_accelerate_ends_as_on_the_cpu() -> None:
    output = run("accelerate_compile.py", "accelerate", "sklearn")
    assert "backward [" in output
    (plain, before), (loss, accuracy) = re.findall(r"loss ([\d.]+), accuracy ([\d.]+)%", output)
    assert float(loss) == pytest.approx(float(plain), rel=5e-3)
    assert float(accuracy) == pytest.approx(float(before), abs=1.0)
