"""`ane-trainer` under torchrun, of which process 1 kills itself once, after so many steps: STEPS ARGUMENTS..."""

from __future__ import annotations

import os
import signal
import sys

from ane_trainer.__main__ import main
from ane_trainer.training.loop import Progress


def die_after(steps: int) -> None:
    """Let the process go without a word once it has counted so many steps."""
    count = Progress.count

    def counting(self: Progress, loss: float, examples: int, *, skipped: bool) -> None:
        count(self, loss, examples, skipped=skipped)
        if self.steps == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.count = counting  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_after(int(sys.argv[1]))
    sys.argv = ["ane-trainer", *sys.argv[2:]]
    main()
