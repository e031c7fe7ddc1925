"""Caches on disk whose files are damaged or gone: a step is compiled anew, with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ane_trainer.utils import added

ROOT = Path(__file__).parents[3]
STEP = """
import torch, ane_trainer as at
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
x, y = torch.rand(8, 6), torch.arange(8) % 3
step = at.compile_step(net, "cross_entropy", torch.optim.Adam(net.parameters()), (x, y), threads=1)
for _ in range(3):
    step(x, y)
step.sync()
print([p.double().sum().item() for p in net.parameters()])
"""


def started(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
    command = [sys.executable, "-c", STEP]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def said(process: subprocess.Popen[str]) -> str:
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    return told


def trained(cache: Path) -> str:
    return said(started(cache))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="caches are found by XDG_CACHE_HOME")
def test_every_cached_file_may_be_damaged(tmp_path: Path) -> None:
    first = trained(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"steps", "programs", "code"} <= {path.relative_to(tmp_path).parts[1] for path in files}
    for damage in (b"\xff\x9f" * 150, b""):
        for path in files:
            path.write_bytes(damage)
        assert trained(tmp_path) == first


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="caches are found by XDG_CACHE_HOME")
def test_two_processes_may_begin_with_one_empty_cache(tmp_path: Path) -> None:
    both = [started(tmp_path), started(tmp_path)]
    first, second = map(said, both)
    assert first == second == trained(tmp_path)


@pytest.mark.parametrize("damage", [b"\xff\x9f", b"", b"x", b"9" * 5000, b"-1"])
def test_a_damaged_sum_of_a_cache_is_counted_anew(damage: bytes, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    place.mkdir()
    (place / "entry").write_bytes(bytes(100))
    (tmp_path / "cache.total").write_bytes(damage)
    added(place, 100, 1000)
    assert (tmp_path / "cache.total").read_text() == "100"
