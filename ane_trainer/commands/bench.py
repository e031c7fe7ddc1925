"""`bench`: one model's training step on several devices, timed in turn, each as a ratio to plain PyTorch."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ane_trainer.__version__ import __version__
from ane_trainer.ane.errors import EnvironmentFault, UsageError
from ane_trainer.commands.options import (
    Batch,
    Chip,
    Classes,
    Dataset,
    Fidelity,
    Input,
    Optimizer,
    Output,
    Threads,
    example_sizes,
    show,
)
from ane_trainer.training.config import TrainConfig, make_config
from ane_trainer.training.folder.results import interval_text
from ane_trainer.utils import seeded

if TYPE_CHECKING:  # PyTorch is imported only by what runs
    import torch

    from ane_trainer.ane.dispatch import Target
    from ane_trainer.training.steps import Step

BASELINE = "cpu"
"""Plain PyTorch in fp32 on the processor: what every ratio is to."""

GPU = "mps"
"""Plain PyTorch in fp32 on the GPU of a Mac; unverified on hardware."""

_SEED, _WARMUP = 0, 2


def bench(
    model: Annotated[str, typer.Argument(help="As for `check`.", metavar="MODEL")] = "mlp",
    devices: Annotated[
        str, typer.Option(help="cpu, mps, sim, coreai, e5rt; always beside cpu.", metavar="NAMES")
    ] = "cpu,sim",
    dataset: Dataset = "mnist",
    input_shape: Input = None,
    classes: Classes = None,
    batch: Batch = 128,
    optimizer: Optimizer = "adam",
    chip: Chip = "m4",
    fidelity: Fidelity = "exact",
    steps: Annotated[int, typer.Option(help="Timed on each device.")] = 20,
    threads: Threads = None,
) -> Output:
    """Time a model's training step on several devices in turn, each as a ratio to plain PyTorch."""
    shape, count = example_sizes(dataset, input_shape, classes, "bench")
    return show(
        compare_devices(
            model, shape, count, batch, optimizer, devices.split(","), chip=chip, fidelity=fidelity, steps=steps,
            threads=threads,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """One device: milliseconds a step, `ratio` the median over pairs of steps to the baseline's beside it.

    `first_s` is from the compile to the first step's result, in seconds.
    """

    device: str
    where: str
    median_ms: float
    best_ms: float
    ratio: float
    first_s: float


@dataclass(frozen=True)
class Comparison:
    """What `bench` found, and what it must be read with: model, sizes, seed, threads, machine, versions."""

    model: str
    optimizer: str
    batch: int
    steps: int
    seed: int
    threads: int
    rows: tuple[Timing, ...]
    estimate: dict[str, Any] | None
    machine: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """The same for machines."""
        return asdict(self)

    def as_text(self) -> str:
        """A line a device, then the cost model's figure for the engine itself."""
        head = f"{self.model}, {self.optimizer}, batch {self.batch}, {self.steps} steps in turn, {self.threads} threads"
        lines = [head, f"{'device':<10}{'median':>11}{'best':>11}{'to cpu':>8}{'first step':>12}  where"]
        for row in self.rows:
            times = f"{row.median_ms:>8.2f} ms{row.best_ms:>8.2f} ms{row.ratio:>7.2f}x{row.first_s:>10.1f} s"
            lines.append(f"{row.device:<10}{times}  {row.where}")
        if self.estimate is not None:
            sure = interval_text(self.estimate)
            lines.append(
                f"{'estimate':<10}{self.estimate['latency_us'] / 1e3:>8.2f} ms{'':>33}"
                f"{self.estimate['title']}'s engine, by the cost model ({sure}), not measured"
            )
        if any(row.device == "sim" for row in self.rows):
            lines.append("The simulator's time says nothing about the engine's.")
        return "\n".join(lines)


def compare_devices(
    model: str, in_shape: Sequence[int], classes: int, batch: int, optimizer: str, devices: Sequence[str],
    *, chip: str = "m4", fidelity: str = "exact", steps: int = 20, threads: int | None = None,
) -> Comparison:  # fmt: skip
    """Time the same step, from the same weights and on the same random batch, on each device.

    UsageError for unknown names and sizes; EnvironmentFault for a device that this machine does not have;
    UnsupportedModel if the model does not fit the chip.
    """
    import torch

    from ane_trainer.training import engine

    if steps < 1 or batch < 1 or classes < 1 or any(size < 1 for size in in_shape):
        raise UsageError("bench: needs positive steps and sizes. Correct them.", code="ANE104")
    names = tuple(dict.fromkeys((BASELINE, *devices)))
    chosen = {name: _choose(name, chip, fidelity) for name in names}
    with seeded(_SEED):
        example = torch.randn(batch, *in_shape), torch.randint(0, classes, (batch,))
    config = {"dataset": "mnist", "model": model, "batch_size": batch, "optimizer": optimizer, "chip": chip}
    task = _Task(make_config(config, where="bench"), tuple(in_shape), classes, example, threads)
    steps_by_name: dict[str, Step] = {}
    first: dict[str, float] = {}
    for name, device in chosen.items():
        start = time.perf_counter()
        steps_by_name[name] = task.step(device, on_gpu=name == GPU)
        task.run(steps_by_name[name], on_gpu=name == GPU)
        first[name] = time.perf_counter() - start
    runs = {name: partial(task.run, step, on_gpu=name == GPU) for name, step in steps_by_name.items()}
    times = in_turn(runs, steps)
    rows = tuple(
        _timing(name, _where(name, device), times[name], times[BASELINE], first[name])
        for name, device in chosen.items()
    )
    estimates = (engine.estimate_of(steps_by_name[name], device) for name, device in chosen.items())
    return Comparison(
        model, optimizer, batch, steps, _SEED, threads or torch.get_num_threads(), rows,
        next((found for found in estimates if found is not None), None), _machine(),
    )  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """The step that every device runs: the configuration, one random batch, and how to build and run it."""

    config: TrainConfig
    in_shape: tuple[int, ...]
    classes: int
    example: tuple[torch.Tensor, torch.Tensor]
    threads: int | None

    def step(self, device: Target, *, on_gpu: bool) -> Step:
        """The compiled step, the model's weights being the same each time."""
        from ane_trainer.ane.dispatch import StepOptions
        from ane_trainer.models import build_model
        from ane_trainer.training import engine
        from ane_trainer.training.optimizers import make_optimizer

        model = build_model(self.config.model, self.in_shape, self.classes, seed=_SEED)
        model = model.to(GPU) if on_gpu else model
        optimizer = make_optimizer(self.config, model)
        return engine.make_step(
            model, "cross_entropy", optimizer, self.example, device, StepOptions(sync="lazy", verify="off")
        )

    def run(self, step: Step, *, on_gpu: bool) -> None:
        """One step on the batch, until its loss is here."""
        x, y = (t.to(GPU) for t in self.example) if on_gpu else self.example
        step(x, y).item()


def _choose(name: str, chip: str, fidelity: str) -> Target:
    """The device of a name. The GPU runs the baseline's code, moved there."""
    import torch

    from ane_trainer.training import engine

    if name == GPU and not torch.backends.mps.is_available():
        raise EnvironmentFault(
            f"bench: {GPU} needs the GPU of a Mac, and a PyTorch that has it; there is none here. Leave it out.",
            code="ANE202",
        )
    return engine.choose_target(BASELINE if name == GPU else name, chip, fidelity)


def _where(name: str, device: Target) -> str:
    return "GPU of this Mac: plain PyTorch fp32" if name == GPU else device.headline


def _timing(name: str, where: str, times: list[float], base: list[float], first: float) -> Timing:
    ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
    return Timing(name, where, statistics.median(times) * 1e3, min(times) * 1e3, ratio, first)


def _machine() -> dict[str, str]:
    import torch

    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "ane_trainer": __version__,
    }


def in_turn(
    runs: Mapping[str, Callable[[], object]], steps: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each of `steps` calls of each run, one after the other, so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-_WARMUP, steps):
        for name, run in runs.items():
            start = clock()
            run()
            if number >= 0:
                times[name].append(clock() - start)
    return times
