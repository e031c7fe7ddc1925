"""Rules for optimizers: what each keeps, and its update in operations that survive fp16."""

from ane_trainer.ane.capture.optimizers.rule import (
    RESIDUAL_SCALE,
    ROOT_FACTOR,
    Rule,
    Slot,
    Update,
    adapted,
    average,
    average_square,
    decay_scalars,
    root_epsilon,
    root_mean_square,
    square_scalars,
    square_slot,
    step_rate,
)
from ane_trainer.ane.capture.optimizers.table import register_optimizer

__all__ = [
    "RESIDUAL_SCALE",
    "ROOT_FACTOR",
    "Rule",
    "Slot",
    "Update",
    "adapted",
    "average",
    "average_square",
    "decay_scalars",
    "register_optimizer",
    "root_epsilon",
    "root_mean_square",
    "square_scalars",
    "square_slot",
    "step_rate",
]
