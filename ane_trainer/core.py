"""The training lifecycle: load data, build the model, compile the step once, run the loop, report."""

from __future__ import annotations

import contextlib
import math
import platform
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ane_trainer.__version__ import __version__
from ane_trainer.ane.errors import DataError, Diverged, Interrupted, UsageError
from ane_trainer.ane.export import DEFAULT_NAMES, ExportReport, format_of
from ane_trainer.data import Batches, find_dataset, load_dataset
from ane_trainer.models import build_model
from ane_trainer.training.checkpoint import has_step
from ane_trainer.training.config import TrainConfig, make_config
from ane_trainer.training.loop import interruptible
from ane_trainer.training.optimizers import make_optimizer
from ane_trainer.training.recording import Recorder
from ane_trainer.training.report import ConsoleReporter, Reporter
from ane_trainer.training.results import Result
from ane_trainer.training.runs import RunFolder, claim_run, open_run
from ane_trainer.training.trainer import Trainer
from ane_trainer.utils import format_count

__all__ = ["Trainer", "evaluate_run", "export_run", "predict_run", "resume_training", "run_training"]


def run_training(
    config: TrainConfig, *, out: str | Path | None = None, report: Reporter | None = None
) -> Result:
    """Load the data, build the model, train, evaluate; leaves everything in a run folder, `details["run"]`.

    Ctrl-C, SIGTERM, SIGHUP: Interrupted, with a checkpoint written. See `Trainer.fit` for what else is refused.
    """
    started = time.perf_counter()
    with _stoppable():
        config = config.resolved()
        trainer = _make_trainer(config, report if report is not None else ConsoleReporter())
        model_name = Path(config.model.rpartition(":")[0] or config.model).stem
        with claim_run(out, f"{find_dataset(config.dataset).name}-{model_name}") as run:
            return _train_run(trainer, run, config, started)


def resume_training(path: str | Path, *, report: Reporter | None = None, **changes: Any) -> Result:
    """Go on with an interrupted run, or, with `epochs`, train a finished one until so many in all.

    `changes` are options of `config.RESUMABLE`, which may differ from the run's. Everything is read and checked
    before anything of the run is touched.
    """
    started = time.perf_counter()
    report = report if report is not None else ConsoleReporter()
    with _stoppable():
        run = open_run(path)
        old = run.read_config()
        given = {name: value for name, value in changes.items() if value is not None}
        config = make_config({**old.model_dump(), **given})
        with run.locked():
            model, remark = run.model_source(config.model)
            trainer = _make_trainer(config, report, model=model)
            if remark:
                report.note("warning", remark)
            if run.holds_training():
                _restore(trainer, run, config)
            return _train_run(trainer, run, config, started)


def _restore(trainer: Trainer, run: RunFolder, config: TrainConfig) -> None:
    checkpoint, damage = run.read_checkpoint()
    if damage:
        trainer.report.note("warning", f"the last checkpoint is left out, the one before is used: {damage}")
    was_cpu = checkpoint.scalars.get("options", {}).get("device") == "cpu"
    if was_cpu != (not trainer.target.runs_programs) and has_step(checkpoint):
        raise UsageError(
            f"{run.path}: needs {'device cpu' if was_cpu else 'a device that runs programs'}, as it was begun; "
            f"got {trainer.target.device}. Leave --device out.",
            code="ANE107",
        )
    trainer.restore(checkpoint)
    done = trainer.progress.epoch
    if done > config.epochs or (done == config.epochs and run.has_result()):
        raise UsageError(
            f"{run.path}: needs epochs left to train; all {done} are done. "
            f"Add more: --resume {run.path} --epochs {done + 5}",
            code="ANE107",
        )


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Within the block a signal ends in Interrupted, with the exit code that shells give it."""
    with interruptible():
        try:
            yield
        except KeyboardInterrupt as error:
            stopped = Interrupted("train: stopped before training began; there is nothing to go on from.")
            raise _with_exit_code(stopped, error) from None


def _with_exit_code(stopped: Interrupted, error: KeyboardInterrupt) -> Interrupted:
    stopped.exit_code = 128 + (error.args[0] if error.args else signal.SIGINT)
    return stopped


def evaluate_run(path: str | Path, *, limit: int | None = None, **options: Any) -> dict[str, Any]:
    """Loss and accuracy of a finished run on its dataset's test split, by an inference program.

    `options` (device, chip, fidelity, threads) override those of the run.
    """
    trainer, config, folder = _open_trained(path, options)
    test = _test_split(config, limit)
    started = time.perf_counter()
    metrics = trainer.evaluate(test)
    if not math.isfinite(metrics.loss):
        raise Diverged(
            f"{folder}: needs a loss that is finite; got {metrics.loss:g} on the test data. "
            "Train again with a lower learning rate, or look for outliers in the data.",
            code="ANE401",
        )
    return {
        "run": str(folder),
        "dataset": config.dataset,
        "model": config.model,
        "examples": metrics.examples,
        "test_accuracy": metrics.accuracy,
        "test_loss": metrics.loss,
        **_where(trainer),
        "seconds": time.perf_counter() - started,
    }


def predict_run(
    run: str | Path, *, index: int | None = None, path: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Classes and probabilities for one test example (`index`) or a .npy file of examples [N, ...] or [...].

    Numbers of dtype uint8 are taken as pixels and normalised, others as the model's inputs as they are.
    """
    if (index is None) == (path is None):
        raise UsageError(
            "predict: needs either an index or an input; give --index N or --input FILE.npy.", code="ANE108"
        )
    trainer, config, folder = _open_trained(run, options)
    test = _test_split(config)
    truth: int | None = None
    if index is not None:
        if not 0 <= index < test.num_examples:
            raise DataError(
                f"predict: needs an index from 0 to {test.num_examples - 1}; got {index}. Choose another.",
                code="DATA108",
            )
        x, truth = test.normalise(test.images[index : index + 1]), int(test.labels[index])
    else:
        x = _as_examples(_load_array(path), test)
    output = trainer.predict(x)
    return {
        "run": str(folder),
        **_where(trainer),
        "predictions": [_prediction(row, test.class_names) for row in output],
        "truth": test.class_names[truth] if truth is not None else None,
    }


def export_run(
    path: str | Path, format: str, out: str | Path | None = None, *, input: str = "auto",
    weights: str = "fp16", batch: int = 1, examples: int | None = None, **options: Any,
) -> ExportReport:  # fmt: skip
    """Write a finished run's model, or its training step, as a file, checked on its dataset's test split.

    The file goes to `out`, by default into the run's folder. `options` override those of the run.
    """
    run = open_run(path)
    config = run.read_config()
    kind = format_of(out or "", format)
    device = "sim" if kind.startswith("step-") or config.device == "cpu" else config.device
    changed = {"device": device, "precision": "auto", **{k: v for k, v in options.items() if v is not None}}
    config = config.model_copy(update=changed)
    trainer = _run_trainer(run, config)
    target = Path(out) if out is not None else run.path / DEFAULT_NAMES[kind]
    if kind.startswith("step-"):
        trainer.restore(run.read_checkpoint()[0])
        data, _ = _load(config)
    else:
        trainer.load_weights(run.read_weights(), str(run.path))
        data = _test_split(config)
    count = data.num_examples if examples is None else examples
    return trainer.export(target, kind, data=data, input=input, weights=weights, batch=batch, examples=count)


def _test_split(config: TrainConfig, limit: int | None = None) -> Batches:
    _, test = load_dataset(config.dataset, config.batch_size, config.seed, limit=limit, drop_last=False)
    return test


def _load_array(path: str | Path | None) -> np.ndarray[Any, Any]:
    try:
        loaded = np.load(str(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"predict: needs a .npy file with an array; got {path} ({error}). Write one with numpy.save.",
            code="DATA109",
        ) from None
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind not in "uif":
        raise DataError(
            f"predict: needs one array of numbers; got {path}. Write one with numpy.save.", code="DATA109"
        )
    return loaded


def _prediction(logits: torch.Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    probabilities = logits.softmax(dim=0)
    best = int(probabilities.argmax())
    return {"class": best, "name": names[best], "probabilities": [float(p) for p in probabilities]}


def _as_examples(array: Any, data: Batches) -> torch.Tensor:
    """Examples [N, *in_shape] from an array with or without the batch and channel dimensions."""
    values = torch.from_numpy(np.ascontiguousarray(array))
    size = int(np.prod(data.in_shape))
    if not values.numel() or values.numel() % size or tuple(values.shape[-2:]) != data.in_shape[-2:]:
        raise DataError(
            f"predict: needs examples of shape {list(data.in_shape)}; got {list(values.shape)}. Reshape it.",
            code="DATA105",
        )
    values = values.reshape(-1, *data.in_shape)
    return data.normalise(values) if values.dtype == torch.uint8 else values.float()


def _where(trainer: Trainer) -> dict[str, Any]:
    device = trainer.target
    return {"device": device.name, "chip": device.chip, "fidelity": device.fidelity, "where": device.headline}


def _open_trained(path: str | Path, options: Mapping[str, Any]) -> tuple[Trainer, TrainConfig, Path]:
    """A silent trainer with the model and weights of a finished run."""
    run = open_run(path)
    config = run.read_config().model_copy(update={k: v for k, v in options.items() if v is not None})
    trainer = _run_trainer(run, config)
    trainer.load_weights(run.read_weights(), str(run.path))
    return trainer, config, run.path


def _make_trainer(
    config: TrainConfig, report: Reporter, device: str | None = None, model: str | None = None
) -> Trainer:
    """The configured model and optimizer in a trainer; data is not needed yet. `model`: where it is found now."""
    info = find_dataset(config.dataset)
    classes = len(info.class_names)
    options = config.model_options()
    net = build_model(model or config.model, info.in_shape, classes, seed=config.seed, **options)
    return Trainer(
        net,
        config.loss,
        make_optimizer(config, net),
        device=device or config.device,
        chip=config.chip,
        fidelity=config.fidelity,
        precision="auto" if device == "cpu" else config.precision,
        seed=config.seed,
        threads=config.threads,
        report=report,
        clip_grad_norm=config.clip_grad_norm,
        clip_grad_value=config.clip_grad_value,
        accumulate=config.accumulate,
        optimizer_on=config.optimizer_on,
        fallback=config.fallback,
    )


def _run_trainer(run: RunFolder, config: TrainConfig) -> Trainer:
    """A silent trainer of a run's model, built from the run's own copy of its file."""
    model, remark = run.model_source(config.model)
    if remark:
        warnings.warn(remark, stacklevel=3)
    return _make_trainer(config, Reporter(), model=model)


def _load(config: TrainConfig) -> tuple[Batches, Batches]:
    return load_dataset(config.dataset, config.batch_size, config.seed, limit=config.limit)


def _train_run(trainer: Trainer, run: RunFolder, config: TrainConfig, started: float) -> Result:
    """Train to the end, recorded in the run's folder; write program, weights, result."""
    before = trainer.progress.seconds
    trainer.announce()
    train, test = _load(config)
    _introduce(trainer, config, train, test)
    recorder = Recorder(run, config)
    try:
        trainer.fit(train, config.epochs - trainer.progress.epoch, test, callbacks=[recorder])
        seconds = before + time.perf_counter() - started
        reference = _train_reference(config, trainer.report) if config.compare_fp32 else None
    except KeyboardInterrupt as error:
        if trainer.step is None:  # nothing was trained since the last checkpoint
            raise
        recorder.save(trainer)
        stopped = Interrupted(
            f"train: stopped at epoch {trainer.progress.epoch + 1}, batch {trainer.progress.batch}; "
            f"checkpoint in {run.path}. Go on: ane-trainer train --resume {run.path}"
        )
        raise _with_exit_code(stopped, error) from None
    if trainer.step is not None and (compiled := trainer.step.compiled) is not None:
        run.write_program(compiled.text, compiled.weights)
    run.write_weights(trainer.model.state_dict())
    result = trainer.result(
        dataset=train.name,
        model=config.model,
        seconds_total=seconds,
        fp32_reference=reference.test_accuracy if reference else None,
        **_provenance(config, run, reference),
    )
    run.write_result(result.to_json())
    return result


def _introduce(trainer: Trainer, config: TrainConfig, train: Batches, test: Batches) -> None:
    note, progress = trainer.report.note, trainer.progress
    examples = f"{train.num_examples:,} train / {test.num_examples:,} test"
    note("data", f"{train.name}  {examples}, from {train.source}")
    parameters = format_count(sum(parameter.numel() for parameter in trainer.model.parameters()))
    note(
        "model",
        f"{config.model}  {parameters} parameters   {config.optimizer} lr {config.learning_rate:g}   "
        f"batch {config.batch_size}   seed {config.seed}",
    )
    if progress.steps:
        note("resume", f"at epoch {progress.epoch + 1}, batch {progress.batch + 1}")


def _train_reference(config: TrainConfig, report: Reporter) -> Result:
    """The same model, seed and batches with plain PyTorch in fp32."""
    report.note("fp32", "the same training with plain PyTorch, for comparison")
    train, test = _load(config)
    return _make_trainer(config, Reporter(), device="cpu").fit(train, config.epochs, test)


def _provenance(config: TrainConfig, run: RunFolder, reference: Result | None) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "optimizer": config.optimizer,
        "lr": config.learning_rate,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "fp32_seconds_per_step": reference.seconds_per_step if reference else None,
        "version": __version__,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
