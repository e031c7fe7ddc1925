"""`doctor`: what this machine has, what works, what is missing, and the one command that brings it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ane_trainer.__version__ import __version__
from ane_trainer.ane.chips import known_chips
from ane_trainer.ane.devices import DEVICE_NAMES, get_device
from ane_trainer.ane.errors import AneTrainerError
from ane_trainer.data import default_root
from ane_trainer.datasets import dataset_rows
from ane_trainer.report import Reporter
from ane_trainer.trainer import Trainer
from ane_trainer.utils import atomic_write

Status = Literal["ok", "info", "miss", "warn", "fail"]

#: Optional packages: extra, distribution, what it is for, the only platform that has it.
_EXTRAS = (
    ("coreml", "coremltools", "Core ML files", None),
    ("coreai", "coreai-core", "Apple's Core AI runtime", None),
    ("e5rt", "aneforge", "direct dispatch to the engine", "darwin"),
    ("energy", "zeus-apple-silicon", "energy of a run in joules", "darwin"),
    ("keras", "keras", "Keras models", None),
    ("digits", "scikit-learn", "the digits dataset", None),
)


@dataclass(frozen=True)
class Check:
    """One finding. `fix` is the command that helps, empty where nothing has to be done.

    `fail` means that training is not possible, `warn` that something is worse than it could be, `miss` an
    optional part that is absent.
    """

    status: Status
    subject: str
    text: str
    fix: str = ""


def examine() -> tuple[Check, ...]:
    """Look at this machine; trains a tiny model on the simulator for a second, changes nothing."""
    return (_machine(), _python(), *_engine(), _simulator(), _cache(), *_datasets(), *_extras())


def exit_code(checks: Sequence[Check]) -> int:
    """0: all is well; 1: training is not possible here; 2: it is, but something is degraded."""
    statuses = {check.status for check in checks}
    return 1 if "fail" in statuses else 2 if "warn" in statuses else 0


def as_text(checks: Sequence[Check]) -> str:
    """One line for each check."""
    lines = [f"ane_trainer {__version__}"]
    for check in checks:
        fix = f"   -> {check.fix}" if check.fix else ""
        lines.append(f" {check.status:<5} {check.subject:<12} {check.text}{fix}")
    return "\n".join(lines)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The same for machines."""
    return {
        "version": __version__,
        "exit_code": exit_code(checks),
        "checks": [asdict(check) for check in checks],
    }


def _on_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _machine() -> Check:
    text = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"
    if _on_apple_silicon():
        text = f"macOS {platform.mac_ver()[0]}, {_mac_chip()}"
    return Check("ok", "machine", text)


def _mac_chip() -> str:
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "Apple silicon, chip unknown"


def _python() -> Check:
    text = f"{platform.python_version()}, torch {torch.__version__}, numpy {_version('numpy')}"
    return Check("ok", "python", f"{text}, llvmlite {_version('llvmlite')}")


def _engine() -> tuple[Check, ...]:
    """What each device besides the simulator says of this machine."""
    checks = []
    if not _on_apple_silicon():
        checks.append(Check("info", "engine", "no Neural Engine here; programs run on the simulator"))
    for name in DEVICE_NAMES:
        if name in ("auto", "sim", "cpu"):
            continue
        try:
            where, how = get_device(name).device.placement("m4", "exact")
        except AneTrainerError as error:
            checks.append(Check("info", name, error.args[0].rpartition("; ")[2]))
        else:
            checks.append(Check("ok", name, f"runs on {where}; {how}"))
    return tuple(checks)


def _simulator() -> Check:
    """Train one step of a 4-4-2 network; a just-in-time compiler that does not work shows here."""
    torch_state = torch.random.get_rng_state()
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        trainer = Trainer(model, device="sim", report=Reporter())
        trainer.fit([(torch.ones(2, 4), torch.tensor([0, 1]))])
    except (AneTrainerError, OSError, RuntimeError) as error:
        return Check("fail", "simulator", f"does not run: {error}", "pip install --force-reinstall llvmlite")
    finally:
        torch.random.set_rng_state(torch_state)
    return Check("ok", "simulator", f"runs; chips {known_chips()[0]} to {known_chips()[-1]}")


def _cache() -> Check:
    folder = default_root()
    try:
        os.unlink(atomic_write(folder / ".writable", ""))
    except OSError as error:
        return Check(
            "warn", "data cache", f"{folder} cannot be written ({error.strerror})", f"mkdir -p {folder}"
        )
    return Check("ok", "data cache", str(folder))


def _datasets() -> tuple[Check, ...]:
    checks = []
    for row in dataset_rows():
        if row["status"] == "cached":
            checks.append(Check("ok", row["name"], "in the cache"))
        elif row["status"] == "to fetch":
            checks.append(
                Check("info", row["name"], "not fetched yet", f"ane-trainer data fetch {row['name']}")
            )
    return tuple(checks)


def _extras() -> tuple[Check, ...]:
    checks = []
    for extra, distribution, purpose, only_on in _EXTRAS:
        if only_on is not None and sys.platform != only_on:
            continue
        found = _version(distribution)
        if found:
            checks.append(Check("ok", extra, f"{distribution} {found}, for {purpose}"))
        else:
            checks.append(Check("miss", extra, f"for {purpose}", f'pip install "ane_trainer[{extra}]"'))
    return tuple(checks)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
