"""What MIL programs mean: every op in double precision, without the engine's rounding, limits or tables.

An oracle that shares nothing with the simulator and the lowering. Two choices follow the engine where MIL
leaves them open: halves are rounded away from zero, and 0 times infinity is 0.
"""

from ane_trainer.ane.mil.semantics import (
    compression,
    contraction,
    elementwise,
    indexing,
    movement,
    reduction,
    resizing,
)
from ane_trainer.ane.mil.semantics.evaluator import Trace, apply, evaluate, trace
from ane_trainer.ane.mil.semantics.registry import MEANINGS, literal_array, wide_dtype

__all__ = [
    "MEANINGS",
    "WITHOUT_MEANING",
    "Trace",
    "apply",
    "evaluate",
    "literal_array",
    "trace",
    "wide_dtype",
]

#: Importing a family registers its meanings.
_FAMILIES = (compression, contraction, elementwise, indexing, movement, reduction, resizing)

#: Ops with a type rule and no meaning of their own: kind -> why.
WITHOUT_MEANING = {
    **dict.fromkeys(["read_state", "write_state", "coreml_update_state"], "the evaluator keeps the states"),
    **dict.fromkeys(
        ["random_bernoulli", "random_categorical", "random_normal", "random_uniform"],
        "random numbers are not a function of the inputs",
    ),
}
