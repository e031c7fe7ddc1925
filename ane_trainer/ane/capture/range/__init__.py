"""The range pass: the captured graph in forms that do not leave the engine's range."""

from ane_trainer.ane.capture.range.apply import GUARD, calibrated, keep_in_range, scale_found
from ane_trainer.ane.capture.range.cancelling import drop_cancelled
from ane_trainer.ane.capture.range.counting import count_in_floats
from ane_trainer.ane.capture.range.nearest import cut_far_codes
from ane_trainer.ane.capture.range.rows import scale_rows
from ane_trainer.ane.capture.range.whole import read_as_floats

__all__ = [
    "GUARD",
    "calibrated",
    "count_in_floats",
    "cut_far_codes",
    "drop_cancelled",
    "keep_in_range",
    "read_as_floats",
    "scale_found",
    "scale_rows",
]
