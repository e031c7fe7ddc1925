"""Frameworks: `interop.aneforge` on the simulator; `interop.accelerate`, `interop.transformers` by torch.compile."""

from ane_trainer.interop import accelerate, aneforge

__all__ = ["accelerate", "aneforge"]
