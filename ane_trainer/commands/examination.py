"""Examines this machine for `doctor`: what works, what is missing, and the one command that brings it."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ane_trainer.__version__ import __version__
from ane_trainer.ane.chips.lookup import get_chip, known_chips
from ane_trainer.ane.compiler.build import cache_folder
from ane_trainer.ane.dispatch.devices import DEVICE_NAMES, get_device
from ane_trainer.ane.dispatch.devices.aneforge_runtime import on_apple_silicon
from ane_trainer.ane.dispatch.devices.machine import describe, known_chip, version
from ane_trainer.ane.errors import AneTrainerError
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.commands.conformance.engines import DeviceEngine, as_compiled
from ane_trainer.commands.conformance.report import examine as compare
from ane_trainer.commands.data import dataset_rows
from ane_trainer.data import default_root
from ane_trainer.training import energy
from ane_trainer.training.reporting.report import Reporter
from ane_trainer.training.trainer import Trainer
from ane_trainer.utils import atomic_write, seeded

Status = Literal["ok", "info", "miss", "warn", "fail"]

#: Optional packages: extra, distribution, what it is for, the only platform that has it.
_EXTRAS = (
    ("coreml", "coremltools", "Core ML files", None),
    ("coreai", "coreai-core", "Apple's Core AI runtime", None),
    ("e5rt", "aneforge", "direct dispatch to the engine", "darwin"),
    ("energy", "zeus-apple-silicon", "energy of a run in joules", "darwin"),
    ("keras", "keras", "Keras models", None),
    ("digits", "scikit-learn", "the digits dataset", None),
    ("plot", "matplotlib", "pictures of `trace` and reports", None),
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
    """Look at this machine: run a tiny program on every device that is here, train a tiny model on the
    simulator; a few seconds, changes nothing.
    """
    return (
        _machine(), _python(), *_devices(), _simulator(), *_caches(), *_datasets(), *_extras(), _energy()
    )  # fmt: skip


def exit_code(checks: Sequence[Check]) -> int:
    """0: all is well; 1: training is not possible here; 2: it is, but something is degraded."""
    statuses = {check.status for check in checks}
    return 1 if "fail" in statuses else 2 if "warn" in statuses else 0


def as_text(checks: Sequence[Check]) -> str:
    """One line for each check."""
    lines = [f"ane_trainer {__version__}"]
    for check in checks:
        fix = f"   -> {check.fix}" if check.fix else ""
        lines.append(f" {check.status:<5} {check.subject:<14} {check.text}{fix}")
    return "\n".join(lines)


def as_json(checks: Sequence[Check]) -> dict[str, object]:
    """The same for machines."""
    return {
        "version": __version__,
        "exit_code": exit_code(checks),
        "checks": [asdict(check) for check in checks],
    }


def _machine() -> Check:
    found = describe()
    if not on_apple_silicon():
        return Check(
            "ok",
            "machine",
            f"{found['system']} {found['release']}, {found['machine']}, {found['cores']} cores",
        )
    text = (
        f"macOS {found['release']} ({found['build'] or 'build unknown'}), {found['chip'] or 'chip unknown'}"
    )
    name = known_chip()
    if name is None:
        hint = "the chip is not in the table; --chip says whose limits hold"
        return Check("info", "machine", f"{text}; {hint}", "ane-trainer doctor --chips")
    return Check("ok", "machine", f"{text}, family {get_chip(name).family}")


def _python() -> Check:
    text = f"{platform.python_version()}, torch {torch.__version__}, numpy {version('numpy')}"
    return Check("ok", "python", f"{text}, llvmlite {version('llvmlite')}")


def _devices() -> tuple[Check, ...]:
    """Run a program on each device besides the simulator; on a Mac at least one has to reach the engine."""
    checks = []
    for name in DEVICE_NAMES:
        if name in ("auto", "sim", "cpu", "e5rt-pingpong"):  # the last is e5rt with other buffers
            continue
        try:
            device = get_device(name).device
        except AneTrainerError as error:
            checks.append(Check("info", name, error.args[0].rpartition("; ")[2]))
        else:
            checks.append(try_device(name, device.placement(known_chip() or "m4", "exact")[0]))
    if not on_apple_silicon():
        return (Check("info", "engine", "no Neural Engine here; programs run on the simulator"), *checks)
    reached = [check.subject for check in checks if check.status == "ok" and "Neural Engine" in check.text]
    if not reached:
        text = "this Mac's Neural Engine is out of reach: no device for it works; the simulator does"
        fix = "" if version("aneforge") else 'pip install "ane_trainer[e5rt]"'
        return (Check("warn", "engine", text, fix), *checks)
    return (*checks, *_limits(reached[0]))


def try_device(name: str, where: str) -> Check:
    """Compile x + x, run it, compare, and time it."""
    x = np.linspace(-4, 4, 64 * 64).astype(np.float16).reshape(64, 64)
    builder = Builder()
    value = builder.input("x", TensorType("fp16", x.shape))
    program = Program((builder.finish((builder.op("add", x=value, y=value),)),))
    try:
        compiled, times = as_compiled(program, known_chip() or "m4"), []
        with closing(get_device(name).device.load(compiled, fidelity="exact", threads=None)) as session:
            for _ in range(10):
                started = time.perf_counter()
                (result,) = session.run({"x": x}).values()
                times.append(time.perf_counter() - started)
    except (AneTrainerError, OSError, RuntimeError) as error:
        return Check("warn", name, f"does not run: {error}", _remedy(str(error)))
    if result.tobytes() != (2 * x).tobytes():
        wrong = int((result != 2 * x).sum())
        return Check(
            "warn",
            name,
            f"gives wrong results: {wrong} of {x.size}",
            f"ane-trainer conformance --device {name}",
        )
    text = f"runs on {where}: 64x64 in {min(times) * 1e6:.0f} us, result exact"
    return Check("ok", name, text)


def _remedy(error: str) -> str:
    """The one command for a device that is here and does not run."""
    if "xcode-select" in error:
        return "xcode-select --install"
    return "ane-trainer train DATASET --device sim"


def _limits(device: str) -> tuple[Check, ...]:
    """The engine's numeric cliffs against those of the chip's simulator."""
    chip = known_chip()
    if chip is None:
        return ()
    found = compare(DeviceEngine(device, chip), DeviceEngine("sim", chip), only="cliff")
    text = (
        f"{len(found['equal'])} of {found['cases']} cases at numeric limits equal the simulator's of {chip}"
    )
    if found["different"] or found["failed"]:
        return (Check("info", "limits", text, f"ane-trainer conformance --device {device}"),)
    return (Check("ok", "limits", text),)


def _simulator() -> Check:
    """Train one step of a 4-4-2 network; a just-in-time compiler that does not work shows here."""
    try:
        with seeded(0):
            model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        trainer = Trainer(model, device="sim", report=Reporter(), verify="off")
        trainer.fit([(torch.ones(2, 4), torch.tensor([0, 1]))])
    except (AneTrainerError, OSError, RuntimeError) as error:
        return Check("fail", "simulator", f"does not run: {error}", "pip install --force-reinstall llvmlite")
    return Check("ok", "simulator", f"runs; chips {known_chips()[0]} to {known_chips()[-1]}")


def _caches() -> tuple[Check, ...]:
    """Folders that datasets and compiled programs are kept in; both are made by writing to them."""
    return (_cache("data cache", default_root()), _cache("programs", cache_folder()))


def _cache(subject: str, folder: Path) -> Check:
    try:
        os.unlink(atomic_write(folder / ".writable", ""))
    except OSError as error:
        return Check("warn", subject, f"{folder} cannot be written ({error.strerror})", f"mkdir -p {folder}")
    return Check("ok", subject, str(folder))


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
        found = version(distribution)
        if found:
            checks.append(Check("ok", extra, f"{distribution} {found}, for {purpose}"))
        else:
            checks.append(Check("miss", extra, f"for {purpose}", f'pip install "ane_trainer[{extra}]"'))
    return tuple(checks)


def _energy() -> Check:
    """Whether joules can be told."""
    reason = energy.missing()
    if reason is None:
        return Check("ok", "joules", "the engine's counter is read; no administrator needed")
    return Check("info", "joules", f"not known: {reason.partition('. ')[0]}")
