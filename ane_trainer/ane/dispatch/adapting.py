"""A training step that follows its Python state: a changed flag or number selects another program; state is kept.

Programs are known by the state they were compiled for, so that going back to one compiles nothing. A change that gives
the same program is left alone once it did so a few times (what a forward stores for others to look at).
"""

from __future__ import annotations

import dataclasses

from ane_trainer.ane.capture import StepCapture
from ane_trainer.ane.capture.optimizers.rule import RESIDUAL
from ane_trainer.ane.capture.optimizers.table import rule_for, structure, uneven_groups
from ane_trainer.ane.capture.scaling import SCALING
from ane_trainer.ane.dispatch.guards import Guards
from ane_trainer.ane.dispatch.harmless import Harmless
from ane_trainer.ane.dispatch.loading import LoadedStep, Subject, compile_step_of, load_compiled
from ane_trainer.ane.dispatch.mirror import Mirror
from ane_trainer.ane.dispatch.options import StepOptions, Target
from ane_trainer.ane.dispatch.units import GradientUnits
from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.stages import Compiled

#: Different programs that one step may be compiled to.
MOST_PROGRAMS = 8


class Variants:
    """The programs of one step by Python state. `changed` is asked before each step, `adapted` where it says yes."""

    def __init__(self, subject: Subject, target: Target, options: StepOptions, loaded: LoadedStep) -> None:
        self._subject, self._target, self._options = subject, target, options
        self._as_it_is = subject.model.training
        self._harmless = Harmless()
        #: By parameter, the factor by which the last change of programs took its unit down.
        self.lowered: dict[str, float] = {}
        self._counted = frozenset(loaded.capture.changes.counters)
        self._start(loaded)

    def _start(self, loaded: LoadedStep) -> None:
        self._guards = self._fresh()
        # the guards hold the objects whose identities are in the key
        self._known = {self._key(self._guards): (self._guards, loaded.capture, loaded.compiled)}

    def _key(self, guards: Guards) -> tuple[object, ...]:
        """Python state, settings of the optimizer, and which groups have parameters that are behind others."""
        optimizer = self._subject.optimizer
        rule = rule_for(optimizer, self._options.gradients.on_host)
        return (*guards.key(), uneven_groups(optimizer, rule), structure(optimizer, rule))

    def settings_changed(self, loaded: LoadedStep) -> bool:
        """Whether the optimizer has settings, groups or parameters that a program does not have."""
        return structure(self._subject.optimizer, loaded.capture.rule) != loaded.structure

    def restart(self, loaded: LoadedStep) -> None:
        """Forget all programs but this one."""
        self._start(loaded)

    @property
    def subject(self) -> Subject:
        """What is trained, in the mode in which its present program was captured."""
        return dataclasses.replace(self._subject, as_it_is=self._as_it_is)

    def changed(self) -> bool:
        """Whether the Python state may be another one than that of the present program."""
        return self._guards.changed()

    def adapted(self, loaded: LoadedStep, applied: int) -> LoadedStep:
        """The program for the present Python state; `loaded` itself if that is the same, on the same tensors.

        `applied`: the number of updates so far.

        Raises: UsageError ANE131 beyond MOST_PROGRAMS; UnsupportedModel for what the new state leads to.
        """
        differences, fresh = self._guards.differences(), self._fresh()
        if self.settings_changed(loaded):
            differences.append("the optimizer's settings: others")
        self._as_it_is |= self._subject.model.training
        key = self._key(fresh)
        known = self._known.get(key)
        if known is None:
            capture, compiled = compile_step_of(self.subject, self._target, self._options)
            if not self._counted >= capture.changes.counters.keys():
                self._counted |= capture.changes.counters.keys()
                fresh = self._fresh()
                key = self._key(fresh)
            known = fresh, *self._same_program(capture, compiled)
            self._check_budget(known, differences)
            self._known[key] = known
        self._guards = fresh
        _, capture, compiled = known
        same = _runs(capture, compiled) == _runs(loaded.capture, loaded.compiled)
        if same and loaded.mirror.current():
            if self._harmless.note(differences):
                self._guards = self._fresh()
            return loaded
        new = load_compiled(self._subject, self._target, self._options, capture, compiled)
        self.lowered = move_state(loaded, new, applied)
        loaded.session.close()
        return new

    def _fresh(self) -> Guards:
        return Guards(self._subject.model, self._subject.loss, self._harmless.names, self._counted)

    def _same_program(self, capture: StepCapture, compiled: Compiled) -> tuple[StepCapture, Compiled]:
        """An equal program that is known already, with its units."""
        for _, known_capture, known in self._known.values():
            if _runs(known_capture, known) == _runs(capture, compiled):
                return known_capture, known
        return capture, compiled

    def _check_budget(self, new: tuple[Guards, StepCapture, Compiled], differences: list[str]) -> None:
        programs = {_runs(capture, compiled) for _, capture, compiled in (*self._known.values(), new)}
        if len(programs) > MOST_PROGRAMS:
            raise UsageError(
                f"compile_step: needs at most {MOST_PROGRAMS} different states of the model's and loss's Python "
                f"values (each is a program of its own); got another one: {', '.join(differences[:3])}. Feed what "
                "changes often as a tensor of the batch, x=(inputs, value), or keep it as a buffer and write to that.",
                code="ANE131",
            )


def _runs(capture: StepCapture, compiled: Compiled) -> tuple[object, ...]:
    """A program, and what the host does for it: random draws by name (the p of a dropout), counts."""
    changes = capture.changes
    fed = tuple((port.name, port.target, port.scale) for port in compiled.inputs)
    return compiled.fingerprint, fed, tuple(sorted(changes.counters.items())), changes.averaged


def write_moments(mirror: Mirror, units: GradientUnits, *, changed_only: bool) -> int | None:
    """The optimizer's state goes to the engine, in smaller units where it would leave fp16; the updates behind it.

    `changed_only`: what nobody wrote to is newer on the engine. None: the number of updates is as it was.
    """
    units.fresh = True
    for name, factor in mirror.crowded().items():
        factor = units.lower(name, factor)
        mirror.move(name, factor, factor)
    return mirror.push_moments(changed_only=changed_only)


def move_state(old: LoadedStep, new: LoadedStep, applied: int) -> dict[str, float]:
    """The engine's state goes over; what only the new program keeps comes from the module and the optimizer.

    Returns by parameter the factor that its unit is taken down by, since moments of larger gradients would leave fp16
    in the new one.
    """
    state, lowered = old.mirror.state(), new.mirror.crowded()
    for name, factor in lowered.items():
        new.mirror.move(name, factor, factor)
    scale = min(new.capture.loss_scale, old.mirror.scaling("loss_scale"))
    new.mirror.push_weights()
    new.mirror.push_moments(applied=applied)
    kept = {target: value for target, value in state.items() if not target.startswith(SCALING)}
    trained = {target.removesuffix(f"/{RESIDUAL}") for target in kept if target.endswith(f"/{RESIDUAL}")}
    ports = {port.target for port in new.inputs}
    for target in list(kept):
        name, tensor = target.removesuffix(f"/{RESIDUAL}"), target.partition("/")[0]
        frozen = (
            f"{name}/{RESIDUAL}" in ports and name not in trained
        )  # fp16 there; the module has all its digits
        if frozen or not new.mirror.shares(
            old.mirror, tensor
        ):  # moments of another tensor are none of its own
            del kept[target]
    new.mirror.set_state(kept)
    new.mirror.set_scaling(scale)
    return lowered
