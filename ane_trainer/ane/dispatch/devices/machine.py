"""Identify this machine: system, build, chip, and the versions that matter for what an engine computes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

from ane_trainer.__version__ import __version__
from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.dispatch.devices.aneforge_runtime import on_apple_silicon
from ane_trainer.ane.errors import UsageError

#: Distributions whose versions are reported.
PACKAGES = ("torch", "numpy", "llvmlite", "aneforge", "coreai-core", "coremltools")


def describe() -> dict[str, object]:
    """System, build, chip, cores and versions; None where something is not known or not here."""
    return {
        "ane_trainer": __version__,
        "system": platform.system(),
        "release": platform.mac_ver()[0] if on_apple_silicon() else platform.release(),
        "build": _output("/usr/bin/sw_vers", "-buildVersion") if on_apple_silicon() else None,
        "machine": platform.machine(),
        "chip": mac_chip(),
        "model": _output("/usr/sbin/sysctl", "-n", "hw.model") if on_apple_silicon() else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def mac_chip() -> str | None:
    """`Apple M3 Pro` on Apple silicon; None elsewhere, or when the system does not say."""
    return _output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string") if on_apple_silicon() else None


def known_chip() -> str | None:
    """This Mac's chip by its name in the chip table; None for one that is not there, and elsewhere."""
    brand = mac_chip()
    if brand is None:
        return None
    try:
        return get_chip(brand).name
    except UsageError:
        return None


def version(distribution: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
