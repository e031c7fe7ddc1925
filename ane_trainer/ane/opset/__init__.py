"""MIL's operations: parameters and type rules, one module per family; `infer` is the way in."""

from ane_trainer.ane.opset import contraction, elementwise, movement, pooling, reduction
from ane_trainer.ane.opset.builder import Builder
from ane_trainer.ane.opset.registry import Call, OpDef, Param, bind, infer, known_ops, op_def

__all__ = [
    "Builder", "Call", "OpDef", "Param", "bind", "infer", "known_ops", "op_def",
    "contraction", "elementwise", "movement", "pooling", "reduction",
]  # fmt: skip
