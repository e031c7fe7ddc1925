"""Where Core ML would run the operations of an `.mlpackage`: its own plan on a Mac, unknown elsewhere.

`MLComputePlan` (macOS 14.4) is the system's answer, not a measurement; asking it compiles the model for the
engine. Unverified on hardware.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ane_trainer.ane.errors import UsageError
from ane_trainer.commands.options import Output, show

EXTRA = 'pip install "ane_trainer[coreml]"'

#: coremltools' classes of devices, and what we call them.
_NAMES = {
    "MLNeuralEngineComputeDevice": "Neural Engine", "MLGPUComputeDevice": "GPU", "MLCPUComputeDevice": "CPU",
}  # fmt: skip


def placement(
    package: Annotated[Path, typer.Argument(help="An .mlpackage.", metavar="MODEL.mlpackage")],
) -> Output:
    """Show where Core ML would run an .mlpackage: ops on the Neural Engine, the GPU and the CPU.

    Exit code 2: not known here.
    """
    found = place_package(package)
    return show(found, 0 if found.operations is not None else 2)


@dataclass(frozen=True)
class Placement:
    """Operations by preferred device, constants left out; None: not known, `how` says why."""

    operations: dict[str, int] | None
    how: str

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {"operations": self.operations, "how": self.how}

    def as_text(self) -> str:
        """In one line."""
        if self.operations is None:
            return f"placement unknown: {self.how}"
        counted = ", ".join(f"{count} on {name}" for name, count in self.operations.items())
        return f"placement: {counted or 'no operations'}   (known by: {self.how})"


def place_package(path: Path) -> Placement:
    """The plan for the package with every device allowed. Raises: UsageError (ANE100) if there is none."""
    if not (path / "Manifest.json").is_file():
        raise UsageError(f"{path}: needs an .mlpackage folder; got something else. Pass what `export` wrote.")
    reason = missing()
    if reason is not None:
        return Placement(None, reason)
    try:
        return Placement(count_operations(_plan(path)), "Core ML's MLComputePlan; not a measurement")
    except (RuntimeError, ValueError) as fault:  # what coremltools raises for a model that Core ML refuses
        return Placement(None, f"Core ML gave no plan: {fault}")


def missing() -> str | None:
    """None if Core ML can be asked, else why not and what to type."""
    from ane_trainer.ane.dispatch.devices.aneforge_runtime import on_apple_silicon

    if not on_apple_silicon():
        return "only macOS 14.4 or later tells it"
    if importlib.util.find_spec("coremltools") is None:
        return f"the package coremltools is not installed. Install it: {EXTRA}"
    return None


def count_operations(plan: Any) -> dict[str, int]:
    """Operations of the main function by preferred device, most first."""
    counts: Counter[str] = Counter()
    for operation in plan.model_structure.program.functions["main"].block.operations:
        if operation.operator_name.rpartition(".")[2] == "const":
            continue
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        device = type(usage.preferred_compute_device).__name__ if usage is not None else ""
        counts[_NAMES.get(device, "unknown")] += 1
    return dict(counts.most_common())


def _plan(path: Path) -> Any:
    models = importlib.import_module("coremltools.models")
    plans = importlib.import_module("coremltools.models.compute_plan")
    model = models.MLModel(str(path))
    return plans.MLComputePlan.load_from_path(model.get_compiled_model_path())
