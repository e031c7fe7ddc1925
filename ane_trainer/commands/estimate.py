"""`estimate`: time and energy on the engine by the cost model, of a training step or any program, on several chips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ane_trainer.ane.errors import UnsupportedModel, UsageError
from ane_trainer.commands.model_options import Asked, Blocks, Chips, names_of, takes_subject
from ane_trainer.commands.options import Output, show, table
from ane_trainer.commands.subjects import USUAL, ModelSubject, ProgramSubject
from ane_trainer.utils import format_count, format_seconds

if TYPE_CHECKING:
    from ane_trainer.ane.chips.cost import Cost, Interval
    from ane_trainer.ane.chips.lookup import Chip
    from ane_trainer.ane.mil.program import Program

_OPS = 8
#: Published programs of a kind below which its interval is widened (`docs/_generate/cost/evaluate.py`).
_FEW = 20


@takes_subject
def estimate(
    asked: Asked,
    blocks: Blocks = "auto",
    chip: Chips = "m4",
    epochs: Annotated[int | None, typer.Option(help="Of a whole training, besides a step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Likewise, in steps.")] = None,
    examples: Annotated[int | None, typer.Option(help="In an epoch (default: the dataset's).")] = None,
    constants: Annotated[
        bool, typer.Option("--constants", help="Show every constant with its source.")
    ] = False,
) -> Output:
    """Estimate time and energy on the engine: of a model's training step, of a run's, or of any program.

    Each figure has the interval that holds nine of ten published values of that kind of program which the fit had
    not seen (docs/cost-model.md). Energy is that of the engine's own rail.
    """
    found, path = asked.resolved("estimate", blocks), asked.route
    chips = estimates_of(found, names_of(chip), path)
    size = found.request.batch if isinstance(found, ModelSubject) else None
    total = _total_steps(found, asked.dataset, size or USUAL, epochs, steps, examples)
    code = 3 if all(item.cost is None for item in chips) else 0
    return show(Estimates(found.name, size, path, tuple(chips), total, constants), code)


@dataclass(frozen=True)
class ChipEstimate:
    """The cost on one chip, or why the subject does not fit it.

    `refused`: ops of a program that this engine does not take by this path; they are priced as if it took them.
    """

    chip: str
    title: str
    cost: Cost | None
    refusal: str = ""
    dispatches: int = 1
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimates:
    """What `estimate` found: a cost for each chip; `steps` of a whole training where they are known."""

    subject: str
    batch: int | None
    path: str
    chips: tuple[ChipEstimate, ...]
    steps: int | None
    constants: bool = False

    def to_json(self) -> dict[str, object]:
        """The same for machines; the first chip's figures also at the top."""
        chips = [self._chip_json(item) for item in self.chips]
        return {
            "model": self.subject, "batch": self.batch, "path": self.path, "steps": self.steps, **chips[0],
            "chips": chips,
        }  # fmt: skip

    def _chip_json(self, item: ChipEstimate) -> dict[str, object]:
        from ane_trainer.ane.chips.cost import rates

        head = {"chip": item.chip, "title": item.title}
        cost = item.cost
        if cost is None:
            return {**head, "latency_us": None, "energy_uj": None, "refusal": item.refusal, "ops": []}
        slowest = sorted(cost.ops, key=lambda op: op.latency_us, reverse=True)
        training = None
        if self.steps is not None:
            training = {
                "seconds": cost.latency_us * self.steps / 1e6,
                "seconds_interval": [end * self.steps / 1e6 for end in _ends(cost.latency_interval)],
                "joules": cost.energy_uj * self.steps / 1e6,
                "joules_interval": [end * self.steps / 1e6 for end in _ends(cost.energy_interval)],
            }
        return {
            **head,
            "latency_us": cost.latency_us,
            "latency_interval_us": _ends(cost.latency_interval),
            "energy_uj": cost.energy_uj,
            "energy_interval_uj": _ends(cost.energy_interval),
            "energy_of": "engine rail",
            "kind": cost.kind,
            "split_us": dict(cost.split),
            "dispatch_us": cost.dispatch_us,
            "flops": cost.flops,
            "engine_flops": cost.engine_flops,
            "error_band": cost.error_band,
            "provenance": cost.provenance,
            "training": training,
            "constants": {name: asdict(rate) for name, rate in rates(item.chip, self.path).items()},
            "refused": list(item.refused),
            "ops": [{**asdict(op), "latency_us": op.latency_us} for op in slowest],
        }

    def as_text(self) -> str:
        """A table of the chips, the split, the most expensive ops of the first, and where the figures are from."""
        batch = "" if self.batch is None else f", batch {self.batch}"
        known = [item for item in self.chips if item.cost is not None]
        most = max((item.dispatches for item in known), default=1)
        count = "one dispatch" if most == 1 else f"one step, up to {most} dispatches"
        lines = [f"{self.subject}{batch}, {count} by {self.path}"]
        if known:
            lines += table([_HEAD, *(_row(item) for item in known)], (0,))
            lines += table([_SHARES, *(_shares(item) for item in known)], (0,))
            lines += self._training(known)
            lines += [f"{item.title}: {item.cost.provenance}" for item in known if item.cost is not None]
            lines += [
                f"{item.title}: the engine refuses {', '.join(item.refused)} by {self.path}, priced as if it took "
                f"them: ane-trainer check {self.subject} --chip {item.chip}"
                for item in known
                if item.refused
            ]
            lines.append(_interval_note(known[0]))
            lines += _ops_text(known[0])
        lines += [f"{item.title}: does not fit. {item.refusal}" for item in self.chips if item.cost is None]
        if self.constants:
            lines += [line for item in known for line in _constants_text(item, self.path)]
        return "\n".join(lines)

    def _training(self, known: Sequence[ChipEstimate]) -> list[str]:
        if self.steps is None:
            return []
        lines = []
        for item in known:
            assert item.cost is not None
            seconds, joules = item.cost.latency_us * self.steps / 1e6, item.cost.energy_uj * self.steps / 1e6
            low, high = (end * self.steps / 1e6 for end in _ends(item.cost.latency_interval))
            lines.append(
                f"{item.title}: {self.steps:,} steps take {format_seconds(seconds)} "
                f"({format_seconds(low)} to {format_seconds(high)}) and {_energy(joules)} on the engine's rail, "
                "without the host's part"
            )
        return lines


_HEAD = ("chip", "us", "interval", "uJ (engine rail)", "interval")
_SHARES = ("of the time", "dispatch", "MAC", "elementwise", "weights", "activations")


def _row(item: ChipEstimate) -> tuple[str, ...]:
    cost = item.cost
    assert cost is not None
    times, energies = cost.latency_interval, cost.energy_interval
    return (
        item.title, _figure(cost.latency_us), f"{_figure(times.low)} to {_figure(times.high)}",
        _figure(cost.energy_uj), f"{_figure(energies.low)} to {_figure(energies.high)}",
    )  # fmt: skip


def _shares(item: ChipEstimate) -> tuple[str, ...]:
    assert item.cost is not None
    shares = (f"{share / item.cost.latency_us:.0%}" for share in item.cost.split.values())
    return (item.title, *shares)


def _energy(joules: float) -> str:
    return f"{joules:,.2f} J" if joules >= 1 else f"{joules * 1e3:,.3g} mJ"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _interval_note(item: ChipEstimate) -> str:
    assert item.cost is not None
    kind, programs = item.cost.kind, item.cost.latency_interval.rows
    if not programs:
        return (
            f"interval: by cross-validation (docs/cost-model.md); of this kind ({kind}) no values are published on "
            "this path, so that it is that of all programs there"
        )
    if programs < _FEW:
        few = f"of {programs} programs" if programs != 1 else "of one program"
        return (
            f"interval: by cross-validation (docs/cost-model.md); of this kind ({kind}) values {few} are published, "
            "so that those of kinds like it on this path count as well"
        )
    return (
        f"interval: nine of ten published values of this kind ({kind}) lie in it, by cross-validation on "
        f"{programs} programs (docs/cost-model.md)"
    )


def _ops_text(item: ChipEstimate) -> list[str]:
    cost = item.cost
    assert cost is not None
    lines = [f"most expensive ops on {item.title} ({len(cost.ops)} ops, {format_count(cost.flops)} FLOPs):"]
    for op in sorted(cost.ops, key=lambda op: op.latency_us, reverse=True)[:_OPS]:
        lines.append(f"  {op.latency_us:>9.2f} us  {op.op:<13} {op.bound_by:<11} {op.source or op.name}")
    return lines


def _constants_text(item: ChipEstimate, path: str) -> list[str]:
    from ane_trainer.ane.chips.cost import rates

    lines = [f"constants of {item.title}, {path} (GB/s, us, pJ, W; +- one deviation):"]
    for name, rate in rates(item.chip, path).items():
        lines.append(f"  {name:<14}{rate.value:>10.4g}  +-{rate.deviation:<6.0%} {rate.source}")
    return lines


def estimates_of(
    subject: ModelSubject | ProgramSubject, chips: Sequence[str], path: str
) -> list[ChipEstimate]:
    """The subject's cost on each chip; a model is compiled for each."""
    from ane_trainer.ane.chips.cost import estimate as cost_of
    from ane_trainer.ane.chips.lookup import get_chip

    found, capture = [], None
    for chip in [get_chip(name) for name in chips]:
        if isinstance(subject, ProgramSubject):
            refused = refused_ops(subject.program, chip, path)
            cost = cost_of(subject.program, chip, path)
            found.append(ChipEstimate(chip.name, chip.title, cost, refused=refused))
            continue
        try:
            step = subject.step(chip.name, path, capture=capture)
        except UnsupportedModel as error:
            found.append(
                ChipEstimate(chip.name, chip.title, None, refusal_of(error, subject.name, chip.name))
            )
            continue
        found.append(ChipEstimate(chip.name, chip.title, step.cost(), "", step.dispatches_per_step))
        capture = step.capture
        step.discard()
    return found


def refused_ops(program: Program, chip: Chip, path: str) -> tuple[str, ...]:
    """The kinds of op that legalization refuses on a chip and path, sorted."""
    from ane_trainer.ane.compiler.legalize import Target, refusals

    return tuple(sorted({finding.op for finding in refusals(program.main, Target(chip, path))}))


def refusal_of(error: UnsupportedModel, name: str, chip: str) -> str:
    """The first cause, at the user's line where one has it; `check` tells them all."""
    first = min(error.findings, key=lambda finding: ".py:" not in finding.where)
    count = len(error.findings)
    more = f" All {count} reasons: ane-trainer check {name} --chip {chip}" if count > 1 else ""
    return f"{first}{more}"


def _total_steps(
    subject: ModelSubject | ProgramSubject, dataset: str, batch: int, epochs: int | None, steps: int | None,
    examples: int | None,
) -> int | None:  # fmt: skip
    """Steps of a whole training: as given, of the run, or epochs times batches."""
    if any(value is not None and value < 1 for value in (epochs, steps, examples)):
        raise UsageError("estimate: needs 1 or more for --epochs, --steps and --examples.", code="ANE104")
    if steps is not None:
        return steps
    if epochs is None:
        return subject.steps if isinstance(subject, ProgramSubject) else None
    if isinstance(subject, ProgramSubject):
        if subject.steps and subject.epochs and examples is None:
            return subject.steps * epochs // subject.epochs
        raise UsageError(
            f"estimate: needs the steps of an epoch, which {subject.name} does not say. Give --steps N.",
            code="ANE104",
        )
    count = examples if examples is not None else _examples(dataset)
    if count is None:
        raise UsageError(
            f"estimate: needs the examples of an epoch; {dataset} says none before it is loaded. Give --examples N.",
            code="ANE104",
        )
    return epochs * max(count // batch, 1)


def _examples(dataset: str) -> int | None:
    """Examples of a known dataset's training part."""
    from ane_trainer.training.datasets.table import DATASETS

    return DATASETS[dataset].train_examples if dataset in DATASETS else None
