"""Runs at the start of a child process (see `children.py`): ANEForge, once imported, is put on the simulator."""

from ane_trainer.interop.aneforge.children import take_over

take_over()
