"""Throughput of data parallel training over processes, as a ratio to one process in the same run.

    python -m bench.processes [--model mlp] [--batch-size 1024] [--steps 12] [--most 2] [--runs 3]

Each row is `torchrun --nproc-per-node N -m ane_trainer train mnist --shards MOST --threads 1`; counts of processes take
turns. Weights must come out alike byte for byte (exit code 1 otherwise). Beside wall time stands the processor time of
process 0, which is what a step would take where each process has a core of its own and waits for no other work; from
it, t(N) = a + b / N says what more would bring: a is what every process does (the update, its part of the exchange), b
what is shared (forward and backward).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

#: The command as typed, with the clock that the run's times are taken by.
_COMMAND = """
import runpy, sys, time
time.perf_counter = getattr(time, sys.argv.pop(1))
runpy.run_module("ane_trainer", run_name="__main__", alter_sys=True)
"""


def trained(
    clock: str, processes: int, most: int, options: argparse.Namespace, out: Path
) -> tuple[float, str]:
    """(seconds a step of the second epoch by a clock of `time`, hash of the weights) of one training."""
    script = out.with_suffix(".py")
    script.write_text(_COMMAND)
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port",
        str(29600 + processes), str(script), clock, "train", "mnist", "--model", options.model, "--batch",
        str(options.batch_size), "--limit", str(options.batch_size * options.steps), "--epochs", "2", "--shards",
        str(most), "--threads", "1", "--device", "sim", "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = hashlib.sha256((out / "weights.safetensors").read_bytes()).hexdigest()
    return epochs[-1]["seconds"] / epochs[-1]["steps"], weights


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    counts = [n for n in (1, 2, 4, 8) if n <= options.most]
    times: dict[tuple[str, int], list[float]] = {}
    weights = set()
    for run in range(options.runs):
        for clock, title in (("perf_counter", "wall"), ("process_time", "processor")):
            with tempfile.TemporaryDirectory() as place:
                for n in counts:
                    seconds, found = trained(clock, n, options.most, options, Path(place, str(n)))
                    times.setdefault((title, n), []).append(seconds)
                    weights.add(found)
            shown = "   ".join(f"{n}: {times[title, n][-1] * 1e3:.1f} ms" for n in counts)
            print(f"run {run + 1}, {title} time of a step by number of processes   {shown}", flush=True)
    for title in ("wall", "processor"):
        for n in counts[1:]:
            pairs = zip(times[title, 1], times[title, n], strict=True)
            print(
                f"{title:<10} {n} processes are {statistics.median(a / b for a, b in pairs):.2f} times one process"
            )
    print(
        f"cores here: {os.cpu_count()}; weights byte for byte alike: {'yes' if len(weights) == 1 else 'NO'}"
    )
    if 2 in counts:
        one, two = (statistics.median(times["processor", n]) for n in (1, 2))
        shared = min(max(2 * (one - two), 0.0), one)
        more = ", ".join(f"{n}: {one / (one - shared + shared / n):.2f}" for n in (4, 8, 16))
        print(
            f"{shared / one:.0%} of a step is shared; with a core for each, more would bring {more} times one process"
        )
    return 0 if len(weights) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
