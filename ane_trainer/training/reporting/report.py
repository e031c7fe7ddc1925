"""What is told of a training run while it runs, and at its end: the reporters, and the console's own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from ane_trainer.__version__ import __version__
from ane_trainer.training.folder.results import Epoch, Result, interval_text, text_of
from ane_trainer.utils import format_bytes, format_seconds

#: Between two progress lines where there is no terminal.
_PLAIN_SECONDS = 15.0

_WITH_UNIT = re.compile(r"(\d) (s|ms|us|min|h|%|KB|MB|GB)\b")
#: Columns that a topic takes ("data", "model", ...), also before a continued line.
_TOPIC = 9


class Reporter:
    """Receives what happens during a run; this one says nothing."""

    def headline(self, device: str) -> None:
        """What runs, and where."""

    def activity(self, what: str, phase: str = "") -> None:
        """Something that takes a while begins, such as "compiling"; shown until the next event.

        `phase` is its name in the account of the time; "": what it was before.
        """

    def note(self, topic: str, text: str) -> None:
        """One fact about the run: data, model, device, compile, numerics."""

    def compiled(self, program: Mapping[str, object] | None, seconds: float) -> None:
        """The training step is compiled; None where the device needs no program."""

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None, first_step: int = 0) -> None:
        """An epoch (1-based) begins at step `first_step` of `steps` (None: length not known)."""

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        """A step is done."""

    def end_epoch(self, record: Epoch) -> None:
        """An epoch is done and evaluated."""

    def close(self) -> None:
        """Leave the terminal in order; called once, also after an error."""


class Reporters(Reporter):
    """Passes everything on to several reporters, in order."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def headline(self, device: str) -> None:
        for reporter in self.reporters:
            reporter.headline(device)

    def activity(self, what: str, phase: str = "") -> None:
        for reporter in self.reporters:
            reporter.activity(what, phase)

    def note(self, topic: str, text: str) -> None:
        for reporter in self.reporters:
            reporter.note(topic, text)

    def compiled(self, program: Mapping[str, object] | None, seconds: float) -> None:
        for reporter in self.reporters:
            reporter.compiled(program, seconds)

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None, first_step: int = 0) -> None:
        for reporter in self.reporters:
            reporter.begin_epoch(epoch, epochs, steps, first_step)

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        for reporter in self.reporters:
            reporter.step(loss, loss_scale, skipped_steps)

    def end_epoch(self, record: Epoch) -> None:
        for reporter in self.reporters:
            reporter.end_epoch(record)

    def close(self) -> None:
        for reporter in self.reporters:
            reporter.close()


class Phases:
    """Seconds of a run by what they were spent on; together they are the whole time since `started`.

    steps  how many steps the phase "train" had.
    """

    def __init__(self, started: float | None = None) -> None:
        self._mark = time.perf_counter() if started is None else started
        self.current = "start"
        self.steps = 0
        self.seconds: dict[str, float] = {}

    def switch(self, phase: str, at: float | None = None) -> None:
        """Until now, or until `at`, it was the current phase; from then on it is `phase`."""
        now = time.perf_counter() if at is None else at
        self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self._mark
        self._mark, self.current = now, phase

    def as_text(self) -> str:
        """The whole time and its parts, those below 50 ms as one, but training always by itself."""
        self.switch(self.current)
        shown = {"train"} if self.steps else set()
        parts = {name: value for name, value in self.seconds.items() if value >= 0.05 or name in shown}
        whole = sum(self.seconds.values())
        if (rest := whole - sum(parts.values())) > 0.001:
            parts["other" if parts else "all"] = rest
        texts = [f"{name} {format_seconds(value)}" for name, value in parts.items()]
        if self.steps:
            step = f" ({format_seconds(self.seconds.get('train', 0.0) / self.steps)} a step)"
            texts = [text + step if text.startswith("train ") else text for text in texts]
        return f"{format_seconds(whole)}: {', '.join(texts)}"


class ConsoleReporter(Reporter):
    """Writes to `stream`: a live bar and a spinner on a terminal, plain lines elsewhere (each 15 s, and each epoch).

    verbose  adds what only some want to know: loss scale, skipped steps, steps a second, FLOPs, traffic.
    started  when the run began, by `time.perf_counter()`; default: now.

    A reader of the stream that goes away (`| head`) does not stop the training.
    """

    def __init__(
        self, stream: TextIO | None = None, *, verbose: bool = False, started: float | None = None
    ) -> None:
        self.stream = stream or sys.stdout
        self.verbose = verbose
        self.phases = Phases(started)
        self._live: Any = None  # rich's bar or spinner
        self._task: object = None
        self._shown = self._last_step = 0.0
        self._rates: list[float] = []  # seconds of whole epochs, for the time that is left
        self._reset(0, 0, None, 0)

    def headline(self, device: str) -> None:
        self._line(headline(device))

    def activity(self, what: str, phase: str = "") -> None:
        self.phases.switch(phase or self.phases.current)
        self._stop_live()
        if self.stream.isatty():
            self._live = self._console().status(f"{what} ...", spinner="dots")
            self._live.start()

    def note(self, topic: str, text: str) -> None:
        self._line(f"{topic:<{_TOPIC}}{text}")

    def compiled(self, program: Mapping[str, object] | None, seconds: float) -> None:
        now = time.perf_counter()
        self.phases.switch("compile", now - seconds)
        self.phases.switch("train", now)
        if program is not None:
            self.note("compile", program_line(program, seconds, self.verbose))

    def begin_epoch(self, epoch: int, epochs: int, steps: int | None, first_step: int = 0) -> None:
        self._stop_live()
        self.phases.switch("train")
        self._reset(epoch, epochs, steps, first_step)
        if self.stream.isatty():
            self._start_bar()

    def step(self, loss: float, loss_scale: float, skipped_steps: int) -> None:
        self._done += 1
        self.phases.steps += 1
        self._loss_sum += loss
        self._last_step = now = time.perf_counter()
        if self._task is not None:
            if now - self._shown > 0.1:
                self._shown = now
                self._live.update(
                    self._task, completed=self._done, text=self._running(loss_scale, skipped_steps, now)
                )
        elif now - self._shown > _PLAIN_SECONDS:
            self._shown = now
            self._line(f"{self._title()}  {self._running(loss_scale, skipped_steps, now)}")

    def end_epoch(self, record: Epoch) -> None:
        self.phases.switch("test", max(self._last_step, self._began))
        self.phases.switch("save")
        self._rates.append(time.perf_counter() - self._began)
        accuracy = "" if record.val_accuracy is None else f"  accuracy {record.val_accuracy:.2%}"
        if record.val_accuracy is None and record.val_loss is not None:
            accuracy = f"  held out {record.val_loss:.4f}"
        accuracy += text_of(record.scores)
        line = f"{self._title()}  loss {record.train_loss:.4f}{accuracy}  {format_seconds(record.seconds)}"
        if self.verbose:
            rate = record.steps / record.seconds if record.seconds else 0.0
            joules = "" if record.energy_joules is None else f"  {record.energy_joules:.2f} J"
            line += (
                f"  {self._count()}  {rate:,.0f} step/s  scale {record.loss_scale:g}  "
                f"skipped {record.skipped_steps}{joules}"
            )
        self._line(line)

    def close(self) -> None:
        self._stop_live()

    def _reset(self, epoch: int, epochs: int, steps: int | None, first_step: int) -> None:
        self._epoch, self._epochs, self._steps = epoch, epochs, steps
        self._first, self._done, self._loss_sum = first_step, first_step, 0.0
        self._began = self._shown = time.perf_counter()

    def _console(self) -> Any:
        from rich.console import Console

        return Console(file=self.stream, highlight=False)

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn(self._title()), BarColumn(bar_width=10),
            TextColumn("{task.fields[text]}"),
        )  # fmt: skip
        self._live = Progress(*columns, console=self._console(), transient=True)
        self._task = self._live.add_task(
            "", total=self._steps, completed=self._first, text=f"{self._count()} waiting for the first step"
        )
        self._live.start()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._task = None

    def _title(self) -> str:
        return f"epoch {self._epoch:>{len(str(self._epochs))}}/{self._epochs}"

    def _count(self) -> str:
        return f"{self._done}/{self._steps}" if self._steps else f"{self._done} steps"

    def _running(self, loss_scale: float, skipped_steps: int, now: float) -> str:
        """The moving part: count, percent, elapsed < left of the epoch, loss, the whole run's time left."""
        done = self._done - self._first
        elapsed = max(now - self._began, 1e-9)
        text = f"loss {self._loss_sum / max(done, 1):.4f}"
        if not self._steps:
            text = f"{self._count()}  {text}"
        else:
            left = elapsed / max(done, 1) * (self._steps - self._done)
            ahead = (self._rates[-1] if self._rates else elapsed + left) * (self._epochs - self._epoch)
            whole = f"  all done in {_clock(left + ahead)}" if ahead else ""
            percent = f"{self._done / self._steps:4.0%}"
            text = f"{self._count()}{percent}  {_clock(elapsed)} < {_clock(left)}  {text}{whole}"
        if self.verbose:
            text += f"  {done / elapsed:,.0f} step/s  scale {loss_scale:g}  skipped {skipped_steps}"
        return text

    def _line(self, text: str) -> None:
        """One line, broken between words where a terminal is narrower."""
        self._stop_live()
        with self._reader_may_leave():
            print(wrapped(text, self.stream), file=self.stream, flush=True)

    @contextlib.contextmanager
    def _reader_may_leave(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def wrapped(text: str, stream: TextIO) -> str:
    """A line broken between words where the terminal is narrower; elsewhere as it is."""
    if not stream.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 2 * _TOPIC)
    together = _WITH_UNIT.sub("\\1\u00a0\\2", text)  # a number and its unit
    return textwrap.fill(
        together, width, subsequent_indent=" " * _TOPIC, break_long_words=False, break_on_hyphens=False,
        replace_whitespace=False,
    ).replace("\u00a0", " ")  # fmt: skip


def _clock(seconds: float) -> str:
    """m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def headline(device: str) -> str:
    """The first line of a run: version, and where it runs."""
    return f"ane_trainer {__version__} - device: {device}"


def summary(
    result: Result, *, folder: str | None = None, command: str = "ane-trainer", report: Reporter | None = None
) -> str:
    """The last lines of a run: accuracy, time, where it ran and how that is known, what to type next."""
    verbose = isinstance(report, ConsoleReporter) and report.verbose
    phases = report.phases if isinstance(report, ConsoleReporter) else None
    lines = ["", _accuracy_line(result), *_time_lines(result, phases, verbose)]
    lines.append(f"ran on   {_where(result.placement, verbose)}")
    if result.health:
        counts = ", ".join(f"{module} {count}" for module, count in result.health.items())
        lines.append(
            f"skipped  {sum(result.health.values())} updates with gradients out of range, by module: {counts}"
        )
    if folder is not None:
        lines += [
            f"saved    {folder}   (report.html shows it all)",
            f"next     {command} evaluate {folder}",
            f"         {command} predict {folder} --index 0",
        ]
    stream = report.stream if isinstance(report, ConsoleReporter) else None
    return "\n".join(lines if stream is None else [wrapped(line, stream) for line in lines])


def program_line(program: Mapping[str, Any], seconds: float, verbose: bool = True) -> str:
    """Size of the compiled step: `one program of 161 ops`; verbose: what is in it, and the traffic with the host."""
    fraction, several, blocks = (
        program["engine_flop_fraction"],
        program.get("programs", 1),
        program.get("blocks"),
    )
    if not verbose:
        rest = "" if fraction is None or fraction > 0.995 else f", {fraction:.0%} of the arithmetic"
        count = "one program" if several == 1 else "two programs (backward, update)"
        if blocks:
            return f"{format_seconds(seconds)}, {_in_blocks(program)}{rest}"
        return f"{format_seconds(seconds)}, {count} of {program['ops']} ops{rest}"
    count = "1 program" if several == 1 else f"{several} programs"
    if blocks:
        count = f"{_in_blocks(program)} ({blocks})"
    share = "an unknown share" if fraction is None else f"{fraction:.0%}"
    traffic = format_bytes(program["host_bytes_per_step"])
    return (
        f"{count}: forward + loss + backward + {program['optimizer']}, {program['ops']} ops, "
        f"{share} of the step's FLOPs, "
        f"{traffic} from and to the host a step   {format_seconds(seconds)}"
    )


def _in_blocks(program: Mapping[str, Any]) -> str:
    """How a step is divided into programs of blocks."""
    return (
        f"{program['programs']} programs of up to {program['longest']} ops, "
        f"{program['dispatches_per_step']} dispatches a step"
    )


def _accuracy_line(result: Result) -> str:
    if result.test_accuracy is None:
        loss = "not known" if result.train_loss is None else f"{result.train_loss:.4f}"
        if result.test_loss is not None:
            return f"test loss {result.test_loss:.4f}   train loss {loss}"
        if (kept := result.kept) is not None and kept.val_loss is not None:
            accuracy = "" if kept.val_accuracy is None else f"validation accuracy {kept.val_accuracy:.2%}   "
            best = f"   (weights of epoch {kept.epoch})" if kept.epoch < len(result.history) else ""
            return f"{accuracy}validation loss {kept.val_loss:.4f}   train loss {kept.train_loss:.4f}{best}"
        return f"train loss {loss}   (no test data was given)"
    line = f"test accuracy {result.test_accuracy:.2%}   test loss {result.test_loss:.4f}"
    if result.fp32_reference is not None:
        line += f"   (plain PyTorch fp32, same seed and batches: {result.fp32_reference:.2%})"
    return line


def _time_lines(result: Result, phases: Phases | None, verbose: bool) -> Sequence[str]:
    whole = f"{format_seconds(result.seconds_total)}, {format_seconds(result.seconds_per_step)} a step"
    lines = [f"time     {phases.as_text() if phases is not None else whole}"]
    if result.estimate:
        total = result.estimate["latency_us"] * 1e-6 * result.steps
        sure = interval_text(result.estimate)
        title = result.estimate["title"]
        lines.append(
            f"engine   {title}'s would need about {format_seconds(total)} for these steps ({sure}, cost model)"
        )
    joules = result.energy_joules
    if joules is not None:
        epochs = max(len(result.history), 1)
        lines.append(f"energy   {joules:.2f} J, {joules / epochs:.2f} J an epoch (the engine's counter)")
    elif verbose:
        lines.append("energy   not measured")
    return lines


def _where(placement: Mapping[str, object], verbose: bool) -> str:
    if not placement:
        return "unknown"
    return f"{placement['where']}   (known by: {placement['how']})" if verbose else str(placement["where"])
