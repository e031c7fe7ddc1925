"""MIL's operations: parameters and type rules, one module per family; `infer` is the way in."""

from ane_trainer.ane.mil.opset import (
    compression,
    contraction,
    creation,
    elementwise,
    indexing,
    movement,
    rearrange,
    reduction,
    resizing,
)
from ane_trainer.ane.mil.opset.builder import Builder
from ane_trainer.ane.mil.opset.registry import Call, OpDef, Param, bind, family, infer, known_ops, op_def

__all__ = [
    "Builder", "Call", "OpDef", "Param", "bind", "compression", "contraction", "creation", "elementwise",
    "family", "indexing", "infer", "known_ops", "movement", "op_def", "rearrange",
    "reduction", "resizing",
]  # fmt: skip
