"""Runs at the start of a child process (see `children.py`): puts ANEForge on the simulator."""

from ane_trainer.interop.aneforge.children import take_over

take_over()
