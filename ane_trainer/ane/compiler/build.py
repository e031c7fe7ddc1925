"""From a captured graph to what a device loads, in the precision that the device takes."""

from __future__ import annotations

from ane_trainer.ane.compiler.emit import compile_program
from ane_trainer.ane.compiler.legalize import legalize
from ane_trainer.ane.compiler.lower import lower
from ane_trainer.ane.stages import Captured, Compiled, Legalized


def prepare(captured: Captured, chip: str, path: str, precision: str) -> Compiled:
    """Lower, legalize and compile.

    A program in single precision never reaches an engine, which computes in fp16: no chip's limits bind it.
    Raises: UnsupportedModel for ops without a rule, and for what the chip refuses (fp16).
    """
    lowered = lower(captured, dtype=precision)
    legal = Legalized(lowered, chip, path) if precision == "fp32" else legalize(lowered, chip, path)
    return compile_program(legal)
