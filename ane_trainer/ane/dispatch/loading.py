"""The stages of a training step (capture, compile, load) from module to a step that is ready to run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ane_trainer.ane.capture import Loss, StepCapture, capture_training, get_loss
from ane_trainer.ane.capture.batches import program_form
from ane_trainer.ane.capture.calibrate import call_aside, module_mode
from ane_trainer.ane.capture.gradients import FLOORS, LIMITS
from ane_trainer.ane.capture.optimizers.table import structure
from ane_trainer.ane.capture.ports import Parameter
from ane_trainer.ane.capture.randomness import PREFIX
from ane_trainer.ane.capture.range.calibration import calibration_of
from ane_trainer.ane.capture.repeats import repeating
from ane_trainer.ane.capture.rewrites.keras_variables import copy_of
from ane_trainer.ane.capture.step import GRADIENT, SHIFT, CaptureOptions
from ane_trainer.ane.capture.trace.sources import faults_in_words
from ane_trainer.ane.chips.cost import Cost, estimate, in_turn
from ane_trainer.ane.compiler.blocks import Division
from ane_trainer.ane.compiler.build import prepare, whole
from ane_trainer.ane.dispatch.devices import Session
from ane_trainer.ane.dispatch.feeds import RANGES, Feeds
from ane_trainer.ane.dispatch.frozen import frozen_constants
from ane_trainer.ane.dispatch.held_tensors import none_kept
from ane_trainer.ane.dispatch.mirror import Mirror
from ane_trainer.ane.dispatch.options import StepOptions, Target
from ane_trainer.ane.dispatch.parallel import DividedSession, joined_ports
from ane_trainer.ane.dispatch.parameters import check_parameters
from ane_trainer.ane.dispatch.recall import Entry, Memory, Question, memory_of
from ane_trainer.ane.dispatch.state import StepState
from ane_trainer.ane.errors import NumericsWarning
from ane_trainer.ane.stages import Captured, Compiled, Port
from ane_trainer.utils import return_memory, without_collection


@dataclass(frozen=True)
class Subject:
    """What is trained: a model, its loss and optimizer, and a batch (x, y) that fixes the shapes.

    `as_it_is`: capture in the mode that the model is in, also where that is evaluation.
    """

    model: torch.nn.Module
    loss: str | Loss
    optimizer: torch.optim.Optimizer
    example: tuple[object, object]
    as_it_is: bool = False


@dataclass(frozen=True)
class LoadedStep:
    """A compiled step on its device, with what feeds it and what copies its state to and from PyTorch.

    `structure`: what of the optimizer's settings is compiled in. `scalars` and `draws` are the ports of the
    host's numbers and random draws, `gradients` those of the gradients that a host optimizer reads, `floors` and
    `limits` the names of those with the least and largest gradients that an update takes. A step in two parts has
    `update`, its second program; `inputs` and `outputs` are those of both.
    """

    capture: StepCapture
    compiled: Compiled
    update: Compiled | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    session: Session
    feeds: Feeds
    mirror: Mirror
    structure: tuple[object, ...]
    scalars: tuple[Port, ...]
    draws: tuple[Port, ...]
    gradients: tuple[Port, ...]
    floors: str
    limits: str
    dtype: type[np.float16] | type[np.float32]

    @property
    def loss_unit(self) -> float:
        """The power of two by which the program's loss is multiplied."""
        return next(p.scale for p in self.outputs if p.target == "loss")

    @property
    def programs(self) -> tuple[Compiled, ...]:
        """What is compiled for a step: one program, or those of its blocks; of a divided batch backward and update."""
        return self.compiled.programs + (() if self.update is None else self.update.programs)

    @functools.cached_property
    def whole(self) -> Compiled:
        """The step, or its backward part, as one program."""
        return whole(self.compiled)

    @property
    def chosen(self) -> str:
        """Why the step is in programs of blocks; empty where it is not."""
        return next((part.chain.chosen for part in self.wholes if part.chain is not None), "")

    @property
    def wholes(self) -> tuple[Compiled, ...]:
        """The whole step, or where a batch is divided backward and update."""
        return (self.compiled,) if self.update is None else (self.compiled, self.update)

    def named_parts(self) -> list[tuple[str, Compiled]]:
        """What is compiled beside `compiled`, by a name for files: the update part, and the programs of blocks."""
        found = [("update", part) for part in (self.update,) if part is not None]
        if self.chosen:
            found += [(f"blocks/{number}/program", part) for number, part in enumerate(self.programs)]
        return found

    def dispatched(self, shards: int) -> tuple[Compiled, ...]:
        """The program of each dispatch of a step, in order; `shards`: how often the backward part runs."""
        parts = [self.compiled] * shards + ([] if self.update is None else [self.update])
        return tuple(each for part in parts for each in part.in_turn)


def load_step(
    subject: Subject,
    target: Target,
    options: StepOptions,
    continued: StepState | None = None,
    capture: StepCapture | None = None,
) -> LoadedStep:
    """Capture, lower, legalize, compile, load, for a state that is to be continued with its units and ranges.

    `capture`: one of this subject and these options that there is already, for another target.

    Raises: UnsupportedModel with every reason at once; DataError for parameters beyond the precision.
    """
    with (
        without_collection()
    ):  # what a compilation makes stays: looking through it again and again takes a tenth of it
        if capture is None:
            return load_compiled(
                subject, target, options, *compile_step_of(subject, target, options, continued)
            )
        compiled = _prepared(subject, target, options, capture.captured, capture.parameters)
        return load_compiled(subject, target, options, capture, compiled)


def compile_step_of(
    subject: Subject, target: Target, options: StepOptions, continued: StepState | None = None
) -> tuple[StepCapture, Compiled]:
    """Capture, lower, legalize, compile."""
    check_parameters(subject.model, RANGES[target.precision])
    example, more = subject.example, list(options.calibrate_on)
    if options.exchange is not None:  # a program takes one shard; the same in every process
        shards = options.exchange.shards
        example, *rest = shards.of(example)
        more = rest + [part for batch in more for part in shards.of(batch)]
    subject = dataclasses.replace(subject, example=example)
    settings = CaptureOptions(
        options.gradients,
        options.loss_scale,
        target.precision,
        None if continued is None else continued.units,
        more,
        {} if continued is None else calibration_of(continued.calibration),
        options.exchange is not None,
    )
    memory = None if options.exchange is not None else _memory(subject, target, options, settings)
    found = memory.recalled() if memory is not None else None
    if found is not None:
        return found
    with _mode(subject), none_kept(subject.model, subject.loss, subject.example):
        capture = _capture(subject, settings)
    return_memory()  # of calibration and trace, several times the model
    compiled = _prepared(subject, target, options, capture.captured, capture.parameters)
    if memory is not None:
        memory.keep(capture, compiled)
    return capture, compiled


def _memory(
    subject: Subject, target: Target, options: StepOptions, settings: CaptureOptions
) -> Memory | None:
    """The place of a step on the disk."""
    sizes = sorted(settings.calibration.items())
    units = None if settings.units is None else sorted(settings.units.items())
    others = (
        settings.gradients, settings.loss_scale, settings.precision, units, sizes, options.blocks, options.checkpoint,
        target.chip, target.path, subject.as_it_is, torch.get_num_threads(),
    )  # fmt: skip

    def again(entry: Entry) -> StepCapture:
        kept = dataclasses.replace(
            settings, units=entry.units, calibration=entry.calibration, loss_scale=entry.loss_scale
        )
        return _capture(subject, kept)

    asked = Question(
        subject.model, subject.loss, subject.optimizer, subject.example, tuple(settings.calibrate_on), repr(others),
        settings.gradients.on_host, again, functools.partial(_mode, subject),
    )  # fmt: skip
    return memory_of(asked)


def _prepared(
    subject: Subject,
    target: Target,
    options: StepOptions,
    captured: Captured,
    parameters: Iterable[Parameter],
) -> Compiled:
    """A captured step compiled, whole or in programs of blocks; blocks that hold other weights are other programs."""
    assert target.chip is not None
    held = frozen_constants(parameters) if target.precision == "fp16" else {}
    division = Division(options.blocks, repeating(subject.model), options.checkpoint)
    return prepare(captured, target.chip, target.path, target.precision, division, held)


def captured_in_fp32(
    subject: Subject, options: StepOptions, capture: StepCapture, units: Mapping[str, float]
) -> Captured:
    """The step as fp32 computes it, with state in these units: without what fp16 asks for, as least denominators."""
    settings = CaptureOptions(options.gradients, capture.loss_scale, "fp32", units)
    return _capture(subject, settings).captured


def load_compiled(
    subject: Subject, target: Target, options: StepOptions, capture: StepCapture, compiled: Compiled
) -> LoadedStep:
    """A compiled step on its device, with the loss scale that the capture chose; its notes are told."""
    for note in compiled.legalized.lowered.notes:
        warnings.warn(str(note), NumericsWarning, stacklevel=2)
    session, inputs, outputs, update = target.load(compiled), compiled.inputs, compiled.outputs, None
    if capture.update is not None:
        assert options.exchange is not None
        update = _prepared(subject, target, options, capture.update, capture.parameters)
        inputs = joined_ports(compiled.inputs, update.inputs)
        outputs = joined_ports(compiled.outputs, update.outputs)
        sessions, dtype = (session, target.load(update)), RANGES[target.precision].numpy
        session = DividedSession(sessions, (compiled, update), options.exchange, dtype)
    mirror = Mirror(
        session, inputs, subject.model, subject.optimizer, capture.rule, target.precision, capture.changes
    )
    mirror.keep_unwritten(outputs)
    mirror.set_units({p.name: p.unit for p in capture.parameters if p.trained}, capture.units[SHIFT])
    mirror.set_scaling(capture.loss_scale)
    return LoadedStep(
        capture, compiled, update, inputs, outputs, session,
        Feeds(subject.example, ("x", "y"), inputs, target.precision), mirror,
        structure(subject.optimizer, capture.rule),
        scalars=tuple(p for p in inputs if p.role == "scalar"),
        draws=tuple(p for p in inputs if p.target.startswith(PREFIX)),
        gradients=tuple(p for p in outputs if p.target.endswith(f"/{GRADIENT}")),
        floors=next((p.name for p in inputs if p.target == FLOORS), ""),
        limits=next((p.name for p in inputs if p.target == LIMITS), ""),
        dtype=RANGES[target.precision].numpy,
    )  # fmt: skip


def cost_of(dispatched: Sequence[Compiled], path: str) -> Cost:
    """Estimated time and energy of programs that run one after the other."""
    known = {each.fingerprint: estimate(each.program, each.chip, path) for each in dispatched}
    return in_turn([known[each.fingerprint] for each in dispatched])


def _capture(subject: Subject, options: CaptureOptions) -> StepCapture:
    """Capture in training mode; a model that is in training mode already keeps its submodules' modes."""
    with _mode(subject), faults_in_words(subject.model, functools.partial(_run_plainly, subject)):
        return capture_training(subject.model, subject.loss, subject.optimizer, subject.example, options)


def _mode(subject: Subject) -> contextlib.AbstractContextManager[None]:
    """The mode in which a subject is captured, within the block."""
    if subject.model.training or subject.as_it_is:
        return contextlib.nullcontext()
    return module_mode(subject.model, training=True)


def _run_plainly(subject: Subject) -> None:
    """Forward, loss and backward on copies in plain PyTorch."""
    model = copy_of(subject.model)
    x, y = map(program_form, subject.example)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        value = get_loss(subject.loss)(call_aside(model, {}, x), y)
        torch.autograd.backward(value)
