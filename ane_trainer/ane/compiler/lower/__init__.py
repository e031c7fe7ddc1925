"""Lower: a captured FX graph of ATen ops becomes one MIL program, one rule per ATen overload.

float32 and integers become the program's float type (fp16), booleans stay booleans, rank 0 becomes `[1]`.
Nodes whose operands are all known are computed here, so constants need no rules.
"""

from ane_trainer.ane.compiler.lower.graph import lower
from ane_trainer.ane.compiler.lower.registry import RULES, known_overloads, lowering
from ane_trainer.ane.compiler.lower.rules import (
    activation,
    constants,
    contraction,
    convolution,
    gamma,
    indexing,
    interpolation,
    joining,
    loss,
    normalization,
    picking,
    pointwise,
    pooling,
    predicates,
    reduction,
    scattering,
    segments,
    slicing,
    sorting,
    strided,
    triangular,
    views,
)

__all__ = ["RULES", "known_overloads", "lower", "lowering"]
