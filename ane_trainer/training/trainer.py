"""`Trainer`: one model, trained by one compiled program a step, evaluated, saved and resumed."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import nn

from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.capture.losses import CLASS_LOSSES, get_loss, loss_name
from ane_trainer.ane.capture.scaling import SCALING
from ane_trainer.ane.dispatch import StepOptions, TrainingStep
from ane_trainer.ane.dispatch.state import MODEL, STEP, faults_of, incomplete, part
from ane_trainer.ane.errors import (
    CheckpointError,
    Diverged,
    UsageError,
)
from ane_trainer.ane.export import ExportOptions, ExportReport, format_of
from ane_trainer.training import energy, engine, loop
from ane_trainer.training.callbacks import Callback
from ane_trainer.training.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    check_scalars,
    describe_optimizer,
    has_step,
    read_model,
    read_tensors,
    rebuild_optimizer,
    unwritable,
    write_model,
    write_tensors,
)
from ane_trainer.training.datasets.opening import batches_of
from ane_trainer.training.evaluation import Inference
from ane_trainer.training.exporting import CHECKED_STEPS, export_model, export_training
from ane_trainer.training.intake import Intake
from ane_trainer.training.loop import Batch, Progress
from ane_trainer.training.report import ConsoleReporter, Reporter
from ane_trainer.training.results import Epoch, Metrics, Result
from ane_trainer.training.steps import Step
from ane_trainer.utils import seeded

Loss = str | Callable[[Any, Any], torch.Tensor]

#: Steps in a row that may be skipped or give a loss that is not finite. Dynamic loss scaling needs up to 15
#: skips to come down from 32768 to 1; more than twice that means that no scale helps.
MAX_BAD_STEPS = 32


class Trainer:
    """Trains a PyTorch module by one compiled program a step.

    model      any nn.Module made of supported layers; its parameters follow the engine's after each epoch.
    loss       a name ("cross_entropy", "mse", ...) or a callable(output, target) -> scalar.
    optimizer  a torch.optim object over the model's parameters; default Adam, lr 1e-3. Schedulers of it act.
    device     "auto", "sim" (simulator), "cpu" (plain PyTorch fp32), or a device that `doctor` lists.
    chip       whose arithmetic and limits hold on the simulator: "m1" ... "m6".
    fidelity   "exact" (the engine's arithmetic bit by bit where it is known) or "fast".
    precision  "auto": fp16 on the simulator; "fp32" on devices that run it.
    seed       of everything random in the order of the data; the weights are the model's own.
    threads    of the simulator; None: all cores. The result does not depend on it.
    report     where progress goes; default: lines on standard output. `Reporter()` is silent.
    clip_grad_norm, clip_grad_value, accumulate, optimizer_on
               as in `compile_step`: gradient clipping and accumulation, where the optimizer runs.
    fallback   "none": refuse what does not fit the chip; "cpu": run those parts on the CPU, and report them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = "cross_entropy",
        optimizer: torch.optim.Optimizer | None = None,
        *,
        device: str = "auto",
        chip: str = "m4",
        fidelity: str = "exact",
        precision: str = "auto",
        seed: int = 0,
        threads: int | None = None,
        report: Reporter | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int = 1,
        optimizer_on: str = "auto",
        fallback: str = "none",
    ) -> None:
        gradients = GradientOptions(clip_grad_norm, clip_grad_value, accumulate)
        self.options = StepOptions(gradients, optimizer_on, fallback, sync="lazy", seed=seed)
        self.model, self.loss = model, loss
        self.optimizer = optimizer if optimizer is not None else torch.optim.Adam(model.parameters(), lr=1e-3)
        self.target = engine.choose_target(device, chip, fidelity, precision, threads)
        self.chip, self.fidelity, self.precision = chip, fidelity, precision
        self.seed, self.threads = seed, threads
        self.history: list[Epoch] = []
        self.progress = Progress()
        self.step: Step | None = None  #: the compiled training step, from the first batch on
        self.seconds_compile = 0.0
        self._loss = get_loss(loss)
        self.report = report if report is not None else ConsoleReporter()
        self._inference = Inference(model, self._loss, self.target, fallback)
        self._intake = Intake(model, loss)
        self._train: Iterable[Batch] = ()  # what `fit` trains on
        self._restored: Checkpoint | None = None
        self._data_state: dict[str, Any] | None = None
        self._metrics: Metrics | None = None
        self._announced = False
        self.callbacks: tuple[Callback, ...] = ()
        self.should_stop = False  #: set by a callback to end training after the epoch
        self._pass: Iterable[Batch] | None = None  # the data while a pass over it is under way

    def fit(
        self, train: Iterable[Batch], epochs: int = 1, val: Iterable[Batch] | None = None, *,
        after_epoch: Callable[[Epoch], None] | None = None, callbacks: Iterable[Callback] = (),
    ) -> Result:  # fmt: skip
        """Finish `epochs` more passes over `train`, evaluating on `val` after each.

        `train` and `val` are iterables of (x, y) that can be run through again, e.g. a DataLoader; or arrays
        (x, y) or a map-style dataset, in batches of 128. NumPy arrays do as tensors, float64 becomes float32. A
        last batch smaller than the first one is trained on, too (`training.intake`), or it is said why not.
        Ctrl-C, SIGTERM and SIGHUP stop between two steps, with the parameters in order, by KeyboardInterrupt
        (its argument is the signal's number); `save` and `resume` go on from there.

        DataError: a batch of another shape, values that are not finite or beyond fp16, a class number out of
        range. Diverged: the loss stays not finite. UnsupportedModel: the model does not fit the chip.
        """
        loop.check_epochs(epochs)
        train = batches_of(train, "train", self.seed)
        val = batches_of(val, "val", self.seed) if val is not None else None
        self._train = train
        loop.check_repeatable(train, "train", epochs)
        self.callbacks, self.should_stop = tuple(callbacks), False
        self._load_callbacks()
        self.announce()
        last, started = self.progress.epoch + epochs, time.perf_counter()
        try:
            with loop.interruptible() as stop, contextlib.closing(self.report):
                self._start(train, stop)
                while self.progress.epoch < last and not self.should_stop:
                    whole = self.progress.batch == 0  # of a resumed epoch only a part is measured
                    with energy.measured(self.target.name) as reading:
                        self._train_epoch(train, last, stop)
                    self._finish_epoch(val, reading.joules if whole else None, stop)
                    if after_epoch is not None:
                        after_epoch(self.history[-1])
                    self._call(lambda c: c.on_train_epoch_end(self, self.history[-1]))
                    stop.check()
                self._call(lambda c: c.on_train_end(self))
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_exception(self, error)
            raise
        finally:
            self.progress.seconds += time.perf_counter() - started
        return self.result(dataset=getattr(train, "name", None))

    def evaluate(
        self, data: Iterable[Batch], *, see: Callable[[Any, Any, Any], object] | None = None
    ) -> Metrics:
        """Mean loss and accuracy of the model's inference program over `data`; a small batch is padded.

        `see` is called with each batch's x, output and target.
        """
        self._sync()
        return self._inference.evaluate(batches_of(data, "evaluate", self.seed), see=see)

    @property
    def stop_training(self) -> bool:
        """`should_stop`, by the name that Keras has for it."""
        return self.should_stop

    @stop_training.setter
    def stop_training(self, value: bool) -> None:
        self.should_stop = value

    def predict(self, x: ArrayLike | torch.Tensor | tuple[Any, ...] | dict[str, Any]) -> Any:
        """The model's output for examples x [N, ...], as float32: [N, ...], or such tensors in its structure.

        A tuple or dict of tensors is what the model takes several of; a list is an array.
        """
        self._sync()
        return self._inference.predict(x)

    def announce(self) -> None:
        """Report, once, which device was chosen and why."""
        if not self._announced:
            self._announced = True
            self.report.headline(self.target.headline)

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint folder from which `resume` continues bit for bit; replaces an older one."""
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_model(folder / "model.pt", self.model, self.loss)
            checkpoint = self.checkpoint()
            write_tensors(folder / CHECKPOINT, checkpoint.tensors, checkpoint.scalars)
        except OSError as error:
            raise unwritable(folder, error) from None
        return folder

    @classmethod
    def resume(
        cls, path: str | Path, *, model: nn.Module | None = None, loss: Loss | None = None,
        optimizer: torch.optim.Optimizer | None = None, report: Reporter | None = None, **options: Any,
    ) -> Trainer:  # fmt: skip
        """The trainer that `save` wrote. Whatever could not be stored has to be passed again.

        `options` (device, chip, fidelity, threads) override the stored ones. CheckpointError: nothing there,
        damaged, of another model, or a model class that is not imported.
        """
        checkpoint = read_tensors(Path(path) / CHECKPOINT, scalars=True)
        stored_loss: Loss = checkpoint.scalars["loss"]
        if model is None:
            model, stored_loss = read_model(Path(path) / "model.pt")
        if optimizer is None:
            optimizer = rebuild_optimizer(checkpoint.scalars["optimizer"], model)
        settings = {**checkpoint.scalars["options"], **options}
        trainer = cls(model, stored_loss if loss is None else loss, optimizer, report=report, **settings)
        trainer.restore(checkpoint)
        return trainer

    def export(
        self, path: str | Path, format: str | None = None, *, data: Iterable[Batch] | None = None,
        input: str = "auto", weights: str = "fp16", batch: int = 1, examples: int = 256, state: str = "io",
    ) -> ExportReport:  # fmt: skip
        """Write the trained model (or its training step) as a file, and run that file again to check it.

        format    mlpackage, aimodel, onnx, torch; step-mlpackage, step-aimodel: the training step with its
                  state. By default what the path ends in says.
        data      batches to check it on; by default the first batch of training.
        input     "image": pixels, normalised inside (data with mean and std); "tensor"; "auto".
        weights   fp16, int8 or int4 (mlpackage).
        batch     examples that go in at once.
        state     of a training step: "io" (inputs and outputs), "state" (updated in place) or "both".

        UsageError: an unknown format or no data; MissingDependency: the extra to install.
        """
        kind = format_of(path, format)
        self._sync()
        example = self._intake.example
        source = data if data is not None else [example] if example else None
        if source is None:
            raise UsageError("export: needs data to check the file; got none. Pass data=...", code="ANE117")
        options = ExportOptions(input, weights, batch, examples, self.chip, self.fidelity, state)
        if kind.startswith("step-"):
            step = self.step
            if step is None:
                step = self._compiled(*loop.unpack(next(iter(source)), "export: first batch"))
            if not isinstance(step, TrainingStep):
                raise UsageError(
                    f"export: needs a training step that is one program; got {step.placement()['where']}. "
                    'Train with device="sim" and fallback="none".',
                    code="ANE116",
                )
            ready = (self._ready(*loop.unpack(batch, "export: batch"), "export: batch") for batch in source)
            whole = [pair for pair in itertools.islice(ready, CHECKED_STEPS) if pair is not None]
            return export_training(step, self.optimizer, path, kind, whole, options)
        return export_model(self.model, path, kind, source, options, classes=self._loss in CLASS_LOSSES)

    def checkpoint(self) -> Checkpoint:
        """Everything that training needs to go on: parameters, the step's state, counters, data position."""
        self._sync()
        tensors = {MODEL + name: value for name, value in self.model.state_dict().items()}
        if self.step is not None:
            tensors |= {STEP + name: value for name, value in self.step.state_dict().items()}
        elif self._restored is not None:
            tensors |= {k: v for k, v in self._restored.tensors.items() if k.startswith(STEP)}
        progress = {**asdict(self.progress), "skipped_steps": self._skipped()}
        scalars = {
            "progress": progress,
            "history": [record.to_json() for record in self.history],
            "data": self._position(),
            "loss": loss_name(self.loss),
            "optimizer": describe_optimizer(self.optimizer, self.model),
            "options": self._settings(),
            "program": compiled.fingerprint if (compiled := self.step and self.step.compiled) else None,
            "callbacks": {type(c).__name__: state for c in self.callbacks if (state := c.state_dict())},
        }
        return Checkpoint(tensors, scalars)

    def _position(self) -> dict[str, Any] | None:
        """Where the data stands within a pass, if it can tell."""
        if self._pass is None:
            return self._data_state
        return self._pass.state_dict() if hasattr(self._pass, "state_dict") else None

    def _settings(self) -> dict[str, Any]:
        """The arguments that make a trainer like this one."""
        gradients = self.options.gradients
        return {
            "device": self.target.device, "chip": self.chip, "fidelity": self.fidelity,
            "precision": self.precision, "seed": self.seed, "threads": self.threads,
            "clip_grad_norm": gradients.clip_norm, "clip_grad_value": gradients.clip_value,
            "accumulate": gradients.accumulate, "optimizer_on": self.options.optimizer_on,
            "fallback": self.options.fallback,
        }  # fmt: skip

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`, which must be of the same model and optimizer.

        CheckpointError, before anything changed, for one that is not whole or of another model.
        """
        progress, history = check_scalars(checkpoint.scalars)
        self.load_weights(part(checkpoint.tensors, MODEL), "checkpoint")
        self.progress, self.history = progress, history
        self._data_state = checkpoint.scalars["data"]
        self._restored, self.step, self._pass = checkpoint, None, None
        last = self.history[-1] if self.history else None
        if last is not None and last.val_loss is not None:
            self._metrics = Metrics(last.val_loss, last.val_accuracy, 0)

    def load_weights(self, state: Mapping[str, torch.Tensor], where: str) -> None:
        """Put a state_dict into the model; CheckpointError if it is of another model, or not finite."""
        wanted = self.model.state_dict()
        names = {name for name, _ in self.model.named_parameters()}
        faults = faults_of(state, wanted, finite=names)
        if any("nan" not in fault for fault in faults):
            shown = ", ".join(faults[:4]) + (f" and {len(faults) - 4} more" if len(faults) > 4 else "")
            raise CheckpointError(
                f"{where}: needs the weights of this model; got those of another one: {shown}. "
                "Build the model as for the first run.",
                code="CKPT106",
            )
        if faults:
            raise incomplete(where, faults)
        self.model.load_state_dict(state)

    def result(self, **details: Any) -> Result:
        """What training did so far; `details` override or extend the fields."""
        step, progress = self.step, self.progress
        facts: dict[str, Any] = {
            "dataset": None,
            "model": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "epochs": progress.epoch,
            "steps": progress.steps,
            "train_loss": self.history[-1].train_loss if self.history else None,
            "test_loss": self._metrics.loss if self._metrics else None,
            "test_accuracy": self._metrics.accuracy if self._metrics else None,
            "device": self.target.name,
            "chip": self.target.chip,
            "fidelity": self.target.fidelity,
            **engine.step_facts(step),
            "skipped_steps": self._skipped(),
            "seconds_total": progress.seconds,
            "seconds_compile": self.seconds_compile,
            "seconds_per_step": progress.seconds_steps / max(progress.steps, 1),
            "placement": step.placement() if step is not None else {},
            "estimate": engine.estimate_of(step, self.target),
            "energy_joules": energy.total([record.energy_joules for record in self.history]),
            "history": tuple(self.history),
        }
        names = {field.name for field in fields(Result)}
        known = {key: value for key, value in details.items() if key in names}
        extra = {key: value for key, value in details.items() if key not in names}
        return Result(**{**facts, **known}, details=extra)

    def _start(self, train: Iterable[Batch], stop: loop.Stop) -> None:
        """In a resumed training: compile the step for the batch that it was compiled for at first."""
        if self.step is None and self._restored is not None and has_step(self._restored):
            first = loop.first_batch(train, self.seed)
            if first is not None:
                self._compiled(*first)
        if self.step is not None:
            self._begin(stop)

    def _begin(self, stop: loop.Stop) -> None:
        """The step is ready: from here on there is something to lose."""
        stop.begun = True
        self._call(lambda c: c.on_train_start(self))

    def _train_epoch(self, train: Iterable[Batch], last: int, stop: loop.Stop) -> None:
        progress, state, begun = self.progress, self._data_state, False
        if progress.passed:
            return
        where = f"train: epoch {progress.epoch + 1}, batch"
        started, length = time.perf_counter(), loop.length_of(train)
        with seeded(self.seed + progress.epoch):
            for batch in loop.open_pass(train, progress.epoch, progress.batch, state):
                x, y = loop.unpack(batch, f"{where} {progress.batch + 1}")
                if self.step is None:
                    self._compiled(x, y)
                    started += self.seconds_compile
                    self._begin(stop)
                if not begun:
                    self.report.begin_epoch(progress.epoch + 1, last, length, progress.batch)
                    self._call(lambda c: c.on_train_epoch_start(self))
                    self._pass, begun = train, True
                progress.batch += 1
                self._train_batch(x, y, f"{where} {progress.batch}")
                if stop() and progress.batch != length:
                    progress.seconds_steps += time.perf_counter() - started
                    self._sync()
                    stop.check()
        progress.seconds_steps += time.perf_counter() - started
        if not progress.batch:
            raise loop.empty("train")
        progress.passed, self._pass, self._data_state = 1, None, None

    def _train_batch(self, x: Any, y: Any, where: str) -> None:
        step, ready = self._compiled(x, y), self._ready(x, y, where)
        if ready is None:
            return
        x, y = ready
        skipped = step.skipped_steps
        with loop.located(where):
            loss = float(step(x, y))
        self.progress.count(loss, skipped=step.skipped_steps > skipped)
        self.report.step(loss, step.loss_scale, self._skipped())
        self._call(lambda c: c.on_train_batch_end(self, loss))
        if self.progress.bad_in_a_row >= MAX_BAD_STEPS:
            raise self._diverged(f"{MAX_BAD_STEPS} steps in a row that were skipped or had a loss not finite")

    def _ready(self, x: Any, y: Any, where: str) -> Batch | None:
        """The batch in the form of the compiled step; None for a smaller one that is left out."""
        pair = self._intake(x, y, where)
        if pair is not None and self.step is not None:
            loop.check_classes(pair[1], self.step.classes, where)
        return pair

    def _finish_epoch(self, val: Iterable[Batch] | None, joules: float | None, stop: loop.Stop) -> None:
        progress = self.progress
        self._sync()
        self.check_finite()
        metrics = self._inference.evaluate(val, stop) if val is not None else None
        if metrics is not None:
            if not math.isfinite(metrics.loss):
                raise self._diverged(f"a loss of {metrics.loss:g} on the validation data")
            self._metrics = metrics
            self._call(lambda c: c.on_validation_end(self, metrics))
        record = Epoch(
            epoch=progress.epoch + 1,
            steps=progress.steps - progress.steps_before_epoch,
            train_loss=progress.loss_sum / max(progress.loss_count, 1),
            val_loss=metrics.loss if metrics else None,
            val_accuracy=metrics.accuracy if metrics else None,
            loss_scale=self._loss_scale(),
            skipped_steps=self._skipped() - progress.skipped_before_epoch,
            seconds=progress.seconds_steps - progress.seconds_before_epoch,
            energy_joules=joules,
        )
        self.history.append(record)
        if len(self.history) == 1 and self.step is not None:
            for text in self.step.placement().get("cpu", ()):
                self.report.note("cpu", text)
        progress.next_epoch(self._skipped())
        self.report.end_epoch(record)

    def check_finite(self) -> None:
        """Diverged if a parameter is not finite, or the epoch so far had not one good step of many."""
        wrong = [name for name, value in self.model.named_parameters() if not bool(value.isfinite().all())]
        if wrong:
            raise self._diverged(f"numbers that are not finite in {', '.join(wrong)}")
        progress = self.progress
        steps = progress.steps - progress.steps_before_epoch
        skipped = self._skipped() - progress.skipped_before_epoch
        if progress.passed and steps and (not progress.loss_count or skipped == steps >= MAX_BAD_STEPS // 2):
            raise self._diverged(f"an epoch of {steps} steps, all skipped or with a loss not finite")

    def _call(self, moment: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            moment(callback)

    def _load_callbacks(self) -> None:
        states = self._restored.scalars.get("callbacks", {}) if self._restored is not None else {}
        for callback in self.callbacks:
            if type(callback).__name__ in states:
                callback.load_state_dict(states[type(callback).__name__])

    def _compiled(self, x: Any, y: Any) -> Step:
        """The step; at first it is compiled for batches like (x, y) and given the restored state."""
        if self.step is not None:
            return self.step
        self.report.activity("compiling the training step")
        started = time.perf_counter()
        self.model.train()
        state = part(self._restored.tensors, STEP) if self._restored is not None else {}
        with loop.located("train: first batch"):
            ready = self._intake.begin(self._train, x, y)
            step = engine.make_step(
                self.model, self._intake.loss, self.optimizer, ready, self.target, self.options, state or None
            )
        if self._restored is not None:
            self.progress.skipped_steps -= step.skipped_steps
            self._restored = None
        self.step = step
        self._inference.example = x
        for text in self._intake.notes:
            self.report.note("data", text)
        self.seconds_compile = time.perf_counter() - started
        self.report.compiled(engine.program_facts(step, self.optimizer), self.seconds_compile)
        place = step.placement()
        if place.get("optimizer_on") == "host":
            reason = f": it {place['optimizer_reason']}" if place.get("optimizer_reason") else ""
            name = type(self.optimizer).__name__
            self.report.note("optimizer", f"{name} runs on the host, PyTorch fp32{reason}")
        return step

    def _sync(self) -> None:
        if self.step is not None:
            self.step.sync()

    def _loss_scale(self) -> float:
        """The present loss scale; before the step is compiled that of the restored state."""
        if self.step is None and self._restored is not None:
            return float(self._restored.tensors.get(f"{STEP}{SCALING}loss_scale", torch.ones(1)))
        return self.step.loss_scale if self.step is not None else 1.0

    def _skipped(self) -> int:
        return self.progress.skipped_steps + (self.step.skipped_steps if self.step is not None else 0)

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"train: epoch {self.progress.epoch + 1}, batch {self.progress.batch}: needs a loss that stays "
            f"finite; got {what} (loss scale {self._loss_scale():g}). "
            "Lower the learning rate, or look for outliers in the data.",
            code="ANE401",
        )
