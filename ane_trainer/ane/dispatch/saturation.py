"""What is said of values of the forward pass that left fp16 in a step."""

from __future__ import annotations

from ane_trainer.ane.capture.scaling import STATISTICS


def left_fp16(place: str) -> str:
    """A value of `place` did: the update was skipped, or, of running statistics, these are cut off."""
    if place.endswith(STATISTICS):
        return (
            f"{place}: the variance of a batch is beyond fp16 (65,504), which the example did not come near. The "
            "update is right; the running variance, which evaluation takes, is cut off. Normalise the inputs, or "
            "compile with such a batch as the example. Later ones are counted in `step.health`."
        )
    return (
        f"{place}: a value of the forward pass left fp16, which the example did not come near. The update "
        "was skipped. Lower the learning rate, clip the gradients, or compile with such a batch as the example "
        "(or in `calibrate_on`). Later ones are counted in `step.health`."
    )
