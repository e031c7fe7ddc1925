"""Runs the suite on a device and on the simulator; one JSON report that fits into a message."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ane_trainer.ane.dispatch.devices.machine import describe, known_chip
from ane_trainer.ane.errors import AneTrainerError, DataError, EnvironmentFault, UnsupportedModel
from ane_trainer.ane.verify.vectors import PROGRAMS
from ane_trainer.commands.conformance.case import Case, fingerprint
from ane_trainer.commands.conformance.compare import difference
from ane_trainer.commands.conformance.engines import MODELS, DeviceEngine, Outputs, as_compiled, check
from ane_trainer.commands.conformance.suite import VERSION, suite
from ane_trainer.utils import atomic_write

FORMAT = "ane_trainer conformance 1"

#: What a case needs to be run: engine -> outputs; and the fingerprint of program and inputs.
Run = Callable[[DeviceEngine], Outputs]

#: Vectors that a report leaves out: searches of many programs, and inputs of a million values.
_LEFT_OUT = ("accumulation limit", "K=", "S=2", "N=512")


def examine(
    device: DeviceEngine,
    reference: DeviceEngine,
    only: str = "",
    progress: Callable[[str, int, int], None] = lambda name, number, count: None,
) -> dict[str, Any]:
    """Run every case whose name or family contains `only` on both; the report as plain values.

    A case that the device does not run is listed under `failed` with its reason, one that the chip's tables
    refuse under `skipped`; neither ends the examination.
    """
    started = time.perf_counter()
    chosen = [case for case in _cases(reference) if only in f"{case[0]} {case[1]}"]
    report: dict[str, object] = {
        "format": FORMAT,
        "suite": VERSION,
        "machine": describe(),
        "machine_chip": known_chip(),
        "device": {"name": device.device, "chip": device.chip, "fidelity": device.fidelity},
        "compared_with": {"name": reference.device, "chip": reference.chip, "fidelity": reference.fidelity},
        "cases": len(chosen),
        "equal": {},
        "different": [],
        "failed": [],
        "skipped": [],
    }
    inputs = hashlib.sha256()
    for number, (family, name, mark, run) in enumerate(chosen, 1):
        progress(name, number, len(chosen))
        inputs.update(f"{name} {mark}\n".encode())
        _examine_case(report, f"{family}: {name}", mark, partial(run, device), partial(run, reference))
    report["suite_fingerprint"] = inputs.hexdigest()[:12]
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def headline(report: dict[str, Any]) -> str:
    """What came out, in one line."""
    counts = [f"{len(report[kind])} {kind}" for kind in ("equal", "different", "failed", "skipped")]
    device, other = report["device"], report["compared_with"]
    return (
        f"{device['name']} ({device['chip']}, {device['fidelity']}) against the simulator of {other['chip']}: "
        f"{report['cases']} cases, {', '.join(counts)}"
    )


def as_text(report: dict[str, Any]) -> str:
    """The headline, then each case that is not equal."""
    lines = [headline(report)]
    for entry in report["different"]:
        found = (
            f"{entry['count']} of {entry['of']} differ, by up to {entry['max_ulp']} ulp"
            if "count" in entry
            else ("another shape or dtype")
        )
        lines.append(f"  different  {entry['case']}  {found}")
    for kind in ("failed", "skipped"):
        lines += [f"  {kind:<9}  {entry['case']}  {entry['reason']}" for entry in report[kind]]
    return "\n".join(lines)


def write_report(report: dict[str, object], path: Path) -> Path:
    """As one line of JSON without spaces. Raises: EnvironmentFault (ANE204) where it cannot be written."""
    try:
        atomic_write(path, json.dumps(report, separators=(",", ":")) + "\n")
    except OSError as fault:
        raise EnvironmentFault(
            f"{path}: needs a place to write the report; got {fault.strerror}. Choose another with --out.",
            code="ANE204",
        ) from None
    return path


def read_report(path: Path) -> dict[str, object]:
    """A report that `write_report` wrote. Raises: DataError (DATA113) for anything else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise _unreadable(path, str(fault)) from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise _unreadable(path, "another format")
    return report


def _unreadable(path: Path, got: str) -> DataError:
    return DataError(
        f"{path}: needs a report of `ane-trainer conformance`; got {got}. Pass the file that it wrote.",
        code="DATA113",
    )


def _examine_case(
    report: dict[str, Any], name: str, mark: str, run: Callable[[], Outputs], wanted: Callable[[], Outputs]
) -> None:
    try:
        want = wanted()
    except UnsupportedModel as refusal:
        report["skipped"].append({"case": name, "reason": _short(refusal)})
        return
    try:
        got = run()
    except AneTrainerError as fault:
        report["failed"].append({"case": name, "inputs": mark, "reason": _short(fault)})
        return
    wrong = {key: difference(got[key], value) for key, value in want.items()}
    values = sum(value.size for value in want.values())
    if not any(wrong.values()):
        report["equal"][name] = values
    for output, found in wrong.items():
        if found is not None:
            report["different"].append(
                {"case": name, "output": output, "inputs": mark, "values": values, **found}
            )


def _short(fault: AneTrainerError) -> str:
    return " ".join(str(fault).split())[:200]


def _cases(reference: DeviceEngine) -> Iterator[tuple[str, str, str, Run]]:
    """Family, name, fingerprint and how it is run."""
    for case in suite():
        program, feeds = case.make()
        compiled = as_compiled(program, reference.chip)
        yield (
            case.family,
            case.name,
            fingerprint(compiled.text, compiled.weights, feeds),
            partial(_run_case, case),
        )
    for name in PROGRAMS:
        if not name.startswith(_LEFT_OUT):
            yield "vector", name, "", partial(_run_vector, name)
    for name in MODELS:
        yield "training", name, "", partial(_train, name)


def _run_case(case: Case, engine: DeviceEngine) -> Outputs:
    program, feeds = case.make()
    check(program, engine.chip)
    return engine(program, feeds)


def _run_vector(name: str, engine: DeviceEngine) -> Outputs:
    def run(program: Any, feeds: Any) -> Outputs:
        check(program, engine.chip)
        return engine(program, feeds)

    return {"value": np.atleast_1d(np.asarray(PROGRAMS[name](run), np.float16))}


def _train(name: str, engine: DeviceEngine) -> Outputs:
    return engine.train(name)
