"""Lower: a captured FX graph of ATen ops becomes one MIL program, one rule per ATen overload.

float32 and integers become the program's float type (fp16), booleans stay booleans, rank 0 becomes `[1]`.
Nodes whose operands are all known are computed here, so constants need no rules.
"""

from ane_trainer.ane.lower import (  # noqa: F401  (importing a family registers its rules)
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
from ane_trainer.ane.lower.graph import lower
from ane_trainer.ane.lower.registry import RULES, known_overloads, lowering

__all__ = ["RULES", "known_overloads", "lower", "lowering"]
