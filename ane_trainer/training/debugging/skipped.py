"""Explains a step whose update is skipped whatever op runs in double precision: its gradients fit into no unit."""

from __future__ import annotations

from ane_trainer.ane.verify.faults import HELP
from ane_trainer.training.debugging.remedies import Bench
from ane_trainer.training.debugging.report import Fault, Place, Remedy
from ane_trainer.training.debugging.scores import SKIPPED, Score
from ane_trainer.training.debugging.trials import Trial

_POWERS = (6, 12, 18, 24)


def skipped(bench: Bench, trial: Trial, best: Score) -> tuple[Fault, ...]:
    """The loss as the fault, with smaller ones tried; nothing where double precision (`best`) takes the update."""
    if best.note != SKIPPED:
        return ()
    remedies = []
    for power in _POWERS:
        after = bench.with_loss(2.0**-power).attempt(trial.way).score
        how = f"divide the loss by {2**power:,} (plain SGD: its steps shrink by as much), or normalise the targets"
        remedies.append(Remedy("smaller loss", how, trial.score, after))
        if after.agrees:
            break
    facts = "its gradients are beyond the smallest unit that the optimizer takes, in double precision as well"
    fault = Fault("loss", "loss", Place("loss"), "loss", "overflow", facts, trial.score, remedies=tuple(remedies),
                  advice="" if remedies[-1].heals else HELP["overflow"])  # fmt: skip
    return (fault,)
