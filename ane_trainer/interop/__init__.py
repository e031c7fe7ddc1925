"""Other frameworks on the simulator: `interop.aneforge`."""

from ane_trainer.interop import aneforge

__all__ = ["aneforge"]
