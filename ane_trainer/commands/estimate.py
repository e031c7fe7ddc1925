"""`estimate`: what one training step takes on the engine by the cost model: time, energy, the most expensive ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ane_trainer.commands.check import compile_model
from ane_trainer.commands.options import (
    Batch,
    Chip,
    Classes,
    Dataset,
    Input,
    Model,
    Optimizer,
    Output,
    example_sizes,
)
from ane_trainer.utils import format_count


def estimate(
    model: Model,
    dataset: Dataset = "mnist",
    input_shape: Input = None,
    classes: Classes = None,
    batch: Batch = 128,
    optimizer: Optimizer = "adam",
    chip: Chip = "m4",
) -> Output:
    """Estimate the time and energy of a training step on the engine."""
    shape, count = example_sizes(dataset, input_shape, classes, "estimate")
    found = estimate_model(model, shape, count, batch, optimizer, chip)
    return Output(found, estimate_text(found))


def estimate_model(
    model: str, in_shape: Sequence[int], classes: int, batch: int, optimizer: str, chip: str
) -> dict[str, Any]:
    """The cost model's figures for one training step; `latency_us` is None where nothing is known."""
    from ane_trainer.ane.chips import cost as costs
    from ane_trainer.ane.chips.lookup import get_chip

    step = compile_model(model, in_shape, classes, batch, optimizer, chip, where="estimate")
    found = get_chip(chip)
    base = {"model": model, "batch": batch, "chip": found.name, "title": found.title}
    cost = costs.estimate(step.program, found)
    if cost is None:
        return {**base, "latency_us": None, "energy_uj": None, "ops": []}
    dearest = sorted(cost.ops, key=lambda op: op.latency_us, reverse=True)
    return {
        **base,
        "latency_us": cost.latency_us,
        "energy_uj": cost.energy_uj,
        "dispatch_us": cost.dispatch_us,
        "flops": cost.flops,
        "engine_flops": cost.engine_flops,
        "error_band": cost.error_band,
        "provenance": cost.provenance,
        "ops": [{**asdict(op), "latency_us": op.latency_us} for op in dearest],
    }


def estimate_text(found: dict[str, Any], rows: int = 8) -> str:
    """The estimate for people: the step, how sure, and the most expensive ops."""
    head = f"{found['model']}, batch {found['batch']}, on {found['title']}"
    if found["latency_us"] is None:
        return f"{head}: not known; no measurement of this chip is published"
    band = "error not known" if found["error_band"] is None else f"+-{found['error_band']:.0%}"
    energy = "not known" if found["energy_uj"] is None else f"{found['energy_uj']:,.0f} uJ"
    lines = [
        f"{head}: {found['latency_us']:,.0f} us a step ({band}); dispatch {found['dispatch_us']:,.0f} us",
        f"energy {energy} a step   {format_count(found['flops'])} FLOPs a step",
        f"rates: {found['provenance']}",
        "most expensive ops:",
    ]
    for op in found["ops"][:rows]:
        lines.append(f"  {op['latency_us']:>9.2f} us  {op['op']:<14}{op['bound_by']:<12}{op['name']}")
    return "\n".join(lines)
