"""Programs of blocks: a step's program divided where modules repeat, each distinct part once.

recompute  activations computed again in the backward pass
places   which part each operation belongs to
cut      the parts, with what goes from one to the next
alike    parts that are alike as one program, and the dispatches of each
choose   whether a step is divided, and how many blocks are one
"""

from ane_trainer.ane.compiler.blocks.choose import BLOCKS, Divided, Division, check_blocks

__all__ = ["BLOCKS", "Divided", "Division", "check_blocks"]
