"""Pytest plugin: `-p ane_trainer.interop.aneforge.pytest_plugin` runs ANEForge tests on the simulated engine.

Tests that are skipped off a Mac ask their platform. With `--ane-mac` (the default) the files of the test
session, and only they, are shown macOS on Apple silicon (`fake_platform.py`), so that such checks pass. Use
`--no-ane-mac` to let them see this machine. Test files that start other Python processes hand the simulator
on to them (`children.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.errors import AneTrainerError
from ane_trainer.interop.aneforge import install, installed, uninstall
from ane_trainer.interop.aneforge.children import hand_on
from ane_trainer.interop.aneforge.fake_platform import MacSys, disguise, provide
from ane_trainer.interop.aneforge.host import Installation, brand
from ane_trainer.interop.aneforge.library import SimulatedLibrary

_active: list[Installation] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Chip, fidelity, and whether test files see a Mac."""
    group = parser.getgroup("ane", "ANEForge on the simulated Apple Neural Engine")
    group.addoption("--ane-chip", default="m5", help="chip to simulate (default: m5)")
    group.addoption("--ane-fidelity", default="exact", choices=("exact", "fast"))
    group.addoption(
        "--ane-mac",
        action="store_true",
        default=True,
        dest="ane_mac",
        help="show the test files a Mac (default)",
    )
    group.addoption("--no-ane-mac", action="store_false", dest="ane_mac", help="show them this machine")
    if importlib.util.find_spec("pytest_forked") is None:
        group.addoption("--forked", action="store_true", help="taken for pytest-forked, and not needed here")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest is read: they may already ask for an engine."""
    _begin(early_config, early_config.known_args_namespace)


def pytest_configure(config: pytest.Config) -> None:
    """Where a conftest names the plugin, it is loaded later; that conftest has then seen this machine."""
    if not _active:
        _begin(config, config.option)


def _begin(config: pytest.Config, given: argparse.Namespace) -> None:
    """Put the simulator in, and the disguise on."""
    try:
        install(given.ane_chip, given.ane_fidelity)
    except AneTrainerError as fault:
        raise pytest.UsageError(str(fault)) from fault
    folders: list[Path] = []
    if given.ane_mac:
        folders = [config.rootpath, *(_folder(argument) for argument in given.file_or_dir)]
        folders = list(dict.fromkeys(folder.resolve() for folder in folders))
        _active.append(disguise(_belongs(folders)))
        _active.append(provide(brand(get_chip(given.ane_chip))))
    _active.append(hand_on(given.ane_chip, given.ane_fidelity, [f"{folder}{os.sep}" for folder in folders]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each test has the room of a process of its own for loaded programs: on a Mac, ANEForge's suite is run
    with a process a test (its docs, development), because programs pile up in a long one.
    """
    SimulatedLibrary.start_counting()


def pytest_unconfigure() -> None:
    """Take everything back."""
    while _active:
        _active.pop().undo()
    uninstall()


def pytest_report_header(config: pytest.Config) -> str:
    """What the tests run on."""
    library = installed()
    if library is None:
        return "ane: ANEForge is not on the simulator"
    seen = "see a Mac" if config.getoption("ane_mac") else "see this machine"
    context = library.context
    return f"ane: ANEForge on the simulated {context.chip.title} ({context.fidelity}); test files {seen}"


def pytest_markeval_namespace(config: pytest.Config) -> dict[str, object]:
    """Conditions that are written as strings see the same Mac."""
    return {"sys": MacSys()} if config.getoption("ane_mac") else {}


def _folder(argument: str) -> Path:
    path = Path(argument.split("::")[0])
    return path if path.is_dir() else path.parent


def _belongs(folders: list[Path]) -> Callable[[str], bool]:
    """Whether a file is part of the test session: below its folders, no installed package and not ours."""
    paths = sysconfig.get_paths()
    foreign = tuple({paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    own = str(Path(__file__).resolve().parents[2]) + os.sep
    inside = tuple(f"{folder}{os.sep}" for folder in folders)
    known: dict[str, bool] = {}

    def belongs(file: str) -> bool:
        if file not in known:
            path = os.path.realpath(file)
            known[file] = path.startswith(inside) and not path.startswith(
                (*foreign, own, sys.prefix + os.sep)
            )
        return known[file]

    return belongs
