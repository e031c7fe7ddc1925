"""The range pass: the captured graph in forms that do not leave the engine's range."""

from ane_trainer.ane.capture.range.apply import calibrated, keep_in_range, scale_found
from ane_trainer.ane.capture.range.rows import scale_rows

__all__ = ["calibrated", "keep_in_range", "scale_found", "scale_rows"]
