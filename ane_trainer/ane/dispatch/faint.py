"""Tell of updates that are too short since a tensor's gradients lie further apart than fp16's squares.

Adam and its like divide each gradient by the root of its square. Of gradients below 1e-5 of their tensor's largest (a
layer behind inputs of 1 and of 30,000) the squares leave fp16, and the least denominator shortens what they move. A
comparison that weighs entries by their gradients does not see that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch

from ane_trainer.ane.dispatch.agreement import Agreement, Reference, compare
from ane_trainer.ane.errors import NumericsWarning

#: Shares of a tensor's largest gradient: below the first squares lose digits, below the second fp32 has noise itself.
_FAINT, _NOISE = 2.0**-13, 2.0**-23
#: An entry is short that moved less than this share of its way, and a step whose entries lack this share together.
_SHORT, _TOLD = 0.75, 0.1


def compare_and_tell(
    step: int, loss: float, changes: Mapping[str, torch.Tensor], expected: Reference
) -> Agreement:
    """How the step agrees with fp32; warns of parameters whose small gradients moved them too little."""
    wanted = expected.changes or {}
    lacks = {name: _lack(changes[name], want, expected.gradients[name]) for name, want in wanted.items()}
    missing, whole = (
        math.hypot(*lacks.values()),
        math.hypot(*(float(want.norm()) for want in wanted.values())),
    )
    if missing > _TOLD * whole:
        name = max(lacks, key=lacks.__getitem__)
        warnings.warn(
            f"step {step}: {100 * missing / whole:.0f} % of the update is missing, most in {name}: "
            "its gradients lie so far apart that fp16 loses the smallest, below 1e-5 of its largest, or their squares. "
            'Bring what goes in to like sizes (each column of the inputs, say), or compile with optimizer_on="host".',
            NumericsWarning,
            stacklevel=4,
        )
    return compare(step, loss, changes, expected)


def _lack(change: torch.Tensor, want: torch.Tensor, gradient: torch.Tensor) -> float:
    """The size of what is missing of the changes that go with small gradients."""
    share = gradient.abs() / gradient.abs().amax().clamp(min=1e-38)
    short = (
        (share < _FAINT) & (share > _NOISE) & (change * want >= 0.0) & (change.abs() < _SHORT * want.abs())
    )
    return float(((want - change) * short).norm())
