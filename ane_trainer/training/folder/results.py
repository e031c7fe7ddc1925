"""The outcome of training as values: one record per epoch, the result of the run, and their JSON form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast


@dataclass(frozen=True)
class Metrics:
    """Mean loss and share of right answers over `examples`; accuracy is None where there are no classes.

    `scores` are (name, value) of the trainer's metrics.
    """

    loss: float
    accuracy: float | None
    examples: int
    scores: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data. `steps` and `skipped_steps` count this epoch only.

    `energy_joules` is what the engine's counter said for the steps; None: not known. `scores` are those of the
    validation data.
    """

    epoch: int
    steps: int
    train_loss: float
    val_loss: float | None
    val_accuracy: float | None
    loss_scale: float
    skipped_steps: int
    seconds: float
    energy_joules: float | None = None
    scores: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, object]:
        """As a line of metrics.jsonl; a score is `val_` and its name, None if it is not finite."""
        plain = {name.name: getattr(self, name.name) for name in fields(self) if name.name != "scores"}
        return plain | {f"val_{name}": value if math.isfinite(value) else None for name, value in self.scores}


@dataclass(frozen=True)
class Result:
    """What a training run did and what is known about it.

    `steps` counts dispatched steps, skipped ones included; `seconds_total` is the wall time from loading the
    data to the last evaluation, `seconds_per_step` the mean of the loop without compiling. `placement` says
    where the step's ops ran and how that is known. `estimate` is the cost model's figure for one step on the
    chip, `fp32_reference` the test accuracy of plain PyTorch, `health` counts by module the batches of which a gradient
    left its range, `agreement` compares the first step with fp32, `weights_epoch` is the epoch
    whose weights were kept (the last, or the best). None always means "not known", never zero.
    """

    dataset: str | None
    model: str
    parameters: int
    epochs: int
    steps: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None
    device: str
    chip: str | None
    fidelity: str | None
    compiles: int
    dispatches_per_step: float
    engine_flop_fraction: float | None
    host_bytes_per_step: int | None
    loss_scale: float | None
    skipped_steps: int
    seconds_total: float
    seconds_compile: float
    seconds_per_step: float
    fp32_reference: float | None = None
    placement: Mapping[str, object] = field(default_factory=dict)
    estimate: Mapping[str, Any] | None = None
    energy_joules: float | None = None
    health: Mapping[str, int] = field(default_factory=dict)
    agreement: Mapping[str, object] | None = None
    history: tuple[Epoch, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    weights_epoch: int | None = None

    @property
    def kept(self) -> Epoch | None:
        """The epoch whose weights were kept."""
        return next((record for record in self.history if record.epoch == self.weights_epoch), None)

    def to_json(self) -> dict[str, object]:
        """As result.json; `details` (versions, seeds, batch size, paths) are merged into the top level."""
        plain = {name.name: getattr(self, name.name) for name in fields(self)}
        plain["history"] = [epoch.to_json() for epoch in self.history]
        return {**plain.pop("details"), **plain}


def interval_text(estimate: Mapping[str, object]) -> str:
    """How sure an estimate is, as a share of its latency: `-12 to +28 %`; of runs before intervals, what they hold."""
    ends, band = estimate.get("latency_interval_us"), estimate.get("error_band")
    if ends is None:
        return "error not known" if band is None else f"+-{band:.0%}"
    whole = cast(float, estimate["latency_us"])
    low, high = (end / whole - 1 for end in cast(list[float], ends))
    return f"{low * 100:+.0f} to {high * 100:+.0f} %"


def text_of(scores: Iterable[tuple[str, float]]) -> str:
    """Scores for a line: `  auroc 0.9912`."""
    return "".join(f"  {name} {value:.4f}" for name, value in scores if math.isfinite(value))
