"""The Neural Engine: programs, legality, simulator, cost model, devices; each name is imported at first use."""

from typing import TYPE_CHECKING

from ane_trainer.utils import lazy_names

if TYPE_CHECKING:
    from ane_trainer.ane import dynamo as dynamo
    from ane_trainer.ane.chips.cost import estimate as estimate
    from ane_trainer.ane.mil.loading import load_program as load_program
    from ane_trainer.ane.simulator import simulate as simulate
    from ane_trainer.ane.verify.profiling import compare as compare
    from ane_trainer.ane.verify.profiling import profile as profile

_PLACES = {
    "compare": "ane_trainer.ane.verify.profiling",
    "dynamo": "",
    "estimate": "ane_trainer.ane.chips.cost",
    "load_program": "ane_trainer.ane.mil.loading",
    "profile": "ane_trainer.ane.verify.profiling",
    "simulate": "ane_trainer.ane.simulator",
}

__all__ = [*_PLACES]

if not TYPE_CHECKING:  # so that a wrong name is still an error to a type checker
    __getattr__, __dir__ = lazy_names(__name__, _PLACES)
