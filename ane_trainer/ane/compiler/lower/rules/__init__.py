"""Lowering rules by family: `aten -> MIL`, one function per ATen overload. Importing a module registers its rules."""

from ane_trainer.ane.compiler.lower.rules import (  # noqa: F401
    activation,
    contraction,
    convolution,
    gamma,
    indexing,
    interpolation,
    loss,
    pointwise,
    pooling,
    predicates,
    reduction,
    scattering,
    slicing,
    sorting,
    views,
)
