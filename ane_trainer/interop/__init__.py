"""Frameworks: `interop.aneforge` on the simulator; `.accelerate`, `.lightning`, `.transformers` by torch.compile."""

from ane_trainer.interop import accelerate, aneforge

__all__ = ["accelerate", "aneforge"]
