"""Trains in processes that are killed at random moments: `python -m tests.training.killing CONFIG OUT KILLS SEED`.

The processes are forked from one that has imported everything and run nothing, so that each begins at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from ane_trainer import Reporter
from ane_trainer.core import resume_training, run_training
from ane_trainer.training.config import make_config


def train(options: dict[str, object], out: Path) -> None:
    """The whole training, or what is left of it; ends the process."""
    try:
        if (out / "config.toml").exists():
            resume_training(out, report=Reporter())
        else:
            run_training(make_config(options), out=out, report=Reporter())
        os._exit(0)
    except (Exception, KeyboardInterrupt):  # noqa: BLE001  (the child must not go on as its parent)
        traceback.print_exc()
        os._exit(1)


def main(options: dict[str, object], out: Path, kills: int, seed: int) -> None:
    """Print how many kills hit a process that was at work."""
    chance, hits, longest = random.Random(seed), 0, 0.4
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of threads
            child = os.fork()
        if child == 0:
            train(options, out)
        if hits < kills:
            time.sleep(chance.uniform(0.0, longest))
            os.kill(child, signal.SIGKILL)
            longest *= 1.05  # so that it gets to the end
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(hits)
            sys.exit(os.WEXITSTATUS(status))
        hits += 1


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
