"""Trains in processes that end at random moments: `python -m tests.training.killing CONFIG OUT TIMES SEED HOW`.

HOW is a signal (SIGKILL, SIGTERM, SIGHUP, SIGINT), or "full": the disk takes no further file, as if it were full. The
processes are forked from one that has imported everything and run nothing, so that each begins at once.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from ane_trainer import Reporter
from ane_trainer.ane.errors import EnvironmentFault, Interrupted
from ane_trainer.core import resume_training, run_training
from ane_trainer.training.config import make_config

#: Exit code of a process that was ended as it was to be, and says so.
ENDED = 75


def train(options: dict[str, object], out: Path) -> None:
    """The whole training, or what is left of it; ends the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file beyond the limit is an error, as on a full disk
    try:
        if (out / "config.toml").exists():
            resume_training(out, report=Reporter())
        else:
            run_training(make_config(options), out=out, report=Reporter())
        os._exit(0)
    except (Interrupted, EnvironmentFault, KeyboardInterrupt):
        os._exit(ENDED)
    except Exception:  # noqa: BLE001  (the child must not go on as its parent)
        traceback.print_exc()
        os._exit(1)


def end(child: int, how: str) -> None:
    """Let a process come to its end in the given way."""
    if how == "full":
        resource.prlimit(child, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    else:
        os.kill(child, signal.Signals[how])


def main(options: dict[str, object], out: Path, times: int, seed: int, how: str) -> None:
    """Print how many of them hit a process that was at work."""
    chance, hits, longest = random.Random(seed), 0, 0.4
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of threads
            child = os.fork()
        if child == 0:
            train(options, out)
        if hits < times:
            time.sleep(chance.uniform(0.0, longest))
            end(child, how)
            longest *= 1.05  # so that it gets to the end
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != ENDED:
            print(hits)
            sys.exit(os.WEXITSTATUS(status))
        hits += 1


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
