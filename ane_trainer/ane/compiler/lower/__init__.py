"""Lower: a captured FX graph of ATen ops becomes one MIL program, one rule per ATen overload.

float32 and integers become the program's float type (fp16), booleans stay booleans, rank 0 becomes `[1]`.
Nodes whose operands are all known are computed here, so constants need no rules.
"""

from ane_trainer.ane.compiler.lower import rules
from ane_trainer.ane.compiler.lower.graph import lower
from ane_trainer.ane.compiler.lower.registry import RULES, known_overloads, lowering

__all__ = ["RULES", "known_overloads", "lower", "lowering", "rules"]
