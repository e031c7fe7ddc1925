"""`trace`: one step in time by the cost model, as a file for Perfetto, with a roofline and memory as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_trainer.__version__ import __version__
from ane_trainer.ane.errors import AneTrainerError, UnsupportedModel
from ane_trainer.commands.estimate import refusal_of
from ane_trainer.commands.model_options import Asked, Chips, names_of, takes_subject
from ane_trainer.commands.options import Output, show, table
from ane_trainer.commands.subjects import ModelSubject, ProgramSubject, warn_if_refused
from ane_trainer.training.folder.records import unwritable
from ane_trainer.utils import atomic_write, format_bytes

if TYPE_CHECKING:
    from ane_trainer.ane.chips.timeline import Timeline
    from ane_trainer.ane.verify.profiling import OpProfile

#: Examples that are run for the errors of each op.
_RUN_BATCH = 8
#: A larger relative error says no more: nothing of the value is right. It would flatten the others' curve.
_ALL_WRONG = 1.0
#: Digits of a number in the file: Perfetto v52 misreads numbers of 20 digits and more, leading zeros included.
_DIGITS = 12
_MODULES = "modules"
_EVENTS = "https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU"

Event = dict[str, object]


@takes_subject
def trace(
    asked: Asked,
    chip: Chips = "m4",
    out: Annotated[
        Path | None,
        typer.Option(help="The file (default: trace.json, of a run in its folder).", metavar="FILE"),
    ] = None,
    errors: Annotated[
        bool, typer.Option("--errors/--no-errors", help="Run it on the simulator for the error of each op.")
    ] = True,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw roofline and memory (needs matplotlib).")
    ] = True,
) -> Output:
    """Lay one step out in time, for Perfetto, with a roofline: engine, memory and host, op by op, by the cost model.

    Open the file at https://ui.perfetto.dev. Nothing in it is measured: every slice is labelled as modelled, and
    together they take what `estimate --blocks off` prints. Counters tell the bytes under way, what memory holds, and
    the rounding error of each op, from a run of the simulator. Roofline and memory over time are drawn beside it as
    PNG and SVG.
    """
    found, route = asked.resolved("trace"), asked.route
    run = Path(found.name) if isinstance(found, ProgramSubject) and found.epochs is not None else None
    file = out if out is not None else (run or Path()) / "trace.json"
    steps = [_step(found, name, route, errors) for name in names_of(chip)]
    traced = Trace(
        found.name,
        found.request.batch if isinstance(found, ModelSubject) else None,
        route,
        file,
        tuple(steps),
    )
    if not traced.laid_out:
        return show(traced, 3)
    try:
        atomic_write(file, json.dumps(to_chrome(traced), allow_nan=False, separators=(",", ":")))
        files = _draw(traced, file, run) if pictures else ()
    except OSError as error:
        raise unwritable(file, error) from None
    return show(replace(traced, pictures=files, drawing=pictures))


@dataclass(frozen=True)
class ChipStep:
    """A step on one chip in time, or why it does not fit; errors of its ops by name, and whence they are."""

    chip: str
    timeline: Timeline | None
    refusal: str = ""
    errors: Mapping[str, OpProfile] | None = None
    errors_of: str = ""
    title: str = ""


@dataclass(frozen=True)
class Trace:
    """What was traced, and the files that were written."""

    subject: str
    batch: int | None
    path: str
    file: Path
    steps: tuple[ChipStep, ...]
    pictures: tuple[Path, ...] = ()
    drawing: bool = False

    @property
    def laid_out(self) -> list[tuple[ChipStep, Timeline]]:
        """The chips that the step fits."""
        return [(step, step.timeline) for step in self.steps if step.timeline is not None]

    def to_json(self) -> dict[str, object]:
        """The same for machines."""
        chips = []
        for step, time in self.laid_out:
            held, interval = time.peak(), time.cost.latency_interval
            chips.append({
                "chip": time.chip, "latency_us": time.cost.latency_us,
                "latency_interval_us": [interval.low, interval.high], "ops": len(time.cost.ops),
                "slices": len(time.slices), "busy_us": {lane: time.busy_us(lane) for lane in _lanes(time)},
                "peak_bytes": held.total, "peak_intermediate_bytes": max(m.intermediates for m in time.memory),
                "errors": step.errors_of,
            })  # fmt: skip
        return {
            "model": self.subject, "batch": self.batch, "path": self.path, "modelled": True,
            "file": str(self.file) if chips else None, "pictures": [str(item) for item in self.pictures],
            "chips": chips, "refused": {s.chip: s.refusal for s in self.steps if s.timeline is None},
        }  # fmt: skip

    def as_text(self) -> str:
        """A row a chip: the estimate, and what of it each lane is busy; then the files."""
        batch = "" if self.batch is None else f", batch {self.batch}"
        lines = [f"{self.subject}{batch}, one dispatch by {self.path}, modelled by the cost model"]
        known = self.laid_out
        if known:
            lanes = list(dict.fromkeys(lane for _, time in known for lane in _lanes(time)))
            rows, shares = [("chip", "us", "interval", "memory at most")], [("busy", *lanes)]
            for _, time in known:
                cost, interval = time.cost, time.cost.latency_interval
                rows.append((time.title, f"{cost.latency_us:,.0f}", f"{interval.low:,.0f} to {interval.high:,.0f}",
                             format_bytes(time.peak().total)))  # fmt: skip
                shares.append(
                    (time.title, *(f"{time.busy_us(lane) / cost.latency_us:.0%}" for lane in lanes))
                )
            lines += [*table(rows, (0,)), *table(shares, (0,))]
            lines.append(
                "busy: the share of the time in which a lane is; constants stream while the array computes"
            )
            lines += [
                f"{time.title}: errors of ops: {step.errors_of}" for step, time in known if step.errors_of
            ]
            lines.append(f"{self.file}: open it at https://ui.perfetto.dev")
            lines += [str(picture) for picture in self.pictures]
            if self.drawing and not self.pictures:
                lines.append(f"no pictures: they need matplotlib ({_install()})")
        lines += [f"{s.title}: does not fit. {s.refusal}" for s in self.steps if s.timeline is None]
        return "\n".join(lines)


def _install() -> str:
    from ane_trainer.training.reporting.pictures import INSTALL

    return INSTALL


def _lanes(time: Timeline) -> list[str]:
    """The lanes that have work."""
    from ane_trainer.ane.chips.timeline import LANES

    return [lane for lane in LANES if time.busy_us(lane) > 0]


def _step(subject: ModelSubject | ProgramSubject, chip: str, path: str, errors: bool) -> ChipStep:
    from ane_trainer.ane.chips.lookup import get_chip
    from ane_trainer.ane.chips.timeline import timeline

    chip = get_chip(chip).name
    if isinstance(subject, ProgramSubject):
        warn_if_refused(subject.program.main, get_chip(chip), path)
        found = ChipStep(chip, timeline(subject.program, chip, path))
        return _with_random_errors(found, subject, chip) if errors else found
    try:
        step = subject.step(chip, path)
    except UnsupportedModel as error:
        return ChipStep(chip, None, refusal_of(error, subject.name, chip), title=get_chip(chip).title)
    with step:
        found = ChipStep(chip, timeline(step.program, chip, path))
        names = {op.name: op.kind for op in step.program.main.ops}
    return _with_errors(found, subject, path, names) if errors else found


def _with_errors(found: ChipStep, subject: ModelSubject, path: str, names: Mapping[str, str]) -> ChipStep:
    """Errors of the first step on the first examples of the batch; ops are told apart by name and kind."""
    from ane_trainer.ane.verify.watching import own_errors

    few = subject.with_batch(_RUN_BATCH)
    with few.step(found.chip, path) as step:
        feeds = step.feeds(*few.example) | step.port_state()
        ops = own_errors(step.program, feeds, chip=found.chip)
    known = {op.name: op for op in ops if names.get(op.name) == op.kind}
    return _told(found, known, f"a first step on {few.request.batch} random examples, on the simulator")


def _with_random_errors(found: ChipStep, subject: ProgramSubject, chip: str) -> ChipStep:
    """Errors of a program on random inputs; a run's step needs its own state, which a program does not hold."""
    from ane_trainer.ane.verify.watching import own_errors
    from ane_trainer.commands.run import feeds_of

    if subject.epochs is not None:
        return replace(found, errors_of="not run: a run's program holds no state; trace its model instead")
    try:
        feeds, _ = feeds_of(subject.program.main, {}, 1, 0)
        ops = own_errors(subject.program, feeds[0], chip=chip, path=None)
    except AneTrainerError as error:
        return replace(found, errors_of=f"not run: the simulator cannot: {error}")
    return _told(found, {op.name: op for op in ops}, "random inputs (seed 0), on the simulator")


def _told(found: ChipStep, ops: Mapping[str, OpProfile], where: str) -> ChipStep:
    worst = max(ops.values(), key=lambda op: (op.overflows, op.own.relative), default=None)
    if worst is None:
        return replace(found, errors_of="no op")
    harm = _infinities(worst.overflows) if worst.overflows else f"{worst.own.relative:.2g} relative"
    words = f"{where}; the largest an op adds: {harm}, {worst.kind} {worst.source or worst.name}"
    return replace(found, errors=ops, errors_of=words)


def _infinities(count: int) -> str:
    return "one infinity" if count == 1 else f"{count} infinities"


def _draw(traced: Trace, file: Path, run: Path | None) -> tuple[Path, ...]:
    """The pictures beside the trace, and in the report of the run that it is of."""
    from ane_trainer.training.reporting import pictures
    from ane_trainer.training.reporting.page import with_pictures
    from ane_trainer.training.reporting.step_charts import step_charts

    written = []
    for _, time in traced.laid_out if not pictures.missing() else ():
        for name, figure in (
            ("roofline", pictures.roofline(time)),
            ("memory", pictures.memory_over_time(time)),
        ):
            for kind in ("png", "svg"):
                target = file.with_name(f"{file.stem}-{name}-{time.chip}.{kind}")
                written.append(atomic_write(target, pictures.drawn(figure, kind)))
    report = run / "report.html" if run is not None else None
    if report is not None and report.is_file():
        images = step_charts([time for _, time in traced.laid_out])
        written.append(atomic_write(report, with_pictures(report.read_text(encoding="utf-8"), images)))
    return tuple(written)


def to_chrome(traced: Trace) -> dict[str, object]:
    """The trace in Chrome's Trace Event Format: a process a chip, a thread a lane; times in us, whole nanoseconds.

    Source of the format: the Trace Event Format document (`_EVENTS`), which Perfetto reads as well.
    """
    events = [
        e for pid, (step, time) in enumerate(traced.laid_out, 1) for e in _events(traced, step, time, pid)
    ]
    chips = {
        time.chip: {
            "latency_us": time.cost.latency_us, "kind": time.cost.kind, "provenance": time.cost.provenance,
            "latency_interval_us": [time.cost.latency_interval.low, time.cost.latency_interval.high],
        }
        for _, time in traced.laid_out
    }  # fmt: skip
    about = {
        "generator": f"ane_trainer {__version__}", "subject": traced.subject, "format": _EVENTS,
        "times": "modelled by the cost model (docs/cost-model.md); nothing was measured", "chips": chips,
    }  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}


def _events(traced: Trace, step: ChipStep, time: Timeline, pid: int) -> Iterator[Event]:
    batch = "" if traced.batch is None else f", batch {traced.batch}"
    lanes = (_MODULES, *_lanes(time))
    threads = {lane: number for number, lane in enumerate(lanes, 1)}
    title = f"{time.title} by {time.path}, modelled: {traced.subject}{batch}"
    yield _named("process_name", pid, 0, name=title)
    yield _named("process_sort_index", pid, 0, sort_index=pid)
    for lane, number in threads.items():
        yield _named("thread_name", pid, number, name=lane)
        yield _named("thread_sort_index", pid, number, sort_index=number)
    yield from _modules(time, pid, threads[_MODULES])
    interval = time.cost.latency_interval
    factors = [round(end / time.cost.latency_us, 3) for end in (interval.low, interval.high)]
    for item in time.slices:
        args: Event = {"modelled": True, "us": item.duration_us, "interval_factor_of_the_whole": factors}
        if item.op is not None:
            op = item.op
            args |= {
                "op": op.name, "kind": op.op, "module": op.source or "", "bound by": op.bound_by, "FLOPs": op.flops,
                "compute us": op.compute_us, "weights us": op.weight_us, "overhead us": op.overhead_us,
                "transfers us": op.activation_us, "bytes": op.bytes,
            }  # fmt: skip
        if item.moved_bytes:
            args["moved bytes"] = item.moved_bytes
        if item.carries:
            args["carries"] = ", ".join(item.carries)
        yield from _slice(pid, threads[item.lane], item.name, (item.start_us, item.end_us), args)
    for time_us, size in time.in_flight():
        yield _counter(pid, "bytes in flight", time_us, {"bytes": size})
    for held in time.memory:
        values = {"inputs": held.inputs, "constants": held.constants, "outputs": held.outputs,
                  "intermediates": held.intermediates}  # fmt: skip
        yield _counter(pid, "memory held", held.start_us, values)
    yield from _error_events(step, time, pid)


def _modules(time: Timeline, pid: int, tid: int) -> Iterator[Event]:
    """A slice for each stretch of ops of one place: module, loss, optimizer."""
    for place, group in groupby(time.cost.ops, key=lambda op: op.source or "program"):
        ops = list(group)
        begin = time.ends_us[ops[0].name] - ops[0].latency_us
        args: Event = {"modelled": True, "ops": len(ops), "FLOPs": sum(op.flops for op in ops)}
        yield from _slice(pid, tid, place, (begin, time.ends_us[ops[-1].name]), args)


def _error_events(step: ChipStep, time: Timeline, pid: int) -> Iterator[Event]:
    """Counters that hold over an op what it adds and what has added up; ops at one time show the largest."""
    if step.errors is None:
        return
    own: dict[int, float] = {}
    total: dict[int, float] = {}
    for op in time.cost.ops:
        if (found := step.errors.get(op.name)) is None:
            continue
        begin = _ns(time.ends_us[op.name] - op.latency_us)
        own[begin] = max(own.get(begin, 0.0), min(found.own.relative, _ALL_WRONG))
        total[begin] = max(total.get(begin, 0.0), min(found.total.relative, _ALL_WRONG))
        if found.overflows:
            yield {"ph": "i", "s": "p", "name": f"{found.overflows} infinities: {op.op} {op.source or op.name}",
                   "cat": "simulated", "pid": pid, "tid": 1, "ts": begin / 1e3}  # fmt: skip
    for name, values in (("error that the op adds", own), ("error in all", total)):
        for begin, value in values.items():
            yield _counter(pid, name, begin / 1e3, {"relative": value})


def _short(args: Mapping[str, object]) -> Event:
    return {k: float(f"{v:.{_DIGITS}g}") if isinstance(v, float) else v for k, v in args.items()}


def _ns(time_us: float) -> int:
    return round(time_us * 1e3)


def _slice(pid: int, tid: int, name: str, between_us: tuple[float, float], args: Event) -> Iterable[Event]:
    """A complete event; none where it is shorter than the nanosecond that the format can tell."""
    start, end = map(_ns, between_us)
    if end == start:
        return ()
    return ({"ph": "X", "cat": "modelled", "name": name, "pid": pid, "tid": tid, "ts": start / 1e3,
             "dur": (end - start) / 1e3, "args": _short(args)},)  # fmt: skip


def _counter(pid: int, name: str, time_us: float, values: Mapping[str, float]) -> Event:
    return {
        "ph": "C",
        "cat": "modelled",
        "name": name,
        "pid": pid,
        "ts": _ns(time_us) / 1e3,
        "args": _short(values),
    }


def _named(kind: str, pid: int, tid: int, **args: object) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}
