"""The Neural Engine: programs, legality, simulator, cost model, devices."""

from ane_trainer.ane import dynamo
from ane_trainer.ane.chips.cost import estimate
from ane_trainer.ane.mil.loading import load_program
from ane_trainer.ane.simulator import simulate
from ane_trainer.ane.verify.profiling import compare, profile

__all__ = ["compare", "dynamo", "estimate", "load_program", "profile", "simulate"]
