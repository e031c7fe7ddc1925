"""One step tried in a way of its own: other rewrites, options or loss, on copies, and what came of it."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import Graph

from ane_trainer.ane.capture.optimizers.rule import RESIDUAL
from ane_trainer.ane.capture.range.editing import in_update
from ane_trainer.ane.capture.range.switch import REWRITES, Made, limited_to
from ane_trainer.ane.capture.trace.sources import META_KEY
from ane_trainer.ane.dispatch import StepOptions, Target, TrainingStep, build_step
from ane_trainer.ane.dispatch.agreement import Agreement, Reference, copied, reference
from ane_trainer.ane.dispatch.devices import Session
from ane_trainer.ane.dispatch.devices.protocol import Floats
from ane_trainer.ane.dispatch.loading import Subject
from ane_trainer.ane.dispatch.state import StepState
from ane_trainer.ane.errors import AneTrainerError, DataError, NumericsWarning, UnsupportedModel
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Compiled
from ane_trainer.training.debugging.scores import Score, StepCriterion

#: The score's note where plain PyTorch's own loss or update is nan or infinite.
NOT_FINITE = "fp32 itself gives no finite numbers"


@dataclass(frozen=True)
class Way:
    """How a step is tried: which rewrites of the range pass, which options."""

    options: StepOptions
    rewrites: frozenset[str] = frozenset(REWRITES)


#: Operations that add a constant.
ADDED = ("add", "sub", "rsub")


@dataclass(frozen=True)
class Constant:
    """A number in the graph that fp16 does not hold: its place, the operation, and what fp16 has for it."""

    where: str
    op: str
    number: float
    half: float


@dataclass(frozen=True)
class Trial:
    """What came of it. `refused`: why there is no step, then all else is empty.

    `feeds` are those of the run that was accepted, state included; `exact` the numbers that they were rounded from.
    """

    way: Way
    score: Score
    made: tuple[Made, ...] = ()
    seconds: float = 0.0
    loss_scale: float = 0.0
    refused: AneTrainerError | None = None
    compiled: Compiled | None = None
    feeds: Mapping[str, Array] = field(default_factory=dict, repr=False)
    exact: Mapping[str, Array] = field(default_factory=dict, repr=False)
    criterion: StepCriterion | None = field(default=None, repr=False)
    agreement: Agreement | None = None
    constants: tuple[Constant, ...] = ()


class _Watched:
    """A session that keeps what its last run was fed, and its state before it."""

    def __init__(self, session: Session, compiled: Compiled) -> None:
        self._session = session
        self._state = [port.name for port in compiled.inputs if port.role == "state"]
        self.feeds: dict[str, Array] = {}
        self.write, self.read, self.values = session.write, session.read, session.values
        self.close = session.close

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Floats]:
        self.feeds = {name: np.array(array) for name, array in feeds.items()}
        self.feeds |= {name: np.array(self._session.read(name)) for name in self._state}
        return self._session.run(feeds)


@dataclass(frozen=True)
class _WatchedTarget(Target):
    """A target whose sessions are watched."""

    sessions: list[_Watched] = field(default_factory=list, compare=False)

    def load(self, compiled: Compiled) -> Session:
        watched = _Watched(super().load(compiled), compiled)
        self.sessions.append(watched)
        return watched


def attempt(
    subject: Subject, target: Target, way: Way, state: Mapping[str, torch.Tensor] | None = None
) -> Trial:
    """Build the step on copies and run it once; what refuses the model or the batch is part of the answer."""
    watched = _WatchedTarget(**{f.name: getattr(target, f.name) for f in dataclasses.fields(Target)})
    options = dataclasses.replace(way.options, verify=1, sync="lazy", exchange=None)
    model, loss, optimizer = copied(subject)
    kept = dataclasses.replace(subject, model=model, loss=loss, optimizer=optimizer)
    with warnings.catch_warnings(), limited_to(way.rewrites) as made:
        warnings.simplefilter("ignore", NumericsWarning)
        try:
            step = build_step(model, loss, optimizer, subject.example, watched, options, state)
        except (UnsupportedModel, DataError) as error:
            return Trial(way, Score(False, note="refused"), tuple(made), refused=error)
        with step:
            expected = _expected(kept, step, options)
            started = time.perf_counter()
            try:
                step(*subject.example)
            except DataError as error:
                return Trial(way, Score(False, note="refused"), tuple(made), refused=error)
            found = _trial(way, step, watched.sessions[-1].feeds, expected, subject.example)
            return dataclasses.replace(found, made=tuple(made), seconds=time.perf_counter() - started)


def _expected(subject: Subject, step: TrainingStep, options: StepOptions) -> Reference | None:
    """Plain PyTorch's step on this batch, with the draws that the step will make."""
    generator = torch.Generator().set_state(StepState.of(step.state_dict()).generator)
    found = reference(subject, options.gradients, generator, [subject.example])
    return None if found is None or math.isnan(found.loss) else found


def _trial(
    way: Way,
    step: TrainingStep,
    feeds: Mapping[str, Array],
    expected: Reference | None,
    example: tuple[object, object],
) -> Trial:
    compiled, exact = step.compiled, _unrounded(step, feeds, example)
    criterion = None
    skipped = "the update is skipped" if step.skipped_steps else ""
    if expected is not None and step.optimizer_on == "engine":
        criterion = StepCriterion(compiled, feeds, expected, step.agreement)
    found = step.agreement
    if found is None or math.isnan(found.loss):
        note = skipped or NOT_FINITE
        score = Score(False, note=note)
    else:
        score = Score(
            found.agrees and not skipped, found.loss, None if skipped else found.update, note=skipped
        )
    constants = tuple(_constants(step.host_side[1].capture.captured.graph.graph))
    return Trial(
        way, score, (), 0.0, step.loss_scale, None, compiled, feeds, exact, criterion, found, constants
    )


#: Relative error of a constant in fp16 from which it is told; of one that is added, the error itself.
_ROUGH = 2.0**-9


def _constants(graph: Graph) -> Iterator[Constant]:
    """The numbers in front of the update that fp16 does not hold."""
    for node in graph.nodes:
        numbers = [a for a in node.args if isinstance(a, float)] if node.op == "call_function" else []
        for number in numbers if not in_update(node) else []:
            half = float(torch.tensor(number).half())
            op = str(node.target).removeprefix("aten.").partition(".")[0]
            least = min(abs(number), 1.0) if op in ADDED else abs(number)
            if math.isfinite(number) and abs(half - number) > _ROUGH * least:
                yield Constant(str(node.meta.get(META_KEY, node.name)), op, number, half)


def _unrounded(
    step: TrainingStep, feeds: Mapping[str, Array], example: tuple[object, object]
) -> dict[str, Array]:
    """What the feeds were rounded from: the batch's own numbers, and state in two numbers as their sum."""
    _, loaded = step.host_side
    captured = {port.target: port.name for port in loaded.capture.captured.inputs}
    values, draws = loaded.capture.values(example), {port.name for port in loaded.draws}
    state = {port.target: port for port in step.compiled.inputs if port.role == "state"}
    found: dict[str, Array] = {}
    for port in step.compiled.inputs:
        tensor = values.get(captured.get(port.target, ""))
        plain = port.role == "batch" and port.index_encoding == "none" and port.name not in draws
        if plain and tensor is not None and tensor.is_floating_point():
            found[port.name] = tensor.double().numpy().reshape(port.shape) * port.scale
        rest = state.get(f"{port.target}/{RESIDUAL}")
        if port.role == "state" and rest is not None:
            low = np.asarray(feeds[rest.name], np.float32) * np.float32(port.scale / rest.scale)
            found[port.name] = np.asarray(feeds[port.name], np.float32) + low  # exact: 22 bits
            found[rest.name] = np.broadcast_to(np.float32(0.0), rest.shape)
    return found
