"""Run the study: `python -m bench.study` trains what is missing in results.jsonl, one line an arm, task and seed.

    python -m bench.study --tasks mnist-mlp --arms exact,fp32 --seeds 0,1   (all by default)
    python -m bench.study --short                                           (minutes: one epoch, few examples)

An interrupted study goes on where it stopped. `python -m docs._generate.numerics` makes the page of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ane_trainer import Trainer, __version__
from ane_trainer.training.callbacks import Callback
from ane_trainer.training.reporting.report import Reporter
from ane_trainer.training.schedules import LearningRateSchedule
from bench.study.arms import ARMS, Arm
from bench.study.tasks import TASKS, Task

RESULTS = Path(__file__).with_name("results.jsonl")
SEEDS = (0, 1, 2, 3, 4)
#: Arms that leave out an ingredient run on these tasks only, and on the first seeds.
ABLATED, ABLATION_SEEDS = ("digits-mlp", "mnist-mlp", "fashion-bn-cnn", "text-gpt", "mnist-long"), (0, 1, 2)
ABLATIONS = ("host", "one-term", "no-range")
#: At so many steps of a training the update is looked at.
LOOKS = 12


@dataclass(frozen=True)
class Row:
    """What one training gave: accuracy in percent, loss in nats, both of held-out data by the arm's own inference.

    `lost` is the share of a step's changes that one fp16 weight would not have taken, `quality` the part of the
    update that it would have kept, <d, d16> / <d, d> (EDQ of arXiv 2405.03637), both means over `LOOKS` steps.
    """

    task: str
    arm: str
    seed: int
    accuracy: float | None
    loss: float
    train_loss: float
    curve: tuple[float, ...]
    steps: int
    skipped: int
    lost: float
    quality: float
    agreement: str
    seconds: float
    version: str = __version__


class _LostUpdates(Callback):
    """Looks at some steps' changes of the weights, and at what fp16 would leave of them."""

    def __init__(self, every: int) -> None:
        self.every, self.step = max(every, 1), 0
        self.lost: list[float] = []
        self.quality: list[float] = []
        self._before: torch.Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer) -> None:
        self._before = self._weights(trainer) if self.step % self.every == self.every // 2 else None

    def on_train_batch_end(self, trainer: Trainer, loss: float) -> None:
        self.step += 1
        if self._before is None:
            return
        change = self._weights(trainer) - self._before
        single = self._before.half().float()
        kept = (single + change).half().float() - single
        moved = change != 0
        if moved.any():
            self.lost.append(float((kept[moved] == 0).float().mean()))
            self.quality.append(float((change * kept).sum() / (change * change).sum()))

    @staticmethod
    def _weights(trainer: Trainer) -> torch.Tensor:
        trainer.sync()
        return nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()


def train(task: Task, arm: Arm, seed: int, warm: nn.Module | None = None) -> Row:
    """Train one task in one arm; `warm` is the model to begin from, where the task wants a trained one."""
    started = time.perf_counter()
    train_data, held_out = task.data(seed)
    model = copy.deepcopy(warm) if warm is not None else task.model(seed)
    _nudge(model, arm.nudge, seed)
    with arm.change():
        trainer = Trainer(
            model,
            "cross_entropy",
            task.optimizer(model),
            seed=seed,
            threads=1,
            report=Reporter(),
            **arm.options,
        )  # type: ignore[arg-type]
        looks = _LostUpdates(len(train_data) * task.epochs // LOOKS)
        schedule = [] if task.schedule == "constant" else [LearningRateSchedule(task.schedule)]
        result = trainer.fit(train_data, task.epochs, held_out, callbacks=[looks, *schedule])
    step = trainer.step
    agreement = getattr(step, "agreement", None)
    return Row(
        task.name, arm.name, seed,
        None if result.test_accuracy is None else 100 * result.test_accuracy,
        result.test_loss or math.nan, result.train_loss or math.nan,
        tuple(epoch.val_loss or math.nan for epoch in result.history),
        result.steps, result.skipped_steps, _mean(looks.lost), _mean(looks.quality), str(agreement or ""),
        round(time.perf_counter() - started, 1),
    )  # fmt: skip


def _nudge(model: nn.Module, relative: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if relative else ():
            parameter *= 1 + relative * torch.randn(parameter.shape, generator=generator)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _warmed(task: Task, seed: int) -> nn.Module | None:
    if not task.warm:
        return None
    data, _ = task.data(seed)
    model = task.model(seed)
    Trainer(model, device="cpu", seed=seed, threads=1, report=Reporter()).fit(data, task.warm)
    return model


def plan(seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """What the study consists of, the most telling first: (task, arm, seed)."""
    main = [
        (task, arm, seed) for seed in seeds for task in TASKS for arm in ("fp32", "exact", "fast", "nudged")
    ]
    without = [
        (task, arm, seed) for seed in seeds if seed in ABLATION_SEEDS for task in ABLATED for arm in ABLATIONS
    ]
    long = [row for row in main if row[0] == "mnist-long"]  # 20,000 steps: one seed
    return [r for r in [*main, *without] if r not in long] + [
        r for r in [*long, *[w for w in without if w[0] == "mnist-long"]] if r[2] == seeds[0]
    ]


def read_rows(path: Path = RESULTS) -> list[Row]:
    """The rows that a study has written so far."""
    if not path.exists():
        return []
    raw = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [Row(**{**row, "curve": tuple(row["curve"])}) for row in raw]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--short", action="store_true", help="one epoch of digits, one seed, nothing kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.short:
        for arm in ARMS.values():
            print(json.dumps(asdict(train(replace(TASKS["digits-mlp"], epochs=1), arm, 0))))
        return
    done = {(row.task, row.arm, row.seed) for row in read_rows(options.out)}
    tasks, arms = options.tasks.split(","), options.arms.split(",")
    for task, arm, seed in plan([int(seed) for seed in options.seeds.split(",")]):
        if task not in tasks or arm not in arms or (task, arm, seed) in done:
            continue
        row = train(TASKS[task], ARMS[arm], seed, _warmed(TASKS[task], seed))
        with options.out.open("a") as file:
            print(json.dumps(asdict(row)), file=file)
        score = f"{row.loss:.4f} nats" if row.accuracy is None else f"{row.accuracy:.2f} %"
        print(f"{task:15} {arm:9} seed {seed}  {score}  {row.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
