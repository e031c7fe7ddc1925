"""The script runner, the pytest plugin and child processes, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ane_trainer.interop.aneforge.fake_platform import disguise

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
import numpy as np
import aneforge as af
from aneforge import _targets
net = af.compile(af.input((1, 3)) * 2.0, _check_precision=False)
print(sys.argv[1:], net(np.ones((1, 3))).tolist(), _targets.detect_family())
"""

TESTS = """
import os, platform, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import aneforge as af

KEPT = []
mac = sys.platform == "darwin" and platform.machine() == "arm64"
pytestmark = pytest.mark.skipif(not mac, reason="needs a Mac")
library = Path(af.__file__).parent / "_lib" / "libane_e5rt_dispatch.dylib"


@pytest.mark.skipif("platform.system() != 'Darwin' or sys.platform != 'darwin'", reason="needs a Mac")
@pytest.mark.skipif(not library.exists(), reason="needs the library")
def test_runs():
    assert os.uname().sysname == "Darwin"
    net = af.compile(af.input((1, 3)) * 2.0, _check_precision=False)
    assert net(np.ones((1, 3))).sum() == 6


def test_asks_its_mac():
    def says(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert says("sysctl", "-n", "machdep.cpu.brand_string") == "Apple M2"
    assert says("sw_vers", "-productVersion") == platform.mac_ver()[0]
    assert "BuildVersion" in says("sw_vers")
    assert os.path.exists("/System/Library/PrivateFrameworks/Espresso.framework")


@pytest.mark.parametrize("part", range(3))
def test_each_test_has_its_own_room_for_programs(part):
    for _ in range(60):
        KEPT.append(af.compile(af.input((1, 2)) * 2.0, _check_precision=False))


def test_opens_the_library():
    import ctypes
    from aneforge import _runtime

    library = ctypes.CDLL(str(_runtime._find_dylib()))
    assert library.ane_e5rt_program_get_op_count(KEPT[0]._prog._handle) == 1
    assert not hasattr(library, "ane_e5rt_program_nothing")


def test_child():
    code = (
        "import aneforge as af, numpy as np, sys; "
        "assert sys.platform == 'darwin'; "
        "net = af.compile(af.input((1, 3)) * 2.0, _check_precision=False); "
        "print(net(np.ones((1, 3))).sum())"
    )
    for env in (None, {**os.environ, "PYTHONPATH": "elsewhere"}):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env
        )
        assert done.stdout.strip() == "6.0", done.stderr
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "ANEFORGE_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_runs_a_script_with_its_arguments_on_the_chip(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python(tmp_path, "-m", "ane_trainer.interop.aneforge", "--chip", "m1", "script.py", "--chip", "x")
    assert done.stdout.strip() == "['--chip', 'x'] [[2.0, 2.0, 2.0]] 2", done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"), [(["--chip", "m99", "script.py"], "m99"), (["missing.py"], "missing.py")]
)
def test_the_runner_says_what_is_wrong(tmp_path: Path, arguments: list[str], reason: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python(tmp_path, "-m", "ane_trainer.interop.aneforge", *arguments)
    assert (done.returncode, reason in done.stderr, "Traceback" in done.stderr) == (1, True, False)


def test_the_plugin_shows_a_mac_and_runs_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_device.py").write_text(TESTS)
    plugin = ["-m", "pytest", "-p", "ane_trainer.interop.aneforge.pytest_plugin", "--ane-chip", "m2"]
    if importlib.util.find_spec("pytest_forked") is None:
        plugin.append("--forked")  # ANEForge's own configuration asks for it
    done = python(tmp_path, *plugin)
    assert "7 passed" in done.stdout, done.stdout + done.stderr
    assert "simulated M2 (exact); test files see a Mac" in done.stdout
    assert "7 skipped" in python(tmp_path, *plugin, "--no-ane-mac").stdout


def test_a_conftest_may_name_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["ane_trainer.interop.aneforge.pytest_plugin"]')
    (tmp_path / "test_device.py").write_text(TESTS)
    done = python(tmp_path, "-m", "pytest", "-k", "test_runs")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_only_files_that_belong_are_shown_a_mac(tmp_path: Path) -> None:
    code = "import sys, os, platform\nseen = sys.platform, platform.machine(), os.uname().sysname"
    shown, other = {"__file__": str(tmp_path / "a.py")}, {"__file__": "/elsewhere/b.py"}
    before = (sys.platform, platform.machine(), os.uname().sysname)
    done = disguise(lambda file: file.startswith(str(tmp_path)))
    try:
        exec(code, shown)
        exec(code, other)
        assert __import__("os.path", fromlist=("join",)) is os.path
    finally:
        done.undo()
    assert shown["seen"] == ("darwin", "arm64", "Darwin")
    assert other["seen"] == before
    exec(code, shown)
    assert shown["seen"] == before
