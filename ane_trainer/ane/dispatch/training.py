"""A whole training step, compiled once, one dispatch a call: `build_step` makes it, `TrainingStep` runs it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import NoReturn

import numpy as np
import torch

from ane_trainer.ane.capture import Loss, StepCapture
from ane_trainer.ane.capture.optimizers.table import check_hooks
from ane_trainer.ane.capture.randomness import draw
from ane_trainer.ane.capture.range.calibration import calibration_of, calibration_tensors
from ane_trainer.ane.capture.step import CEILING, GRADIENT
from ane_trainer.ane.capture.trace.torch_private import mark_stepped
from ane_trainer.ane.dispatch.adapting import Variants, write_moments
from ane_trainer.ane.dispatch.agreement import (
    NAN_LOSS,
    Agreement,
    Reference,
    explained,
    nan_in_pytorch,
    reference,
)
from ane_trainer.ane.dispatch.devices.protocol import Floats
from ane_trainer.ane.dispatch.faint import compare_and_tell
from ane_trainer.ane.dispatch.host_optimizer import HostOptimizer, reason_for_host
from ane_trainer.ane.dispatch.loading import LoadedStep, Subject, load_step
from ane_trainer.ane.dispatch.options import StepOptions, Target
from ane_trainer.ane.dispatch.parallel import check_mean, repeated_draws
from ane_trainer.ane.dispatch.rounding import error_at_random, rounded_run
from ane_trainer.ane.dispatch.sizes import Sizes
from ane_trainer.ane.dispatch.state import StepState
from ane_trainer.ane.dispatch.step_facts import StepFacts
from ane_trainer.ane.dispatch.units import GradientUnits, run_fitting
from ane_trainer.ane.dispatch.windows import Window
from ane_trainer.ane.errors import NumericsWarning, PeerLost, UsageError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.utils import return_memory

#: Losses of exactly 0 that are compared with PyTorch's.
_ZEROS = 4


def build_step(
    model: torch.nn.Module,
    loss: str | Loss,
    optimizer: torch.optim.Optimizer,
    example: tuple[object, object],
    target: Target,
    options: StepOptions,
    state: Mapping[str, torch.Tensor] | None = None,
    capture: StepCapture | None = None,
) -> TrainingStep:
    """Capture, compile and load one training step, and continue from `state` where it is given.

    A model in evaluation mode is captured in training mode. `capture`: of the same step for another chip.

    Raises: UnsupportedModel with every reason at once (ops, limits of the chip, the optimizer); DataError for
    parameters that are not finite or beyond the program's precision; CheckpointError for a state that is not
    whole, or not of this step.
    """
    saved = None if state is None else StepState.of(state)
    reason = reason_for_host(optimizer, options.optimizer_on, saved is not None and bool(saved.host))
    if reason or options.optimizer_on == "host":
        options = options.with_optimizer_on_host()
    if options.exchange is not None:
        options.exchange.broadcast(model)
        check_mean(model, loss, example, options.exchange.shards)
    subject = Subject(model, loss, optimizer, example)
    loaded = load_step(subject, target, options, saved, capture)
    step = TrainingStep(subject, target, options, loaded, reason)
    if saved is not None:
        step.load_state_dict(state or {})
    return step


class TrainingStep(StepFacts):
    """A compiled training step. `step(x, y)` runs it; made by `compile_step`.

    `skipped_steps` counts the steps whose gradients overflowed: they changed nothing but the loss scale.
    """

    def __init__(
        self, subject: Subject, target: Target, options: StepOptions, loaded: LoadedStep, host_reason: str
    ) -> None:
        host = HostOptimizer(subject.model, subject.optimizer) if options.gradients.on_host else None
        super().__init__(subject, target, options, loaded, host, host_reason)
        self.compiles, self.steps, self.applied_steps, self.skipped_steps = 1, 0, 0, 0
        seed = options.seed
        self._draws = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
        #: How the last step that was compared agrees with fp32; None before, or if it could not be compared.
        self.agreement: Agreement | None = None
        self._skipped_before = 0
        self._zeros = 0  # losses of 0 that were looked at
        self._pending = 0  # batches since the last update
        self._window = Window(options.gradients.accumulate if options.exchange is None else 1)
        self._unsynced = 0  # steps whose weights the module has not seen
        self._stale_moments = False
        self._units = self._fresh_units()
        self._variants, self._sizes = Variants(subject, target, options, loaded), Sizes()
        self.load()

    def __call__(self, x: object, y: object) -> torch.Tensor:
        """One training step on a batch; the loss before the update, a float32 tensor of rank 0.

        What the loop changed since the last step is followed: weights and buffers (also through `.data`), the
        optimizer's state and scalars; flags and Python numbers of the model and loss by another program, 8 at most.

        Raises: DataError for a batch that does not fit; UsageError if what is compiled in changed too often.
        """
        check_hooks(self._subject.optimizer, self._loaded.capture.rule)
        loaded, changed = self._loaded, self.follow() or not self.steps
        before = self._draws.get_state()
        draws = torch.Generator().set_state(before)
        feeds = self.feeds(x, y)
        unlike = self._sizes.unlike(self._subject.model if changed else None, (x, y))
        compared = self.options.verifies(self.steps, unlike)
        if changed or loaded is not self._loaded:
            self._window.drop()
        whole = self._window.take((x, y), before, compared, self._pending)
        expected = self._expected(x, y, draws, whole) if compared or whole else None
        results = self._run(feeds, before)
        self.steps += 1
        self._unsynced += 1
        mark_stepped(self._subject.optimizer)
        self._pending = (self._pending + 1) % self.gradient_options.accumulate
        if self._pending == 0:
            self._count_update(bool(results["applied"][0]), results)
        if self.options.sync == "always":
            self._pull_weights()
        loss = float(results["loss"][0]) / self._loaded.loss_unit
        mean = self._window.mean_loss(loss)
        told = unlike and self.skipped_steps > self._skipped_before  # that the batch does not fit
        if expected is not None and not told:
            self._compare(expected, mean if whole else loss, x, y)
            del expected
            return_memory()
        if loss == 0.0 and self._zeros < _ZEROS:
            self._tell_of_nan(x, y)
        return torch.tensor(loss)

    def _tell_of_nan(self, x: object, y: object) -> None:
        """Warn, once, of a loss of 0 that is nan in PyTorch; the first few are looked at."""
        self._zeros += 1
        if nan_in_pytorch(self._variants.subject, x, y):
            self._zeros = _ZEROS
            warnings.warn(f"step {self.steps}: {NAN_LOSS}", NumericsWarning, stacklevel=3)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises: UsageError, for copies and pickles: the step's state is in a device's memory."""
        raise UsageError(
            "step: needs to stay in the process and on the device that it was compiled for; got a copy or a pickle of "
            "it. Copy or save the model and the optimizer (step.sync() brings them up to date), or step.state_dict(), "
            "and compile another step."
        )

    def _run(self, feeds: dict[str, Array], draws: torch.Tensor) -> Mapping[str, Floats]:
        """The programs on these feeds; if another process is lost, all is as before the step, draws included."""
        last = self._pending + 1 == self.gradient_options.accumulate
        scalars = lambda: self._fed(self.scalars())  # noqa: E731
        try:
            return run_fitting(self._loaded, self._units, feeds, self.steps + 1, scalars, last)
        except PeerLost:
            self._draws.set_state(draws)
            raise

    def _expected(
        self, x: object, y: object, draws: torch.Generator, whole: bool
    ) -> tuple[Reference, dict[str, torch.Tensor]] | None:
        """PyTorch's step on this batch, or on all of an update, and the engine's parameters before its own."""
        self.sync()
        options, parts = self.gradient_options, self.options.parts(x, y)
        if whole:
            options, parts, draws = self._window.as_one(options)
        found = reference(self._variants.subject, options, draws, parts)
        if found is None:
            return None
        # a copy may call them otherwise, as of a compiled Keras model
        if not {name for name, _ in self._subject.model.named_parameters()}.issuperset(found.changes or {}):
            found = found.without_update()
        self._skipped_before = self.skipped_steps
        return found, self._parameters(found.changes or {})

    def _compare(
        self, expected: tuple[Reference, dict[str, torch.Tensor]], loss: float, x: object, y: object
    ) -> None:
        """Note how this step agrees with fp32; of a skipped one only the loss."""
        found, before = expected
        if self.skipped_steps > self._skipped_before:
            found, before = found.without_update(), {}
        changes = {name: value - before[name] for name, value in self._parameters(before).items()}
        self.agreement = compare_and_tell(self.steps, loss, changes, found)
        if not self.agreement.agrees and not math.isnan(found.loss):
            part = self.options.parts(x, y)[0]
            run = lambda: rounded_run(self._loaded, part, before)  # noqa: E731
            more = error_at_random(self._loaded, part, before)
            self.agreement = explained(self.agreement, changes, found, loss, run, more)

    def follow(self) -> bool:
        """Take over what was changed since the last step: weights (True), optimizer state, Python values."""
        mirror = self._loaded.mirror
        if changed := mirror.changed():
            mirror.push_weights(changed_only=True)
            self._units.fresh = True
        self._take_moments()
        if self._variants.settings_changed(self._loaded) or self._variants.changed() or self._uneven():
            self._adapt()
        return changed

    def _take_moments(self) -> None:
        """What was written into the optimizer's state since the last step goes to the engine."""
        mirror = self._loaded.mirror
        mirror.follow_settings(self.applied_steps)
        if mirror.moments_changed():
            count = write_moments(mirror, self._units, changed_only=self._stale_moments)
            self.applied_steps = self.applied_steps if count is None else count
            mirror.show_moments(self._pull_moments)

    def _adapt(self) -> None:
        """Go on with the program for the present Python state and settings of the optimizer."""
        self.sync()
        before, self._loaded = self._loaded, self._variants.adapted(self._loaded, self.applied_steps)
        if self._loaded is not before:
            self.compiles += 1
            self._units = self._fresh_units()
            for name, factor in self._variants.lowered.items():
                self._units.lower(name, factor)
            if self._host is not None:
                self._host = HostOptimizer(self._subject.model, self._subject.optimizer)

    def _uneven(self) -> bool:
        """Whether parameters need numbers of their own, since some are behind, and the program has them by group."""
        if not any(self._units.lags.values()):
            return False
        sizes = {p.target: p.shape[0] for p in self._loaded.scalars}
        return any(len(values) > sizes.get(name, len(values)) for name, values in self.scalars().items())

    def _fresh_units(self) -> GradientUnits:
        units = GradientUnits.of(self._loaded.capture, self._subject.optimizer)
        units.lags = self._loaded.mirror.lags
        return units

    def _count_update(self, applied: bool, results: Mapping[str, Array]) -> None:
        """A batch that completes an update has run; on the host the update happens now."""
        self.applied_steps += applied
        self.skipped_steps += not applied
        self._stale_moments |= applied
        if self._host is not None and applied:
            self._pull_weights()
            units = {f"{name}/{GRADIENT}": unit for name, unit in self._units.read_in.items()}
            self._host.update(
                {
                    port.target.removesuffix(f"/{GRADIENT}"): torch.from_numpy(
                        results[port.name].astype(np.float32) / np.float32(units[port.target])
                    )
                    for port in self._loaded.gradients
                }
            )

    def feeds(self, x: object, y: object, ahead: int | None = None) -> dict[str, Array]:
        """What a step on this batch is fed, by port: batch, new random draws, the optimizer's scalars.

        They are those of the next update, or of a trial `ahead` steps after it, whose draws training does not miss.
        """
        loaded, draws = self._loaded, self._draws if ahead is None else torch.Generator().manual_seed(ahead)
        feeds = loaded.feeds(x, y)
        make = lambda p: draw(p.target, p.shape, draws).numpy()  # noqa: E731
        feeds |= repeated_draws(loaded.draws, self.options.shards, make)
        counts = loaded.capture.changes.host_values(self._subject.model, self._unsynced)
        sent: dict[str, list[float]] = {**self.scalars(ahead or 0), **counts}
        return {n: a.astype(loaded.dtype, copy=False) for n, a in feeds.items()} | self._fed(sent)

    def _fed(self, sent: Mapping[str, list[float]]) -> dict[str, Array]:
        """The host's numbers by port."""
        known, dtype = self._loaded.scalars, self._loaded.dtype
        arrays = {p: np.atleast_1d(np.asarray(sent[p.target], dtype)) for p in known if p.target in sent}
        return {
            p.name: a if a.shape == p.shape else np.broadcast_to(a, p.shape).copy() for p, a in arrays.items()
        }

    def scalars(self, ahead: int = 0) -> dict[str, list[float]]:
        """Port target -> values of the optimizer's scalars for the next update, or one `ahead` steps after it."""
        last = self._pending + 1 == self.gradient_options.accumulate
        return self._units.scalars(self.applied_steps + 1 + ahead, self.gradient_options, last=last)

    def port_state(self) -> dict[str, Array]:
        """A copy of the device's state by port, in the program's precision and units."""
        ports = self._loaded.inputs
        return {p.name: self._loaded.session.read(p.name) for p in ports if p.role == "state"}

    def sync(self) -> None:
        """Engine -> module and optimizer: parameters, buffers, moments in torch's own layout and units."""
        self._take_moments()
        self._pull_weights()
        self._pull_moments()

    def _pull_moments(self) -> None:
        if self._stale_moments:
            self._stale_moments = False
            self._loaded.mirror.pull_moments(self.applied_steps)

    def load(self) -> None:
        """Module and optimizer -> engine: use it after `optimizer.load_state_dict`; new weights are noticed anyway."""
        self._loaded.mirror.push_weights()
        self.applied_steps = self._loaded.mirror.push_moments() or 0
        self._unsynced, self._stale_moments = 0, False
        if self._host is None:
            self._loaded.mirror.show_moments(self._pull_moments)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The engine's whole state, exactly, with counters and the generator of random draws (`dispatch.state`)."""
        mirror = self._loaded.mirror
        if mirror.changed():  # by the host's optimizer, say
            mirror.push_weights(changed_only=True)
        self._take_moments()
        return StepState(
            engine=mirror.state(),
            units={**self._loaded.capture.units, **self._units.named()},
            levels=self._units.named_levels(),
            steps=self.steps,
            applied_steps=self.applied_steps,
            skipped_steps=self.skipped_steps,
            generator=self._draws.get_state(),
            pending=self._pending if self.gradient_options.accumulate > 1 else None,
            host={} if self._host is None else self._host.state(),
            calibration=calibration_tensors(self._loaded.capture.calibration),
        ).to_tensors()

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state_dict`, bit for bit; another largest loss scale, or other ranges, recompile.

        Raises: CheckpointError, before anything changed, for a state that is not whole or not of this step.
        """
        state = StepState.of(tensors)
        state.check(self._loaded.inputs, self._loaded.capture.units, on_host=self._host is not None)
        capture = self._loaded.capture
        ranges = calibration_of(state.calibration)
        if state.units[CEILING] != capture.units[CEILING] or ranges not in ({}, capture.calibration):
            self._loaded.session.close()
            self._loaded = load_step(self._subject, self.target, self.options, state)
            self._units.lags, self._units.guarded = self._loaded.mirror.lags, self._loaded.capture.guarded
            self._variants.restart(self._loaded)
            self.compiles += 1
        mirror = self._loaded.mirror
        self._units.restore(state.units, state.levels)
        self._units.fresh = state.steps == 0
        mirror.set_units(self._units.named(), self._units.shift)
        mirror.set_state(state.engine)
        self._pending = state.pending or 0
        if self._host is not None:
            self._host.set_state(state.host)
        self.steps, self.applied_steps = state.steps, state.applied_steps
        self.skipped_steps = state.skipped_steps
        self._draws.set_state(state.generator)
        mirror.pull_weights(0)
        mirror.pull_unwritten()
        self._unsynced, self._stale_moments = 0, self.applied_steps > 0

    @property
    def health(self) -> dict[str, int]:
        """By module, the batches in which the gradient of one of its parameters left its range: skipped updates."""
        return self._units.overflows_by_module()

    @property
    def subject(self) -> Subject:
        """What is trained: the model, loss and optimizer as the loop holds them, and the example."""
        return self._variants.subject

    @property
    def host_side(self) -> tuple[GradientUnits, LoadedStep]:
        """What the host keeps: units of gradients, and the step with the mirror of its state."""
        return self._units, self._loaded

    def close(self) -> None:
        """Bring the module up to date and release the device."""
        self.sync()
        self._loaded.session.close()

    def discard(self) -> None:
        """Release the device; the module stays as it was at the last `sync`."""
        self._loaded.session.close()

    def __enter__(self) -> TrainingStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pull_weights(self) -> None:
        if self._unsynced:
            self._loaded.mirror.pull_weights(self._unsynced)
            self._unsynced = 0
