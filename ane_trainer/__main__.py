"""`python -m ane_trainer` is the command line `ane-trainer`."""

from ane_trainer.cli import main

if __name__ == "__main__":
    main()
