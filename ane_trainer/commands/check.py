"""`check`: will a model's training step run on a chip, op by op, with the reason and the way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.commands.options import (
    Batch,
    Classes,
    Dataset,
    Input,
    Model,
    Optimizer,
    Output,
    example_sizes,
    show,
)

if TYPE_CHECKING:
    from ane_trainer.ane.dispatch import TrainingStep


def check(
    model: Model,
    dataset: Dataset = "mnist",
    input_shape: Input = None,
    classes: Classes = None,
    batch: Batch = 128,
    optimizer: Optimizer = "adam",
    chip: Annotated[str, typer.Option(help="One or more, e.g. m1,m4.", metavar="NAMES")] = "m4",
) -> Output:
    """Say whether a model trains on a chip, op by op.

    `trains`: every op is known to run there. `unproven`: nothing refuses it, but no source covers what is listed.
    `does not train`: the reasons follow, each with its place and a way out; the exit code is then 3.
    """
    shape, count = example_sizes(dataset, input_shape, classes, "check")
    found = check_model(model, shape, count, batch, optimizer, tuple(chip.split(",")))
    return show(found, 0 if found.fits else 3)


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

    @property
    def verdict(self) -> str:
        """`trains`, `unproven` (an op or a size that no source covers) or `does not train`."""
        if self.refused:
            return "does not train"
        beyond = any(note.where == "program" for note in self.notes)  # larger than any known to compile
        return "unproven" if beyond or self.ops.get("unknown") else "trains"


@dataclass(frozen=True)
class Verdict:
    """The answer of `check` for several chips."""

    model: str
    chips: tuple[ChipVerdict, ...]

    @property
    def fits(self) -> bool:
        """True if the step runs on every chip asked about."""
        return all(chip.fits for chip in self.chips)

    def to_json(self) -> dict[str, object]:
        """The same for machines."""
        return {
            "model": self.model,
            "fits": self.fits,
            "chips": [{**asdict(chip), "fits": chip.fits, "verdict": chip.verdict} for chip in self.chips],
        }

    def as_text(self) -> str:
        """A line a chip, then every reason with its place and the way out."""
        lines = []
        for chip in self.chips:
            counted = ", ".join(f"{count} {status}" for status, count in sorted(chip.ops.items()))
            lines.append(f"{chip.title:<10}{chip.verdict:<16}{f'ops: {counted}' if counted else ''}".rstrip())
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
    from ane_trainer.ane.chips.lookup import get_chip, op_status

    known = [get_chip(chip) for chip in chips]
    verdicts = []
    for chip in known:
        try:
            step = compile_model(model, in_shape, classes, batch, optimizer, chip.name, where="check")
        except UnsupportedModel as error:
            verdicts.append(ChipVerdict(chip.name, chip.title, error.findings, (), {}))
            continue
        statuses = Counter[str](op_status(op.kind, chip).status for op in step.program.main.ops)
        verdicts.append(ChipVerdict(chip.name, chip.title, (), step.compiled.legalized.notes, dict(statuses)))
    return Verdict(model, tuple(verdicts))


def compile_model(
    model: str, in_shape: Sequence[int], classes: int, batch: int, optimizer: str, chip: str, *, where: str
) -> TrainingStep:
    """The compiled step of the model with random weights; errors begin with `where`."""
    import torch

    from ane_trainer.ane.dispatch import StepOptions, build_step, resolve_target
    from ane_trainer.models import build_model
    from ane_trainer.training.config import make_config
    from ane_trainer.training.optimizers import make_optimizer

    config = make_config(
        {"dataset": "mnist", "model": model, "batch_size": batch, "optimizer": optimizer, "chip": chip},
        where=where,
    )
    module = build_model(model, tuple(in_shape), classes, seed=0)
    target = resolve_target("sim", chip, "exact")
    example = (torch.zeros(batch, *in_shape), torch.zeros(batch, dtype=torch.int64))
    options = StepOptions(sync="lazy")
    return build_step(module, "cross_entropy", make_optimizer(config, module), example, target, options)
