"""Dispatch: compiled training steps and forward passes as things to call, with their state on a device."""

from ane_trainer.ane.dispatch.inference import InferenceProgram, compile_forward
from ane_trainer.ane.dispatch.training import TrainingStep, compile_step

__all__ = ["InferenceProgram", "TrainingStep", "compile_forward", "compile_step"]
