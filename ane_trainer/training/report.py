"""Console output of training: what will run and where, progress, and the summary; computes nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from ane_trainer.__version__ import __version__
from ane_trainer.training.results import Epoch, Result
from ane_trainer.utils import format_bytes, format_seconds

#: Between two progress lines where there is no terminal.
_PLAIN_SECONDS = 15.0


class Reporter:
    """Receives what happens during a run; this one says nothing."""

    def headline(self, device: str) -> None:
        """What runs, and where."""

    def note(self, topic: str, text: str) -> None:
        """One fact about the run: data, model, device, compile, numerics."""

    def compiled(self, program: Mapping[str, Any] | None, seconds: float) -> None:
        """The training step is compiled; None where the device needs no program."""

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None, first_step: int = 0) -> None:
        """An epoch (1-based) begins at step `first_step` of `steps` (None: length not known)."""

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        """A step is done."""

    def end_epoch(self, record: Epoch) -> None:
        """An epoch is done and evaluated."""

    def close(self) -> None:
        """Leave the terminal in order; called once, also after an error."""


class ConsoleReporter(Reporter):
    """Writes to `stream`: a live bar on a terminal, plain lines elsewhere (each 15 s, and each epoch)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self._bar: Any = None
        self._task: Any = None
        self._shown = 0.0
        self._reset(0, 0, None, 0)

    def headline(self, device: str) -> None:
        self._line(headline(device))

    def note(self, topic: str, text: str) -> None:
        self._line(f"{topic:<9}{text}")

    def compiled(self, program: Mapping[str, Any] | None, seconds: float) -> None:
        if program is not None:
            self.note("compile", program_line(program, seconds))

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None, first_step: int = 0) -> None:
        self._reset(epoch, epochs, steps, first_step)
        if self.stream.isatty():
            self._start_bar()

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        self._done += 1
        self._loss_sum += loss
        now = time.perf_counter()
        if self._bar is not None:
            if now - self._shown > 0.1:
                self._shown = now
                self._bar.update(
                    self._task, completed=self._done, text=self._running(loss_scale, skipped_steps)
                )
        elif now - self._shown > _PLAIN_SECONDS:
            self._shown = now
            self._line(f"{self._title()}  {self._count()}  {self._running(loss_scale, skipped_steps)}")

    def end_epoch(self, record: Epoch) -> None:
        self.close()
        accuracy = "" if record.val_accuracy is None else f"  accuracy {record.val_accuracy:.2%}"
        rate = record.steps / record.seconds if record.seconds else 0.0
        joules = "" if record.energy_joules is None else f"  {record.energy_joules:.2f} J"
        self._line(
            f"{self._title()}  {self._count()}  loss {record.train_loss:.4f}{accuracy}  {rate:,.0f} step/s  "
            f"scale {record.loss_scale:g}  skipped {record.skipped_steps}{joules}"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _reset(self, epoch: int, epochs: int, steps: int | None, first_step: int) -> None:
        self._epoch, self._epochs, self._steps = epoch, epochs, steps
        self._first, self._done, self._loss_sum = first_step, first_step, 0.0
        self._began = self._shown = time.perf_counter()

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn(self._title()), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
        self._bar = Progress(*columns, console=Console(file=self.stream), transient=True)
        self._task = self._bar.add_task("", total=self._steps, completed=self._first, text="")
        self._bar.start()

    def _title(self) -> str:
        return f"epoch {self._epoch}/{self._epochs}"

    def _count(self) -> str:
        return f"{self._done}/{self._steps}" if self._steps else f"{self._done} steps"

    def _running(self, loss_scale: float, skipped_steps: int) -> str:
        done = self._done - self._first
        rate = done / max(time.perf_counter() - self._began, 1e-9)
        return (
            f"loss {self._loss_sum / max(done, 1):.4f}  {rate:,.0f} step/s  "
            f"scale {loss_scale:g}  skipped {skipped_steps}"
        )

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def headline(device: str) -> str:
    """The first line of a run: version, and where it runs."""
    return f"ane_trainer {__version__} - device: {device}"


def summary(result: Result, *, folder: str | None = None, command: str = "ane-trainer") -> str:
    """The last lines of a run: accuracy, time, where it ran and how that is known, what to type next."""
    lines = ["", _accuracy_line(result), _time_line(result), f"ran on   {_where(result.placement)}"]
    if folder is not None:
        lines += [
            f"saved    {folder}  (config, metrics, result, weights, MIL program)",
            f"next     {command} evaluate {folder}      {command} predict {folder} --index 0",
        ]
    return "\n".join(line for line in lines if line is not None)


def program_line(program: Mapping[str, Any], seconds: float) -> str:
    """Size of the compiled step: `1 program: forward + loss + backward + adam, 161 ops, ...`."""
    fraction = program["engine_flop_fraction"]
    share = "an unknown share" if fraction is None else f"{fraction:.0%}"
    traffic = format_bytes(program["host_bytes_per_step"])
    return (
        f"1 program: forward + loss + backward + {program['optimizer']}, {program['ops']} ops, "
        f"{share} of the step's FLOPs, "
        f"{traffic} from and to the host a step   {format_seconds(seconds)}"
    )


def _accuracy_line(result: Result) -> str:
    if result.test_accuracy is None:
        loss = "not known" if result.train_loss is None else f"{result.train_loss:.4f}"
        return f"train loss {loss}   (no test data was given)"
    line = f"test accuracy {result.test_accuracy:.2%}   test loss {result.test_loss:.4f}"
    if result.fp32_reference is not None:
        line += f"   (plain PyTorch fp32, same seed and batches: {result.fp32_reference:.2%})"
    return line


def _time_line(result: Result) -> str:
    parts = [
        f"time     {format_seconds(result.seconds_total)}, {format_seconds(result.seconds_per_step)} a step"
    ]
    if result.estimate:
        band = result.estimate.get("error_band")
        sure = "error not known" if band is None else f"+-{band:.0%}"
        total = result.estimate["latency_us"] * 1e-6 * result.steps
        parts.append(f"estimate on {result.estimate['title']}: {format_seconds(total)} ({sure}, cost model)")
    parts.append(_energy(result))
    return "   ".join(parts)


def _energy(result: Result) -> str:
    joules = result.energy_joules
    if joules is None:
        return "energy not measured"
    return (
        f"energy {joules:.2f} J, {joules / max(len(result.history), 1):.2f} J an epoch (the engine's counter)"
    )


def _where(placement: Mapping[str, Any]) -> str:
    if not placement:
        return "unknown"
    return f"{placement['where']}   (known by: {placement['how']})"
