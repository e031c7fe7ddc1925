"""What stands around the steps, as ratios of one run: the start of a short training, and the data pipeline.

    python -m bench.around [--runs 4] [--passes 12]

start     `ane-trainer train digits` from typing to the end, over its own `import torch` + compilation + steps, all in
          one process; each run is a process of its own, "first" with an empty cache of programs and machine code,
          "again" with what that left. Bound: 1.5 for the first.
pipeline  the share of its time that an engine works on MNIST, where a step takes what the cost model says: a pass of
          the pipeline beside the same pass with its batches in hand. Bound: 95 %.

Bounds are held by processor time, on one thread, since other work on the machine makes wall time say little: of the
start all, of the pipeline what the thread of the steps does and, if it is more than a step, what the others do. Wall
time stands beside it: of the pipeline the least time, over all passes, of each stretch of STRETCH steps, with the
pipeline and with the batches in hand. A stretch is several times longer than what the pipeline keeps ready, so one that
cannot keep up is slower in all of them, while other work on the machine leaves each alone in some pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

START_BOUND, BUSY_BOUND = 1.5, 0.95
STRETCH = 24

#: The command as typed, in a process that notes when PyTorch was there and what the run's phases took, by the clock
#: that its first argument names.
_COMMAND = """
import json, sys, time
time.perf_counter = getattr(time, sys.argv[1])
begun = time.perf_counter()
import torch
imported = time.perf_counter() - begun
from ane_trainer.training.reporting import report
noted, phases = [], report.Phases.__init__
def noting(self, started=None):
    phases(self, started)
    noted.append(self)
report.Phases.__init__ = noting
out = sys.argv[2]
sys.argv = ["ane-trainer", "train", "digits", "--device", "sim", "--out", out]
from ane_trainer.__main__ import main
try:
    main()
finally:
    parts = {name: noted[0].seconds[name] for name in ("compile", "train")}
    open(out + ".json", "w").write(json.dumps({"torch": imported, **parts, "all": noted[0].seconds}))
"""


def started(out: Path, cache: Path, clock: str) -> dict[str, float]:
    """Seconds of one `train digits` by a clock of `time`: the whole process, and three of its parts."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", _COMMAND, clock, str(out)],
        check=True, env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    if clock == "perf_counter":
        whole = time.perf_counter() - begun
    parts = json.loads(out.with_name(out.name + ".json").read_text())
    three = parts["torch"] + parts["compile"] + parts["train"]
    return {"whole": whole, **{k: parts[k] for k in ("torch", "compile", "train")}, "ratio": whole / three}


def start(runs: int) -> bool:
    """Print the table of starts; whether the median of the first ones by processor time is within the bound."""
    print("train digits             whole   imp. torch     compile       steps     ratio")
    ratios: dict[tuple[str, str], list[float]] = {}
    for _ in range(runs):
        for clock, title in (("process_time", "processor"), ("perf_counter", "wall")):
            with tempfile.TemporaryDirectory() as place:
                for kind in ("first", "again"):
                    found = started(Path(place, kind), Path(place, "cache"), clock)
                    ratios.setdefault((kind, title), []).append(found["ratio"])
                    seconds = "".join(
                        f"{found[name]:10.2f} s" for name in ("whole", "torch", "compile", "train")
                    )
                    print(f"{kind + ', ' + title:<20}{seconds}{found['ratio']:10.2f}", flush=True)
    for (kind, title), values in ratios.items():
        print(f"median {kind}, {title:<10} {statistics.median(values):.2f}")
    return statistics.median(ratios["first", "processor"]) < START_BOUND


def busy_shares(
    pass_over: Callable[[], Iterable[object]], seconds: float, passes: int
) -> tuple[list[float], float]:
    """The engine's share of each pass by processor time, and of all by wall time (see the module)."""
    held, shares, least = list(pass_over()), [], dict[bool, list[float]]()
    engine = seconds * len(held)
    for _ in range(passes):
        used = []
        for batches in (pass_over(), held):
            marks, own, whole = [time.perf_counter()], time.thread_time(), time.process_time()
            for _ in batches:
                time.sleep(seconds)  # the engine's: the thread waits, without the interpreter's lock
                marks.append(time.perf_counter())
            own = time.thread_time() - own
            used.append((own, time.process_time() - whole - own))
            stretches = [b - a for a, b in itertools.pairwise(marks[::STRETCH])]
            best = least.setdefault(batches is held, stretches)
            least[batches is held] = [min(pair) for pair in zip(best, stretches, strict=True)]
        (own, others), (own_held, others_held) = used
        shares.append(engine / (engine + max(own - own_held, 0.0) + max(others - others_held - engine, 0.0)))
    return shares, sum(least[True]) / sum(least[False])


def pipeline(passes: int) -> bool:
    """Print the engine's share for MNIST's two pipelines; whether both are within the bound."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import ane_trainer as at
    from ane_trainer.training.datasets.opening import by_rows

    train, _ = at.load_dataset("mnist", batch_size=128)
    model = at.build_model("mlp")
    x, y = next(iter(train))
    step = at.compile_step(model, "cross_entropy", torch.optim.Adam(model.parameters()), (x, y), device="sim")
    seconds = step.cost().latency_us * 1e-6
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True, drop_last=True)
    print(f"a step of the MNIST model on an M4 takes {seconds * 1e3:.2f} ms by the cost model")
    print(f"{os.cpu_count()} cores with {os.getloadavg()[0]:.1f} processes that want them")
    good = True
    for name, pass_over in (("load_dataset", lambda: train), ("DataLoader", lambda: by_rows(loader))):
        shares, wall = busy_shares(pass_over, seconds, passes)
        share = statistics.median(shares)
        good = good and share >= BUSY_BOUND
        each = f"{min(shares):.1%} to {max(shares):.1%}"
        print(
            f"{name:<14} engine busy by processor time {share:.1%} (passes: {each}), by wall time {wall:.1%}",
            flush=True,
        )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--passes", type=int, default=12)
    options = parser.parse_args()
    good = pipeline(options.passes)
    print(flush=True)
    return 0 if start(options.runs) and good else 1


if __name__ == "__main__":
    sys.exit(main())
