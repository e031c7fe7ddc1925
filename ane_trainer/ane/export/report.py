"""What an export is asked for, and what is known about its file because it was run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ane_trainer.ane.mil.weights import Array


@dataclass(frozen=True)
class ExportOptions:
    """How a file is written, and on what it is checked.

    input     "tensor": what training fed; "image": pixels, normalised inside; "auto": images where it can.
    weights   fp16, int8 or int4 (mlpackage), fp32 (step-aimodel).
    batch     examples that go in at once.
    examples  how many the file is checked on.
    chip, fidelity
              of the simulator that runs the file again.
    state     form of a training step: io (inputs and outputs), state (in place) or both; see `export.step`.
    texts     metadata, by key.
    """

    input: str = "auto"
    weights: str = "fp16"
    batch: int = 1
    examples: int = 256
    chip: str = "m4"
    fidelity: str = "exact"
    state: str = "io"
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportReport:
    """An exported file and its check.

    `largest_difference` is that of any output (or state) from the reference that `reference` names, over
    `examples` examples (steps, for a training step). `accuracy` is the file's, `reference_accuracy` the
    reference's on the same examples; None where the outputs are not classes. `unverified` is what only a Mac
    can show.
    """

    path: Path
    format: str
    size_bytes: int
    weights: str
    checked_by: str
    reference: str
    examples: int
    largest_difference: float
    accuracy: float | None = None
    reference_accuracy: float | None = None
    unverified: str = ""

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def as_text(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.path}   {self.format}, {self.weights} weights, {self.size_bytes / 1e6:.2f} MB"]
        unit = "steps" if self.format.startswith("step") else "examples"
        lines.append(f"checked    {self.examples:,} {unit} by {self.checked_by}")
        lines.append(f"           largest difference {self.largest_difference:.3g} from {self.reference}")
        if self.accuracy is not None and self.reference_accuracy is not None:
            lines.append(f"accuracy   {self.accuracy:.2%}; the reference's {self.reference_accuracy:.2%}")
        if self.unverified:
            lines.append(f"unverified {self.unverified}")
        return "\n".join(lines)


def size_bytes(path: Path) -> int:
    """Bytes of a file or of everything in a folder."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def accuracy(outputs: Array, labels: Array | None) -> float | None:
    """Share of rows whose largest output is the label; None without class labels."""
    if labels is None or outputs.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        return None
    return float((outputs.argmax(axis=1) == labels).mean())


def largest_difference(a: Array, b: Array) -> float:
    """Of two arrays, as float64; infinite where one has a number and the other none."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    gap = np.where(a == b, 0.0, np.where(np.isnan(gap), np.inf, gap))
    return float(gap.max(initial=0.0))
