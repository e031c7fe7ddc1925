"""`ane-trainer` under torchrun, of which process 1 kills itself once in the middle: FOLDER ARGUMENTS..."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from ane_trainer.__main__ import main


def die_in_the_second_epoch(folder: Path) -> None:
    """Wait until an epoch is written down, then go without a word."""
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text().strip():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        threading.Thread(target=die_in_the_second_epoch, args=(Path(sys.argv[1]),), daemon=True).start()
    sys.argv = ["ane-trainer", *sys.argv[2:]]
    main()
