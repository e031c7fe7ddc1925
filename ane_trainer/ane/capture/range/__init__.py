"""The range pass: the captured graph in forms that do not leave the engine's range."""

from ane_trainer.ane.capture.range.apply import calibrated, keep_in_range, scale_found
from ane_trainer.ane.capture.range.cancelling import drop_cancelled
from ane_trainer.ane.capture.range.rows import scale_rows

__all__ = ["calibrated", "drop_cancelled", "keep_in_range", "scale_found", "scale_rows"]
