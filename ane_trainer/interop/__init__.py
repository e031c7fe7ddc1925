"""Other frameworks: `interop.aneforge` on the simulator, `interop.accelerate` with the torch.compile backend."""

from ane_trainer.interop import accelerate, aneforge

__all__ = ["accelerate", "aneforge"]
