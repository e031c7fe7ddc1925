"""`Trainer`: one model, trained by one compiled program a step, evaluated, saved and resumed."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from numpy.typing import ArrayLike
from torch import nn

from ane_trainer.ane.capture.gradients import GradientOptions
from ane_trainer.ane.capture.losses import CLASS_LOSSES
from ane_trainer.ane.dispatch import StepOptions, TrainingStep
from ane_trainer.ane.dispatch.parallel import digest_of, find_exchange, share_of_cores
from ane_trainer.ane.dispatch.state import STEP, part
from ane_trainer.ane.errors import PeerLost, UsageError
from ane_trainer.ane.export import STEP_FORMATS, ExportOptions, ExportReport, format_of
from ane_trainer.training import checkpoint, energy, engine, loop
from ane_trainer.training.callbacks import Callbacks
from ane_trainer.training.datasets.opening import batches_of
from ane_trainer.training.exporting import CHECKED_STEPS, export_app, export_model, export_training
from ane_trainer.training.folder.records import unwritable
from ane_trainer.training.folder.results import Epoch, Metrics, Result
from ane_trainer.training.language.lora import (
    LoraOptions,
    MakeOptimizer,
    adapted,
    merged,
    optimizer_of,
    save_adapter,
)
from ane_trainer.training.loop import Batch
from ane_trainer.training.reporting.report import ConsoleReporter, Reporter
from ane_trainer.training.scores import Metric, Scores
from ane_trainer.training.state import MAX_BAD_STEPS, Loss, Training
from ane_trainer.training.steps import Step, put_into_training
from ane_trainer.training.tuning import RateSweep, find_rate, geometric
from ane_trainer.utils import seeded


class Trainer(Training):
    """Trains a PyTorch module by one compiled program a step.

    model      any nn.Module made of supported layers; its parameters follow the engine's after each epoch. One in eval
               mode trains in train mode; parts that are in eval mode within one in train mode stay so.
    loss       a name ("cross_entropy", "mse", ...) or a callable(output, target) -> scalar.
               "model": what the model returns as its own loss, as Hugging Face's do for batches with labels.
    optimizer  a torch.optim object over the model's parameters; default Adam, lr 1e-3. Schedulers of it act.
               With `lora`, a function that makes one of the parameters that are trained.
    lora       `LoraOptions`, or a configuration of peft: train an adapter of the model, which stays as it is.
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
    verify     "first": compare the first step with fp32 and say how they agree; N: every N steps; "off".
    metrics    by name, torchmetrics' or alike: over the validation data of each epoch (`Epoch.scores`).
    shards     parts that each batch is divided into, whose gradients are averaged; default: one for each process
               that torchrun started (docs/scale.md). 0: this process alone.
    blocks     how many of the modules that repeat are one program, "off" or "auto", as in `compile_step`.
    checkpoint
               compute what lies within such modules again in the backward pass: less memory, the same bits.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = "cross_entropy",
        optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
        *,
        lora: object = None,
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
        verify: str | int = "first",
        shards: int | None = None,
        metrics: Mapping[str, Metric] | Scores | None = None,
        blocks: str | int = "auto",
        checkpoint: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            text = f"model: needs an nn.Module; got {model!r}. Pass one, e.g. build_model('mlp', in_shape, classes)."
            raise UsageError(text, code="ANE104")
        gradients = GradientOptions(clip_grad_norm, clip_grad_value, accumulate)
        exchange = find_exchange(shards)
        options = StepOptions(
            gradients, optimizer_on, fallback, "auto", "lazy", seed, verify, (), exchange, blocks, checkpoint
        )
        if lora is not None:
            model = adapted(model, lora, seed)
        super().__init__(
            model,
            loss,
            optimizer_of(model, optimizer),
            engine.choose_target(device, chip, fidelity, precision, threads or share_of_cores(exchange)),
            options,
            {"chip": chip, "fidelity": fidelity, "precision": precision},
        )
        self.report = report if report is not None else ConsoleReporter()
        if exchange is not None and not exchange.leads:
            self.report = Reporter()
        self.lora = lora if isinstance(lora, LoraOptions) else None
        self._inference.scores = metrics if isinstance(metrics, Scores) else Scores(metrics or {})
        self._announced = self._compared = False
        self.resume = _refuse_object  # type: ignore[method-assign]

    def fit(
        self, train: Iterable[Batch], epochs: int = 1, val: Iterable[Batch] | None = None, *,
        after_epoch: Callable[[Epoch], None] | None = None, callbacks: Iterable[object] = (),
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
        self._train, self._unseen = train, True
        loop.check_repeatable(train, "train", epochs)
        self.callbacks, self.should_stop, self.stop_now = Callbacks(callbacks), False, False
        if self._restored is not None:
            self.callbacks.load(self._restored.scalars.get("callbacks", {}), self._restored.tensors)
        self.announce()
        last, started, self._kept = self.progress.epoch + epochs, time.perf_counter(), None
        self.max_epochs = last
        try:
            with loop.interruptible() as stop, contextlib.closing(self.report):
                self._start(train, stop)
                while self.progress.epoch < last and not self.should_stop:
                    whole = self.progress.batch == 0  # of a resumed epoch only a part is measured
                    with energy.measured(self.target.name) as reading:
                        self._train_epoch(train, last, stop)
                    if not self.progress.passed:  # a callback wants no more steps
                        self._metrics = self._inference.evaluate(val, stop) if val is not None else None
                        break
                    self._finish_epoch(val, reading.joules if whole else None, stop)
                    if after_epoch is not None:
                        after_epoch(self.history[-1])
                    for callback in self.callbacks:
                        callback.on_train_epoch_end(self, self.history[-1])
                    self._agree(stop)
                    stop.check()
                for callback in self.callbacks:
                    callback.on_train_end(self)
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_exception(self, error)
            raise
        finally:
            self.progress.seconds += time.perf_counter() - started
        return self.result(dataset=getattr(train, "name", None))

    def find_lr(
        self, train: Iterable[Batch], *, lowest: float = 1e-6, highest: float = 1.0, steps: int = 100
    ) -> RateSweep:
        """A learning rate for this model and data, by `steps` steps at growing rates; nothing is changed by it."""
        data = batches_of(train, "train", self.seed)
        self._train = data

        def batches() -> Iterator[Batch]:
            for epoch in range(steps):
                for number, batch in enumerate(loop.open_pass(data, epoch, 0, None), 1):
                    where = f"find_lr: batch {number}"
                    x, y = loop.unpack(batch, where)
                    self.compiled(x, y)
                    if (ready := self._intake(x, y, where)) is not None:
                        yield ready

        with seeded(self.seed):
            pairs = batches()
            first = next(pairs, None)
            if first is None or self.step is None:
                raise loop.empty("find_lr")
            found = find_rate(
                self.step, self.optimizer, itertools.chain([first], pairs), geometric(lowest, highest, steps)
            )
        return found

    def evaluate(
        self, data: Iterable[Batch], *, see: Callable[[Any, Any, Any], object] | None = None
    ) -> Metrics:
        """Mean loss and accuracy of the model's inference program over `data`; a small batch is padded.

        `see` is called with each batch's x, output and target.
        """
        self.sync()
        return self._inference.evaluate(batches_of(data, "evaluate", self.seed), see=see)

    def predict(self, x: ArrayLike | torch.Tensor | tuple[object, ...] | dict[str, object]) -> Any:
        """The model's output for examples x [N, ...], as float32: [N, ...], or such tensors in its structure.

        A tuple or dict of tensors is what the model takes several of; a list is an array.
        """
        self.sync()
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
            if not self.is_adapter:
                checkpoint.write_model(folder / "model.pt", self.model, self.loss)
            saved = self.checkpoint()
            checkpoint.write_tensors(folder / checkpoint.CHECKPOINT, saved.tensors, saved.scalars)
        except OSError as error:
            raise unwritable(folder, error) from None
        return folder

    def save_adapter(self, path: str | Path) -> Path:
        """Write the trained adapter into a folder, in PEFT's own format: `PeftModel.from_pretrained` reads it."""
        self.sync()
        return save_adapter(self.model, path)

    def merged_model(self) -> nn.Module:
        """A copy of the model with its adapter merged into the weights, as it was before PEFT wrapped it."""
        self.sync()
        return merged(self.model)

    @classmethod
    def resume(
        cls, path: str | Path, *, model: nn.Module | None = None, loss: Loss | None = None,
        optimizer: torch.optim.Optimizer | None = None, report: Reporter | None = None, **options: object,
    ) -> Trainer:  # fmt: skip
        """The trainer that `save` wrote. Whatever could not be stored has to be passed again: of a training with
        `lora` the model, as it was then.

        `options` (device, chip, fidelity, threads) override the stored ones. CheckpointError: nothing there,
        damaged, of another model, or a model class that is not imported.
        """
        saved = checkpoint.read_tensors(Path(path) / checkpoint.CHECKPOINT, scalars=True)
        stored_loss: Loss = saved.scalars["loss"]
        if model is None:
            model, stored_loss = checkpoint.read_model(Path(path) / "model.pt")
        settings = {**saved.scalars["options"], **options}
        if isinstance(settings.get("lora"), dict):
            settings["lora"] = LoraOptions(**settings["lora"])
        if settings.get("lora") is not None:
            model = adapted(model, settings["lora"], settings["seed"])
        if optimizer is None:
            optimizer = checkpoint.rebuild_optimizer(saved.scalars["optimizer"], model)
        trainer = cls(model, stored_loss if loss is None else loss, optimizer, report=report, **settings)
        trainer.restore(saved)
        return trainer

    def export(
        self, path: str | Path, format: str | None = None, *, data: Iterable[Batch] | None = None,
        input: str = "auto", weights: str = "fp16", batch: int = 1, examples: int = 256, state: str = "io",
    ) -> ExportReport:  # fmt: skip
        """Write the trained model (or its training step) as a file, and run that file again to check it.

        format    mlpackage, aimodel, onnx, torch; step-mlpackage, -aimodel, -onnx, -stablehlo: the training step with
                  its state; app: a Swift package around it. By default what the path ends in says.
        data      batches to check it on; by default the first batch of training.
        input     "image": pixels, normalised inside (data with mean and std); "tensor"; "auto".
        weights   fp16, int8 or int4 (mlpackage), fp32 (step-aimodel).
        batch     examples that go in at once.
        state     of a training step: "io" (inputs and outputs), "state" (updated in place) or "both".

        UsageError: an unknown format or no data; MissingDependency: the extra to install.
        """
        kind = format_of(path, format)
        self.sync()
        example = self._intake.example
        source = data if data is not None else [example] if example else None
        if source is None:
            raise UsageError("export: needs data to check the file; got none. Pass data=...", code="ANE117")
        options = ExportOptions(input, weights, batch, examples, self.chip, self.fidelity, state)
        if kind in STEP_FORMATS:
            step = self.step
            if step is None:
                step = self.compiled(*loop.unpack(next(iter(source)), "export: first batch"))
            if not isinstance(step, TrainingStep) or self.options.exchange is not None:
                raise UsageError(
                    f"export: needs a training step that is one program; got {step.placement()['where']}. "
                    'Train with device="sim", fallback="none" and shards=0.',
                    code="ANE116",
                )
            ready = (self._intake(*loop.unpack(batch, "export: batch"), "export: batch") for batch in source)
            whole = [pair for pair in itertools.islice(ready, CHECKED_STEPS) if pair is not None]
            if kind == "app":
                return export_app(step, self.optimizer, self.model, path, whole, options)
            return export_training(step, self.optimizer, path, kind, whole, options)
        return export_model(self.model, path, kind, source, options, classes=self._loss in CLASS_LOSSES)

    def _start(self, train: Iterable[Batch], stop: loop.Stop) -> None:
        """In a resumed training: compile the step for the batch that it was compiled for at first."""
        if self.step is None and self._restored is not None and checkpoint.has_step(self._restored):
            first = loop.first_batch(train, self.seed)
            if first is not None:
                self.compiled(*first)
        if self.step is not None:
            self._begin(stop)

    def _begin(self, stop: loop.Stop) -> None:
        """The step is ready: from here on there is something to lose."""
        stop.begun = True
        for callback in self.callbacks:
            callback.on_train_start(self)

    def _train_epoch(self, train: Iterable[Batch], last: int, stop: loop.Stop) -> None:
        progress, state, begun = self.progress, self._data_state, False
        where = f"train: epoch {progress.epoch + 1}, batch"
        started, length = time.perf_counter(), loop.length_of(train)
        if progress.batch and progress.batch == length:  # it was saved after the last batch, and ended there
            progress.passed, self._data_state = 1, None
        if progress.passed:
            return
        with seeded(self.seed + progress.epoch):
            for batch in loop.open_pass(train, progress.epoch, progress.batch, state):
                x, y = loop.unpack(batch, f"{where} {progress.batch + 1}")
                if self._unseen and not progress.batch and not self._intake.suits(train, x, y):
                    self.release_step()
                self._unseen = False
                if self.step is None:
                    self.compiled(x, y)
                    started += self.seconds_compile
                    if not stop.begun:
                        self._begin(stop)
                if not begun:
                    self.report.begin_epoch(progress.epoch + 1, last, length, progress.batch)
                    for callback in self.callbacks:
                        callback.on_train_epoch_start(self)
                    self._pass, begun = train, True
                progress.batch += 1
                try:
                    self._train_batch(x, y, f"{where} {progress.batch}")
                except PeerLost:  # the batch is still to be trained on, and is found by its number
                    progress.batch -= 1
                    self._pass = self._data_state = None
                    raise
                self._agree(stop)
                if (stop() or self.stop_now) and progress.batch != length:
                    progress.seconds_steps += time.perf_counter() - started
                    self.sync()
                    stop.check()
                    return
        progress.seconds_steps += time.perf_counter() - started
        if not progress.batch:
            raise loop.empty("train")
        if progress.steps == progress.steps_before_epoch:
            raise self._intake.nothing_taken(f"{where} {progress.batch}")
        progress.passed, self._pass, self._data_state = 1, None, None

    def _train_batch(self, x: object, y: object, where: str) -> None:
        step, ready = self.compiled(x, y), self._intake(x, y, where)
        for text in self._intake.take_notes():
            self.report.note("data", f"{where}: {text}")
        if ready is None:
            return
        examples = self._intake.examples(x, y)
        x, y = ready
        skipped = step.skipped_steps
        for callback in self.callbacks:
            callback.on_train_batch_start(self)
        put_into_training(self.model)
        with loop.located(where):
            loss = float(step(x, y))
        if (agreement := engine.compared_now(step)) is not None:
            if math.isnan(agreement.loss) and self._intake.counts(x, y):
                raise self._diverged("a loss that is nan in plain PyTorch")
            if not self._compared:
                self.report.note("numerics", str(agreement))
                self._compared = True
        self._last = ready
        self.progress.count(loss, examples, skipped=step.skipped_steps > skipped)
        self.report.step(loss, step.loss_scale, self._skipped())
        for callback in self.callbacks:
            callback.on_train_batch_end(self, loss)
        if self.progress.bad_in_a_row >= MAX_BAD_STEPS:
            raise self._diverged(
                f"{MAX_BAD_STEPS} steps in a row that were skipped or had a loss not finite", loss
            )

    def _agree(self, stop: loop.Stop | None = None) -> None:
        """All processes stop where one of them does."""
        exchange = self.options.exchange
        if exchange is not None and exchange.shards.world > 1:
            number, now, soon = exchange.agree(
                (stop.signal if stop is not None else None) or 0, self.stop_now, self.should_stop
            )
            if stop is not None:
                stop.signal = stop.signal or number or None
            self.stop_now, self.should_stop = bool(now), bool(soon)

    def _finish_epoch(self, val: Iterable[Batch] | None, joules: float | None, stop: loop.Stop) -> None:
        progress = self.progress
        self.sync()
        self.check_finite()
        if self.options.exchange is not None:
            self.options.exchange.check_alike(digest_of(self.model), "the same weights")
        metrics = self._inference.evaluate(val, stop) if val is not None else None
        if metrics is not None:
            if not math.isfinite(metrics.loss):
                raise self._diverged(f"a loss of {metrics.loss:g} on the validation data")
            self._metrics = metrics
            for callback in self.callbacks:
                callback.on_validation_end(self, metrics)
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
            scores=metrics.scores if metrics else (),
        )
        self.history.append(record)
        if len(self.history) == 1 and self.step is not None:
            for text in self.step.placement().get("cpu", ()):
                self.report.note("cpu", text)
        progress.next_epoch(self._skipped())
        self.report.end_epoch(record)
        if (strayed := progress.strayed(record.train_loss)) is not None:
            self.report.note("warning", strayed)

    def compiled(self, x: object, y: object) -> Step:
        """The step; at first it is compiled for batches like (x, y) and given the restored state."""
        if self.step is not None:
            return self.step
        self.report.activity("compiling the training step")
        started = time.perf_counter()
        put_into_training(self.model)
        state = part(self._restored.tensors, STEP) if self._restored is not None else {}
        with loop.located("train: first batch"):
            ready = self._intake.begin(self._train, x, y)
            with self._as_at_first():
                step = engine.make_step(
                    self.model,
                    self._intake.loss,
                    self.optimizer,
                    ready,
                    self.target,
                    self.options,
                    state or None,
                )
        if self._restored is not None:
            self.progress.skipped_steps -= step.skipped_steps
            if engine.is_other_program(step, self._restored.scalars.get("program")):
                self.report.note("warning", engine.OTHER_PROGRAM)
            self._restored = None
        self.step = step
        self._inference.example = x
        for text in self._intake.take_notes():
            self.report.note("data", text)
        self.seconds_compile = time.perf_counter() - started
        self.report.compiled(engine.program_facts(step, self.optimizer), self.seconds_compile)
        place = step.placement()
        if place.get("optimizer_on") == "host":
            reason = f": it {place['optimizer_reason']}" if place.get("optimizer_reason") else ""
            name = type(self.optimizer).__name__
            self.report.note("optimizer", f"{name} runs on the host, PyTorch fp32{reason}")
        return step


def _refuse_object(*_: object, **__: object) -> NoReturn:
    """`Trainer.resume` called on an object, which would stay as it is."""
    text = (
        "resume: needs the class, which makes a new trainer; got a trainer, which would stay as it is. Write "
    )
    raise UsageError(text + "trainer = Trainer.resume(path, ...).", code="ANE104")
