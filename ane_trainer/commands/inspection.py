"""`check` and `estimate`: will a model's training step run on a chip, op by op, and what will it take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ane_trainer.ane.chips import cost as costs
from ane_trainer.ane.chips.lookup import get_chip, op_status
from ane_trainer.ane.dispatch import StepOptions
from ane_trainer.ane.errors import Finding, UnsupportedModel, UsageError
from ane_trainer.models import build_model
from ane_trainer.training import engine
from ane_trainer.training.config import make_config
from ane_trainer.training.optimizers import make_optimizer
from ane_trainer.utils import format_count


@dataclass(frozen=True)
class ChipVerdict:
    """Whether the step runs on one chip: `refused` are the reasons why not, `notes` what is good to know.

    `ops` counts the program's ops by what the chip's tables say of them: native, reachable, refused, unknown.
    """

    chip: str
    title: str
    refused: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    ops: dict[str, int]

    @property
    def fits(self) -> bool:
        """True if nothing refuses the step."""
        return not self.refused


@dataclass(frozen=True)
class Verdict:
    """The answer of `check` for several chips."""

    model: str
    chips: tuple[ChipVerdict, ...]

    @property
    def fits(self) -> bool:
        """True if the step runs on every chip asked about."""
        return all(chip.fits for chip in self.chips)

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "model": self.model,
            "fits": self.fits,
            "chips": [{**asdict(chip), "fits": chip.fits} for chip in self.chips],
        }

    def as_text(self) -> str:
        """A line a chip, then every reason with its place and the way out."""
        lines = []
        for chip in self.chips:
            counted = ", ".join(f"{count} {status}" for status, count in sorted(chip.ops.items()))
            verdict = "trains" if chip.fits else "does not train"
            lines.append(f"{chip.title:<10}{verdict:<16}{f'ops: {counted}' if counted else ''}".rstrip())
        reasons: dict[Finding, list[str]] = {}
        for chip in self.chips:
            for finding in (*chip.refused, *chip.notes):
                reasons.setdefault(finding, []).append(chip.chip)
        for number, (finding, chips) in enumerate(reasons.items(), 1):
            lines.append(f"{number:>3}  [{', '.join(chips)}] {finding}")
        return "\n".join(lines)


def check_model(
    model: str, in_shape: Sequence[int], classes: int, batch: int, optimizer: str, chips: Sequence[str]
) -> Verdict:
    """Compile the training step for each chip and collect what is refused."""
    known = [get_chip(chip) for chip in chips]
    verdicts = []
    for chip in known:
        try:
            step = _compile(model, in_shape, classes, batch, optimizer, chip.name)
        except UnsupportedModel as error:
            verdicts.append(ChipVerdict(chip.name, chip.title, error.findings, (), {}))
            continue
        statuses = Counter[str](op_status(op.kind, chip).status for op in step.program.main.ops)
        verdicts.append(ChipVerdict(chip.name, chip.title, (), step.compiled.legalized.notes, dict(statuses)))
    return Verdict(model, tuple(verdicts))


def estimate_model(
    model: str, in_shape: Sequence[int], classes: int, batch: int, optimizer: str, chip: str
) -> dict[str, Any]:
    """The cost model's figures for one training step; `latency_us` is None where nothing is known."""
    step = _compile(model, in_shape, classes, batch, optimizer, chip)
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
    """The estimate for people: the step, how sure, and the dearest ops."""
    head = f"{found['model']}, batch {found['batch']}, on {found['title']}"
    if found["latency_us"] is None:
        return f"{head}: not known; no measurement of this chip is published"
    band = "error not known" if found["error_band"] is None else f"+-{found['error_band']:.0%}"
    energy = "not known" if found["energy_uj"] is None else f"{found['energy_uj']:,.0f} uJ"
    lines = [
        f"{head}: {found['latency_us']:,.0f} us a step ({band}); dispatch {found['dispatch_us']:,.0f} us",
        f"energy {energy} a step   {format_count(found['flops'])} FLOPs a step",
        f"rates: {found['provenance']}",
        "dearest ops:",
    ]
    for op in found["ops"][:rows]:
        lines.append(f"  {op['latency_us']:>9.2f} us  {op['op']:<14}{op['bound_by']:<12}{op['name']}")
    return "\n".join(lines)


def _compile(model: str, in_shape: Sequence[int], classes: int, batch: int, optimizer: str, chip: str) -> Any:
    """The compiled step of the model with random weights."""
    config = make_config(
        {"dataset": "mnist", "model": model, "batch_size": batch, "optimizer": optimizer, "chip": chip},
        where="check",
    )
    if classes < 1 or any(size < 1 for size in in_shape):
        raise UsageError(
            "check: needs positive sizes for --input and --classes. Correct them.", code="ANE104"
        )
    module = build_model(model, tuple(in_shape), classes, seed=0)
    target = engine.choose_target("sim", chip, "exact")
    example = (torch.zeros(batch, *in_shape), torch.zeros(batch, dtype=torch.int64))
    return engine.make_step(
        module, config.loss, make_optimizer(config, module), example, target, StepOptions(sync="lazy")
    )
