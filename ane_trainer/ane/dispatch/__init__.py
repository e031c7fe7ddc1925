"""Dispatch: compiled training steps and forward passes as things to call, with their state on a device."""

from ane_trainer.ane.dispatch.inference import InferenceProgram, compile_forward
from ane_trainer.ane.dispatch.options import StepOptions, Target, resolve_target
from ane_trainer.ane.dispatch.training import TrainingStep, build_step

__all__ = [
    "InferenceProgram", "StepOptions", "Target", "TrainingStep", "build_step", "compile_forward",
    "resolve_target",
]  # fmt: skip
