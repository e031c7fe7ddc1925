"""How the files of a known dataset get onto this machine, verified; `ane_trainer.data` is the public side."""
